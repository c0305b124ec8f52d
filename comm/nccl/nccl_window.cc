#include "comm/nccl/nccl_window.h"

#include <new>

#include "absl/strings/str_cat.h"
#include "comm/nccl/window_kernels.h"

namespace nsa::comm::nccl {
namespace {

absl::Status ListError(const ListFault& fault, absl::Span<const int64_t> window_bytes) {
  const auto invalid = [](const auto&... parts) {
    return absl::InvalidArgumentError(absl::StrCat("Gather: ", parts...));
  };
  switch (static_cast<ListFaultKind>(fault.kind)) {
    case ListFaultKind::kCount:
      return invalid("*list.count: ", fault.value, "; must be in [0, max_count]");
    case ListFaultKind::kPeer:
      return invalid("list.peers[", fault.index, "]: ", fault.value, "; must be in [0, ",
                     window_bytes.size(), ")");
    case ListFaultKind::kOffset:
      return invalid("list.offsets[", fault.index, "]: ", fault.value, "; ", fault.record_bytes,
                     " bytes from there must lie in the window of rank ", fault.peer,
                     ", which has ", window_bytes[fault.peer]);
    case ListFaultKind::kNull:
      return invalid("list.peers, list.offsets or dst: null; must hold ", fault.value, " records");
    case ListFaultKind::kNone:
      break;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Window>> NcclWindow::Create(const WindowContext* context, int64_t id,
                                                           std::vector<int64_t> window_bytes,
                                                           std::unique_ptr<PeerBuffer> buffer,
                                                           int64_t signals_offset) {
  std::unique_ptr<NcclWindow> window(new NcclWindow(context, id, std::move(window_bytes)));
  window->buffer_ = std::move(buffer);
  window->data_ = window->buffer_->data();
  window->memory_.bases = window->buffer_->bases();
  window->memory_.signals_offset = signals_offset;
  if (absl::Status s = window->Start(); !s.ok()) return s;
  return window;
}

absl::StatusOr<std::unique_ptr<Window>> NcclWindow::CreateAlone(const WindowContext* context,
                                                                int64_t window_bytes,
                                                                DevicePtr<char> memory) {
  std::unique_ptr<NcclWindow> window(new NcclWindow(context, 0, {window_bytes}));
  window->data_ = memory.get();
  window->own_memory_ = std::move(memory);
  absl::StatusOr<DevicePtr<char*>> base = AllocateDevice<char*>(1);
  if (!base.ok()) return base.status();
  window->own_base_ = *std::move(base);
  NSA_COMM_CUDA_OK(cudaMemcpyAsync(window->own_base_.get(), &window->data_, sizeof(char*),
                                   cudaMemcpyHostToDevice, context->stream));
  window->memory_.bases = window->own_base_.get();
  if (absl::Status s = window->Start(); !s.ok()) return s;
  return window;
}

absl::Status NcclWindow::Start() {
  memory_.rank = context_.rank;
  memory_.size = context_.size;
  memory_.board = context_.health->device_board();
  memory_.limit_ns = absl::ToInt64Nanoseconds(context_.timeout);

  absl::StatusOr<DevicePtr<int64_t>> bytes = AllocateDevice<int64_t>(context_.size);
  if (!bytes.ok()) return bytes.status();
  device_window_bytes_ = *std::move(bytes);
  absl::StatusOr<DevicePtr<uint32_t>> taken = AllocateDevice<uint32_t>(1);
  if (!taken.ok()) return taken.status();
  list_fault_taken_ = *std::move(taken);
  void* fault = nullptr;
  NSA_COMM_CUDA_OK(cudaHostAlloc(&fault, sizeof(ListFault), cudaHostAllocMapped));
  list_fault_.reset(new (fault) ListFault());
  void* device_fault = nullptr;
  NSA_COMM_CUDA_OK(cudaHostGetDevicePointer(&device_fault, fault, 0));
  device_list_fault_ = static_cast<ListFault*>(device_fault);
  cudaEvent_t event = nullptr;
  NSA_COMM_CUDA_OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  last_use_.reset(event);

  NSA_COMM_CUDA_OK(cudaMemcpyAsync(device_window_bytes_.get(), window_bytes_.data(),
                                   window_bytes_.size() * sizeof(int64_t), cudaMemcpyHostToDevice,
                                   context_.stream));
  NSA_COMM_CUDA_OK(cudaMemsetAsync(list_fault_taken_.get(), 0, sizeof(uint32_t), context_.stream));
  NSA_COMM_CUDA_OK(cudaStreamSynchronize(context_.stream));
  return absl::OkStatus();
}

NcclWindow::~NcclWindow() {
  const ScopedDevice device(context_.device);
  if (used_ && !context_.AwaitIdle(last_use_.get())) {
    // Kernels may still use it all, so it is left to the end of the process.
    (void)buffer_.release();
    (void)own_memory_.release();
    (void)own_base_.release();
    (void)device_window_bytes_.release();
    (void)list_fault_taken_.release();
    (void)list_fault_.release();
    return;
  }
  if (alone()) return;
  // Peers may go on to their next epoch without this rank.
  if (!context_.health->broken() && LaunchRetire(memory_, context_.stream) == cudaSuccess) {
    (void)cudaStreamSynchronize(context_.stream);
  }
  context_.retire(id_, std::move(buffer_));
}

absl::Status NcclWindow::Enter() {
  if (absl::Status s = context_.health->Check(); !s.ok()) return s;
  return TakeListError();
}

absl::Status NcclWindow::Finish(cudaError_t launched, const char* kernel, cudaStream_t stream) {
  if (launched != cudaSuccess) return context_.health->Break(CudaStatus(launched, kernel));
  if (IsCapturing(stream)) return absl::OkStatus();
  if (cudaError_t e = cudaEventRecord(last_use_.get(), stream); e != cudaSuccess) {
    return context_.health->Break(CudaStatus(e, "cudaEventRecord"));
  }
  used_ = true;
  return absl::OkStatus();
}

absl::Status NcclWindow::BeginWrite(void* stream) {
  if (absl::Status s = Enter(); !s.ok()) return s;
  if (absl::Status s = order_.BeginWrite(); !s.ok()) return s;
  if (alone()) return absl::OkStatus();
  const ScopedDevice device(context_.device);
  const auto on = static_cast<cudaStream_t>(stream);
  return Finish(LaunchBeginWrite(memory_, on), "BeginWrite", on);
}

absl::Status NcclWindow::Publish(void* stream) {
  if (absl::Status s = Enter(); !s.ok()) return s;
  if (absl::Status s = order_.Publish(); !s.ok()) return s;
  if (alone()) return absl::OkStatus();
  const ScopedDevice device(context_.device);
  const auto on = static_cast<cudaStream_t>(stream);
  return Finish(LaunchPublish(memory_, on), "Publish", on);
}

absl::Status NcclWindow::Gather(const GatherList& list, int64_t record_bytes, void* dst,
                                void* stream) {
  if (absl::Status s = Enter(); !s.ok()) return s;
  if (absl::Status s = order_.Gather(); !s.ok()) return s;
  if (record_bytes <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("Gather: record_bytes: ", record_bytes, "; must be > 0"));
  }
  if (list.count == nullptr) {
    return absl::InvalidArgumentError("Gather: list.count: null; must point to the count");
  }
  const ScopedDevice device(context_.device);
  const auto on = static_cast<cudaStream_t>(stream);
  const WindowSignals* const signals =
      alone() ? nullptr : reinterpret_cast<const WindowSignals*>(data_ + memory_.signals_offset);
  const GatherArguments arguments = {list.peers,
                                     list.offsets,
                                     list.count,
                                     list.max_count,
                                     record_bytes,
                                     static_cast<char*>(dst),
                                     device_window_bytes_.get(),
                                     device_list_fault_,
                                     list_fault_taken_.get(),
                                     signals};
  return Finish(LaunchGather(memory_, arguments, context_.gather_ctas, context_.gather_warps, on),
                "Gather", on);
}

absl::Status NcclWindow::Release(void* stream) {
  if (absl::Status s = Enter(); !s.ok()) return s;
  if (absl::Status s = order_.Release(); !s.ok()) return s;
  if (alone()) return absl::OkStatus();
  const ScopedDevice device(context_.device);
  const auto on = static_cast<cudaStream_t>(stream);
  return Finish(LaunchRelease(memory_, on), "Release", on);
}

absl::Status NcclWindow::TakeListError() {
  if (__atomic_load_n(&list_fault_->kind, __ATOMIC_ACQUIRE) == 0) return absl::OkStatus();
  const absl::Status error = ListError(*list_fault_, window_bytes_);
  __atomic_store_n(&list_fault_->kind, 0, __ATOMIC_RELEASE);
  const ScopedDevice device(context_.device);
  NSA_COMM_CUDA_OK(cudaMemsetAsync(list_fault_taken_.get(), 0, sizeof(uint32_t), context_.stream));
  NSA_COMM_CUDA_OK(cudaStreamSynchronize(context_.stream));
  return error;
}

}  // namespace nsa::comm::nccl
