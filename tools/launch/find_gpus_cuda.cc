// FindGpus of builds with a CUDA toolkit and NCCL.
#include <cuda_runtime_api.h>

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "comm/cuda_memory.h"
#include "comm/nccl/nccl_communicator.h"
#include "kernels/cuda/cuda_kernels.h"
#include "tools/launch/gpus.h"

namespace nsa::tools {
namespace {

class CudaGpus : public Gpus {
 public:
  explicit CudaGpus(int count) : count_(count) {}

  int count() const override { return count_; }

  std::string NameOf(int gpu) const override {
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, gpu);
    return error == cudaSuccess ? properties.name : cudaGetErrorString(error);
  }

  // As nvidia-smi prints it, and CUDA_VISIBLE_DEVICES takes it.
  absl::StatusOr<std::string> UuidOf(int gpu) const override {
    cudaDeviceProp properties;
    const cudaError_t error = cudaGetDeviceProperties(&properties, gpu);
    if (error != cudaSuccess) {
      return absl::InternalError(
          absl::StrCat("cudaGetDeviceProperties: ", cudaGetErrorString(error)));
    }
    const cudaUUID_t& uuid = properties.uuid;
    std::string text = absl::BytesToHexString({uuid.bytes, sizeof(uuid.bytes)});
    for (const int dash : {20, 16, 12, 8}) text.insert(dash, 1, '-');
    return absl::StrCat("GPU-", text);
  }

  absl::StatusOr<std::unique_ptr<kernels::Kernels>> CreateKernels(int gpu) override {
    return kernels::CudaKernels::Create({.device = gpu});
  }

  absl::StatusOr<std::shared_ptr<comm::DeviceMemory>> CreateMemory(int gpu) override {
    return comm::CreateCudaMemory(gpu);
  }

  absl::StatusOr<std::unique_ptr<comm::Communicator>> CreateCommunicator(
      std::unique_ptr<comm::Bootstrap> bootstrap, int gpu, absl::Duration timeout,
      void* adopt) override {
    comm::NcclOptions options;
    options.timeout = timeout;
    options.connect_timeout = timeout;
    options.device = gpu;
    options.adopt = static_cast<ncclComm*>(adopt);
    return comm::NcclCommunicator::Create(std::move(bootstrap), options);
  }

 private:
  const int count_;
};

}  // namespace

absl::StatusOr<std::shared_ptr<Gpus>> FindGpus() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    return absl::NotFoundError(
        absl::StrCat("this host shows no GPU (", cudaGetErrorString(error), ")"));
  }
  return std::make_shared<CudaGpus>(count);
}

}  // namespace nsa::tools
