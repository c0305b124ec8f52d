// Shows that cuda_library compiles, links and, where there is a GPU, runs.

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <vector>

#include "tools/bazel/add_vectors.h"

namespace {

TEST(CudaRuleTest, KernelRunsOnTheDevice) {
  int num_devices = 0;
  if (const cudaError_t status = cudaGetDeviceCount(&num_devices); status != cudaSuccess) {
    GTEST_SKIP() << "no GPU: " << cudaGetErrorString(status);
  }
  constexpr int kN = 1000;
  constexpr size_t kBytes = kN * sizeof(float);
  std::vector<float> a(kN), b(kN), c(kN, -1.0f);
  for (int i = 0; i < kN; ++i) {
    a[i] = static_cast<float>(i);
    b[i] = 2.0f * static_cast<float>(i);
  }
  float* device = nullptr;
  ASSERT_EQ(cudaMalloc(reinterpret_cast<void**>(&device), 3 * kBytes), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(device, a.data(), kBytes, cudaMemcpyHostToDevice), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(device + kN, b.data(), kBytes, cudaMemcpyHostToDevice), cudaSuccess);
  EXPECT_EQ(AddVectors(device, device + kN, device + 2 * kN, kN, nullptr), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(c.data(), device + 2 * kN, kBytes, cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(cudaFree(device), cudaSuccess);
  for (int i = 0; i < kN; ++i) ASSERT_EQ(c[i], 3.0f * static_cast<float>(i)) << "at " << i;
}

}  // namespace
