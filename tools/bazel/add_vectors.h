#ifndef TOOLS_BAZEL_ADD_VECTORS_H_
#define TOOLS_BAZEL_ADD_VECTORS_H_

#include <cuda_runtime_api.h>

// Adds on the device, c[i] = a[i] + b[i]; all three are device pointers to n floats.
cudaError_t AddVectors(const float* a, const float* b, float* c, int n, cudaStream_t stream);

#endif  // TOOLS_BAZEL_ADD_VECTORS_H_
