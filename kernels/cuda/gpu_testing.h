// The GPU of a test, if the host has one.
#ifndef KERNELS_CUDA_GPU_TESTING_H_
#define KERNELS_CUDA_GPU_TESTING_H_

#include <cuda_runtime_api.h>

#include "gtest/gtest.h"

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

#endif  // KERNELS_CUDA_GPU_TESTING_H_
