#include "kernels/cuda/stream_order.h"

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/status.h"

namespace nsa::kernels::cuda {
namespace {

class CudaStream : public Stream {
 public:
  explicit CudaStream(int device) : device_(device) {}
  ~CudaStream() override {
    const ScopedDevice scope(device_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  absl::Status Create() {
    // Ahead of the caller's stream: what runs beside it is short and waited for.
    int least = 0, greatest = 0;
    NSA_RETURN_IF_CUDA_ERROR(cudaDeviceGetStreamPriorityRange(&least, &greatest));
    return NSA_CUDA_STATUS(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest));
  }
  void* get() override { return stream_; }

 private:
  const int device_;
  cudaStream_t stream_ = nullptr;
};

class CudaEvent : public Event {
 public:
  CudaEvent(int device, EventUse use) : device_(device), use_(use) {}
  ~CudaEvent() override {
    const ScopedDevice scope(device_);
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  absl::Status Create() {
    return NSA_CUDA_STATUS(cudaEventCreateWithFlags(
        &event_, use_ == EventUse::kTime ? cudaEventDefault : cudaEventDisableTiming));
  }

  cudaEvent_t get() const { return event_; }
  EventUse use() const { return use_; }

 private:
  const int device_;
  const EventUse use_;
  cudaEvent_t event_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Stream>> CreateStream(int device) {
  auto stream = std::make_unique<CudaStream>(device);
  const absl::Status status = stream->Create();
  if (!status.ok()) return status;
  return stream;
}

absl::StatusOr<std::unique_ptr<Event>> CreateEvent(int device, EventUse use) {
  auto event = std::make_unique<CudaEvent>(device, use);
  const absl::Status status = event->Create();
  if (!status.ok()) return status;
  return event;
}

absl::Status Record(Event& event, cudaStream_t stream) {
  const auto& cuda_event = static_cast<CudaEvent&>(event);
  const absl::StatusOr<bool> capturing = IsCapturing(stream);
  if (!capturing.ok()) return capturing.status();
  // A graph's own events carry no time; an external one is recorded anew by every launch.
  const bool is_external = *capturing && cuda_event.use() == EventUse::kTime;
  return NSA_CUDA_STATUS(cudaEventRecordWithFlags(
      cuda_event.get(), stream, is_external ? cudaEventRecordExternal : cudaEventRecordDefault));
}

absl::Status WaitFor(Event& event, cudaStream_t stream) {
  return NSA_CUDA_STATUS(
      cudaStreamWaitEvent(stream, static_cast<CudaEvent&>(event).get(), cudaEventWaitDefault));
}

absl::StatusOr<bool> IsCapturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  NSA_RETURN_IF_CUDA_ERROR(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

absl::StatusOr<double> SecondsBetween(Event& begin, Event& end) {
  float milliseconds = 0;
  const cudaError_t error = cudaEventElapsedTime(
      &milliseconds, static_cast<CudaEvent&>(begin).get(), static_cast<CudaEvent&>(end).get());
  if (error == cudaErrorNotReady || error == cudaErrorInvalidResourceHandle) {
    cudaGetLastError();
    return absl::FailedPreconditionError("an event has not been reached");
  }
  NSA_RETURN_IF_CUDA_ERROR(error);
  return milliseconds * 1e-3;
}

}  // namespace nsa::kernels::cuda
