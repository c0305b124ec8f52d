// CUDA's and NCCL's errors as absl::Status, and owners of CUDA's handles.
#ifndef COMM_CUDA_STATUS_H_
#define COMM_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace nsa::comm {

// Internal with the expression that failed; ResourceExhausted for memory.
absl::Status CudaStatus(cudaError_t error, absl::string_view expression);

// Returns from the enclosing function when a CUDA call fails.
#define NSA_COMM_CUDA_OK(expression)                                                \
  do {                                                                              \
    if (cudaError_t nsa_cuda_error = (expression); nsa_cuda_error != cudaSuccess) { \
      return ::nsa::comm::CudaStatus(nsa_cuda_error, #expression);                  \
    }                                                                               \
  } while (false)

// Makes `device` current for a scope.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device) {
    (void)cudaGetDevice(&before_);
    if (before_ != device) (void)cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~ScopedDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct DeviceFree {
  void operator()(void* memory) const { (void)cudaFree(memory); }
};
// Memory of cudaMalloc.
template <typename T>
using DevicePtr = std::unique_ptr<T, DeviceFree>;

template <typename T>
absl::StatusOr<DevicePtr<T>> AllocateDevice(int64_t count) {
  void* memory = nullptr;
  NSA_COMM_CUDA_OK(cudaMalloc(&memory, count * sizeof(T)));
  return DevicePtr<T>(static_cast<T*>(memory));
}

struct HostFree {
  void operator()(void* memory) const { (void)cudaFreeHost(memory); }
};
// Memory of cudaHostAlloc.
template <typename T>
using HostPtr = std::unique_ptr<T, HostFree>;

struct EventDestroy {
  void operator()(cudaEvent_t event) const { (void)cudaEventDestroy(event); }
};
using Event = std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, EventDestroy>;

struct StreamDestroy {
  void operator()(cudaStream_t stream) const { (void)cudaStreamDestroy(stream); }
};
using Stream = std::unique_ptr<std::remove_pointer_t<cudaStream_t>, StreamDestroy>;

inline bool IsCapturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status != cudaStreamCaptureStatusNone;
}

}  // namespace nsa::comm

#endif  // COMM_CUDA_STATUS_H_
