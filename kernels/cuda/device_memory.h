// Memory of one GPU, and which GPU a thread talks to.
#ifndef KERNELS_CUDA_DEVICE_MEMORY_H_
#define KERNELS_CUDA_DEVICE_MEMORY_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cuda {

// Makes `device` the calling thread's, and puts back the one before at the end.
class ScopedDevice {
 public:
  explicit ScopedDevice(int device);
  ~ScopedDevice();
  ScopedDevice(const ScopedDevice&) = delete;
  ScopedDevice& operator=(const ScopedDevice&) = delete;

  const absl::Status& status() const { return status_; }

 private:
  int previous_ = -1;
  absl::Status status_;
};

// ResourceExhausted, naming bytes asked and free, when memory is out. 256-byte aligned, zeroed.
absl::StatusOr<std::unique_ptr<Memory>> AllocateDeviceMemory(int device, int64_t num_bytes);

// Stream-ordered memory for the time of one call. The pool keeps what it has had, so that only the
// first calls allocate.
class ScratchPool {
 public:
  static absl::StatusOr<std::unique_ptr<ScratchPool>> Create(int device);
  ~ScratchPool();
  ScratchPool(const ScratchPool&) = delete;
  ScratchPool& operator=(const ScratchPool&) = delete;

  // Null for 0 bytes.
  absl::StatusOr<void*> Take(int64_t num_bytes, cudaStream_t stream);
  // Free for others once the work that `stream` has by now is done.
  absl::Status Return(void* memory, cudaStream_t stream);

 private:
  ScratchPool(int device, cudaMemPool_t pool) : device_(device), pool_(pool) {}

  const int device_;
  const cudaMemPool_t pool_;
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DEVICE_MEMORY_H_
