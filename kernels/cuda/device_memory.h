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

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DEVICE_MEMORY_H_
