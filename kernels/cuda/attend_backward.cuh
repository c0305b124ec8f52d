// Which keys a query sees, and which queries see a key, in the backward of the window and of the
// compressed branch.
#ifndef KERNELS_CUDA_ATTEND_BACKWARD_CUH_
#define KERNELS_CUDA_ATTEND_BACKWARD_CUH_

#include <cstdint>

#include "kernels/cuda/attend_backward.h"
#include "kernels/cuda/ptx.cuh"

namespace nsa::kernels::cuda {

__host__ __device__ __forceinline__ int32_t GroupSize(const AttentionDims& dims) {
  return dims.num_q_heads / dims.num_kv_heads;
}

// Keys [begin, end).
struct KeyRange {
  int64_t begin;
  int64_t end;
};

__device__ __forceinline__ KeyRange KeysOf(const VisibleRule& rule, int64_t position) {
  const int64_t since = position - rule.first_position;
  const int64_t end = since < 0 ? 0 : since / rule.stride + 1;
  return {end > rule.window ? end - rule.window : 0, end};
}

// Positions of queries that see a key of [begin, end).
__device__ __forceinline__ KeyRange QueriesOf(const VisibleRule& rule, int64_t begin, int64_t end) {
  return {rule.first_position + begin * rule.stride,
          rule.first_position + (end - 1 + rule.window) * rule.stride};
}

// What the backward knows of a (query, head) row.
struct RowStatistics {
  float lse_log2;  // lse * log2(e)
  float gate;
  float delta;
};

__device__ __forceinline__ RowStatistics LoadStatistics(const OutputGradients& outputs,
                                                        int64_t index) {
  return {outputs.lse[index] * 1.4426950408889634f, outputs.gate[index], outputs.delta[index]};
}

// From the logit without its scale: g * P. Each product is rounded by itself, so that all kernels
// have the same bits.
__device__ __forceinline__ float GatedProbability(float logit, float scale_log2, float lse_log2,
                                                  float gate, float& probability) {
  probability = Exp2(__fmaf_rn(logit, scale_log2, -lse_log2));
  return __fmul_rn(gate, probability);
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_ATTEND_BACKWARD_CUH_
