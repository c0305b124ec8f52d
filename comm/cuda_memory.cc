#include "comm/cuda_memory.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/cuda_status.h"

namespace nsa::comm {
namespace {

class CudaMemory final : public DeviceMemory {
 public:
  explicit CudaMemory(int device) : device_(device) {}

  absl::StatusOr<Block> Allocate(int64_t num_bytes) override {
    const ScopedDevice device(device_);
    size_t free = 0;
    size_t total = 0;
    NSA_COMM_CUDA_OK(cudaMemGetInfo(&free, &total));
    void* data = nullptr;
    if (cudaError_t e = cudaMalloc(&data, num_bytes); e != cudaSuccess) {
      (void)cudaGetLastError();
      return absl::ResourceExhaustedError(
          absl::StrCat("CreateWindow: num_bytes: cannot allocate ", num_bytes, ", ", free,
                       " are free on device ", device_, ": ", cudaGetErrorString(e)));
    }
    Block block(static_cast<char*>(data), [](char* memory) { (void)cudaFree(memory); });
    NSA_COMM_CUDA_OK(cudaMemset(data, 0, num_bytes));
    NSA_COMM_CUDA_OK(cudaStreamSynchronize(nullptr));
    return block;
  }

  absl::StatusOr<Block> AllocateHost(int64_t num_bytes) override {
    const ScopedDevice device(device_);
    void* data = nullptr;
    if (cudaError_t e = cudaMallocHost(&data, num_bytes); e != cudaSuccess) {
      (void)cudaGetLastError();
      return absl::ResourceExhaustedError(
          absl::StrCat("staging: cannot allocate ", num_bytes,
                       " pinned bytes on the host: ", cudaGetErrorString(e)));
    }
    return Block(static_cast<char*>(data), [](char* memory) { (void)cudaFreeHost(memory); });
  }

  absl::Status Copy(void* dst, const void* src, int64_t num_bytes, void* stream) override {
    if (num_bytes == 0) return absl::OkStatus();
    const ScopedDevice device(device_);
    NSA_COMM_CUDA_OK(
        cudaMemcpyAsync(dst, src, num_bytes, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)));
    return absl::OkStatus();
  }

  absl::Status Synchronize(void* stream) override {
    const ScopedDevice device(device_);
    NSA_COMM_CUDA_OK(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)));
    return absl::OkStatus();
  }

 private:
  const int device_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<DeviceMemory>> CreateCudaMemory(int device) {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    count = 0;
  }
  if (device < 0 || device >= count) {
    return absl::InvalidArgumentError(
        absl::StrCat("device: ", device, "; must be in [0, ", count, ")"));
  }
  return std::make_shared<CudaMemory>(device);
}

}  // namespace nsa::comm
