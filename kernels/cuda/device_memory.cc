#include "kernels/cuda/device_memory.h"

#include <algorithm>
#include <cstddef>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/status.h"

namespace nsa::kernels::cuda {
namespace {

class CudaMemory : public Memory {
 public:
  CudaMemory(int device, void* data) : device_(device), data_(data) {}
  ~CudaMemory() override {
    const ScopedDevice scope(device_);
    cudaFree(data_);
  }
  CudaMemory(const CudaMemory&) = delete;
  CudaMemory& operator=(const CudaMemory&) = delete;

  void* data() override { return data_; }

 private:
  const int device_;
  void* const data_;
};

absl::Status OutOfMemory(int device, int64_t num_bytes) {
  cudaGetLastError();  // an allocation that failed leaves nothing to report elsewhere
  size_t free_bytes = 0, total_bytes = 0;
  const absl::Status status = NSA_CUDA_STATUS(cudaMemGetInfo(&free_bytes, &total_bytes));
  if (!status.ok()) return status;
  return absl::ResourceExhaustedError(absl::StrCat("memory of CUDA device ", device, ": ",
                                                   num_bytes, " bytes asked, ", free_bytes,
                                                   " bytes free"));
}

}  // namespace

ScopedDevice::ScopedDevice(int device) {
  status_ = NSA_CUDA_STATUS(cudaGetDevice(&previous_));
  if (status_.ok() && previous_ != device) status_ = NSA_CUDA_STATUS(cudaSetDevice(device));
}

ScopedDevice::~ScopedDevice() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

absl::StatusOr<std::unique_ptr<Memory>> AllocateDeviceMemory(int device, int64_t num_bytes) {
  if (num_bytes < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_bytes = ", num_bytes, " must not be negative"));
  }
  const ScopedDevice scope(device);
  if (!scope.status().ok()) return scope.status();
  const size_t taken_bytes = std::max<int64_t>(num_bytes, 1);
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, taken_bytes);
  if (error == cudaErrorMemoryAllocation) return OutOfMemory(device, num_bytes);
  absl::Status status = ToStatus(error, "cudaMalloc(&data, taken_bytes)");
  if (!status.ok()) return status;
  auto memory = std::make_unique<CudaMemory>(device, data);
  status = NSA_CUDA_STATUS(cudaMemset(data, 0, taken_bytes));
  if (!status.ok()) return status;
  // Other streams do not wait for the default one, which clears the memory.
  status = NSA_CUDA_STATUS(cudaStreamSynchronize(nullptr));
  if (!status.ok()) return status;
  return memory;
}

}  // namespace nsa::kernels::cuda
