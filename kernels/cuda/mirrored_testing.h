// Tests of stages on either path of the kernels, which are given tensors of the host.
#ifndef KERNELS_CUDA_MIRRORED_TESTING_H_
#define KERNELS_CUDA_MIRRORED_TESTING_H_

#include <memory>
#include <utility>

#include "gtest/gtest.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gpu_testing.h"
#include "kernels/cuda/mirrored_kernels.h"

namespace nsa::kernels::cuda {

class MirroredTest : public ::testing::TestWithParam<CudaPath> {
 protected:
  void SetUp() override {
    NSA_SKIP_WITHOUT_GPU();
    auto kernels = CudaKernels::Create({.path = GetParam()});
    ASSERT_TRUE(kernels.ok()) << kernels.status();
    kernels_ = std::make_unique<MirroredKernels>(*std::move(kernels));
  }

  std::unique_ptr<Kernels> kernels_;
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_MIRRORED_TESTING_H_
