// Values of tensors in device memory, by their place in the global tensor: what a rank holds does
// not depend on how the tensor is sharded.
#ifndef BENCHMARKS_DEVICE_VALUES_H_
#define BENCHMARKS_DEVICE_VALUES_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nsa::benchmarks {

// Elements [first, first + count) of the global tensor `seed`, about normal, as bf16.
cudaError_t FillNormal(uint64_t seed, int64_t first, int64_t count, void* values,
                       cudaStream_t stream);

cudaError_t FillConstant(float value, int64_t count, float* values, cudaStream_t stream);

// Adds to *sum (device memory) a hash of the bits of elements [first, first + count) and of their
// places. Sums over all ranks are equal for equal global tensors.
cudaError_t AddFingerprint(int64_t first, int64_t count, const void* values, uint64_t* sum,
                           cudaStream_t stream);

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_DEVICE_VALUES_H_
