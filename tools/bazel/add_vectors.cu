#include "tools/bazel/add_vectors.h"

namespace {

// Grid: ceil(n / blockDim.x). A CTA owns blockDim.x consecutive elements.
__global__ void AddVectorsKernel(const float* a, const float* b, float* c, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}

}  // namespace

cudaError_t AddVectors(const float* a, const float* b, float* c, int n, cudaStream_t stream) {
  constexpr int kThreads = 256;
  AddVectorsKernel<<<(n + kThreads - 1) / kThreads, kThreads, 0, stream>>>(a, b, c, n);
  return cudaGetLastError();
}
