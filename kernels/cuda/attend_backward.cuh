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
  float gate;      // g
  float mean_dp;   // dO . o = D / g, the mean of dP = dO V^T under P; 0 where g is
};

__device__ __forceinline__ RowStatistics LoadStatistics(const OutputGradients& outputs,
                                                        int64_t index) {
  const float gate = outputs.gate[index], delta = outputs.delta[index];
  return {outputs.lse[index] * 1.4426950408889634f, gate,
          gate != 0.0f ? __fdividef(delta, gate) : 0.0f};
}

// g * P, from a logit without its scale. Each product is rounded by itself, here and below, so that
// a row has the same bits wherever it is computed.
__device__ __forceinline__ float GatedProbability(float logit, float scale_log2, float lse_log2,
                                                  float gate) {
  return __fmul_rn(gate, Exp2(__fmaf_rn(logit, scale_log2, -lse_log2)));
}

// dS = P * (g * dP - D)
__device__ __forceinline__ float LogitGradient(float gated_probability, float dp, float mean_dp) {
  return __fmul_rn(gated_probability, __fsub_rn(dp, mean_dp));
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_ATTEND_BACKWARD_CUH_
