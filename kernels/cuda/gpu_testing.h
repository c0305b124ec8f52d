// The GPU of a test, if the host has one, and tests that run on either path of the kernels.
#ifndef KERNELS_CUDA_GPU_TESTING_H_
#define KERNELS_CUDA_GPU_TESTING_H_

#include <cuda_runtime_api.h>

#include <string>

#include "gtest/gtest.h"
#include "kernels/cuda/cuda_kernels.h"

// Skips the test on a host without a GPU. On one with a GPU that cannot be used, the test fails
// where it makes its kernels.
#define NSA_SKIP_WITHOUT_GPU()                                          \
  do {                                                                  \
    int num_gpus = 0;                                                   \
    if (cudaGetDeviceCount(&num_gpus) == cudaErrorNoDevice ||           \
        cudaGetDeviceCount(&num_gpus) == cudaErrorInsufficientDriver) { \
      GTEST_SKIP() << "this host has no GPU";                           \
    }                                                                   \
  } while (false)

namespace nsa::kernels::cuda {

inline std::string NameOfPath(const ::testing::TestParamInfo<CudaPath>& info) {
  return info.param == CudaPath::kAuto ? "Auto" : "Portable";
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_GPU_TESTING_H_
