// Any number of ranks on one GPU: their memory is the host's, and every call goes to the GPU and
// back.
#include <memory>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gpu_testing.h"
#include "kernels/cuda/mirrored_kernels.h"
#include "tests/forward/backend.h"

namespace nsa::test {

const Backend& TheBackend() {
  static const Backend backend = {
      .make_kernels = []() -> absl::StatusOr<std::unique_ptr<kernels::Kernels>> {
        auto device = kernels::CudaKernels::Create();
        if (!device.ok()) return device.status();
        return std::make_unique<kernels::cuda::MirroredKernels>(*std::move(device));
      },
      .dtypes = {DType::kBF16, DType::kF16},
      .alignment = 8};
  return backend;
}

void BackendTest::SetUp() { NSA_SKIP_WITHOUT_GPU(); }

}  // namespace nsa::test
