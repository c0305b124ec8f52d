// What parts leave in the scratch, and how they are merged.
#ifndef KERNELS_CUDA_DECODE_PARTS_CUH_
#define KERNELS_CUDA_DECODE_PARTS_CUH_

#include <cstdint>

#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/grid_order.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The scratch of a (row, kv head).
struct ScratchPlace {
  char* base;
  const DecodeScratch& layout;

  __device__ ScratchPlace(void* scratch, const DecodeScratch& scratch_layout, int64_t index)
      : base(static_cast<char*>(scratch) + index * scratch_layout.bytes), layout(scratch_layout) {}

  __device__ int32_t* counter() const { return reinterpret_cast<int32_t*>(base + layout.counter); }
  __device__ float* floats(int64_t offset) const { return reinterpret_cast<float*>(base + offset); }
  __device__ int32_t* best_blocks() const {
    return reinterpret_cast<int32_t*>(base + layout.best_blocks);
  }
  __device__ float2* stats(const DecodePartsLayout& parts) const {
    return reinterpret_cast<float2*>(base + parts.stats);
  }
  __device__ float* o(const DecodePartsLayout& parts) const { return floats(parts.o); }
};

// 16 heads of a row.
struct RowHeads {
  int32_t row;
  int32_t kv_head;
  int32_t first;    // of the group
  int32_t count;    // up to 16
  int32_t first_q;  // of q

  __device__ RowHeads(const AttentionDims& dims, int32_t row_of_heads, int32_t kv_head_of_heads,
                      int32_t head_tile)
      : row(row_of_heads), kv_head(kv_head_of_heads), first(head_tile * kDecodeTileHeads) {
    const int32_t group_size = dims.num_q_heads / dims.num_kv_heads;
    count = min(kDecodeTileHeads, group_size - first);
    first_q = kv_head * group_size + first;
  }
  __device__ int64_t row_head(const AttentionDims& dims) const {
    return int64_t{row} * dims.num_kv_heads + kv_head;
  }
};

// Counts the CTA's arrival. The last of `num_arrivals` is told so, sees what the others wrote
// before, and has set the counter to 0. All threads; `flag` is shared.
__device__ inline bool ArrivesLast(int32_t* counter, int32_t num_arrivals, int32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool is_last = AddInOrder(counter, 1) == num_arrivals - 1;
    if (is_last) *counter = 0;
    *flag = is_last ? 1 : 0;
  }
  __syncthreads();
  return *flag != 0;
}

// What the parts of a branch count for 16 heads: o is the sum of weight * o of the parts. stats
// [num_parts,stride] from the first of the heads on; weights [num_parts,16] and lse [16], in units
// of log2, are shared. All threads; to be followed by __syncthreads.
__device__ inline void WeighParts(const float2* stats, int32_t num_parts, int32_t stride,
                                  float* weights, float* lse) {
  constexpr int kPerLane = kMaxDecodeParts / 32;
  const int32_t lane = threadIdx.x % 32, num_warps = static_cast<int32_t>(blockDim.x) / 32;
  for (int32_t head = threadIdx.x / 32; head < kDecodeTileHeads; head += num_warps) {
    float2 part[kPerLane];
    float max = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t index = lane + 32 * i;
      part[i] =
          index < num_parts ? __ldcg(stats + index * stride + head) : make_float2(-INFINITY, 0.0f);
      max = fmaxf(max, part[i].x);
    }
    for (int mask = 1; mask < 32; mask *= 2) {
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      part[i].x = lane + 32 * i < num_parts ? Exp2(part[i].x - max) : 0.0f;
      sum += part[i].x * part[i].y;
    }
    for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
    const float inverse = __fdividef(1.0f, sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (lane + 32 * i < num_parts) weights[(lane + 32 * i) * 16 + head] = part[i].x * inverse;
    }
    if (lane == 0) lse[head] = num_parts > 0 ? max + Log2(sum) : -INFINITY;
  }
}

// sum += weight * eight values.
__device__ __forceinline__ void AddPart(const float* from, float weight, float (&sum)[8]) {
  const float4 low = __ldcg(reinterpret_cast<const float4*>(from));
  const float4 high = __ldcg(reinterpret_cast<const float4*>(from) + 1);
  const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int e = 0; e < 8; ++e) sum[e] = fmaf(weight, values[e], sum[e]);
}

// Adds up eight values of a head of 16 from the parts: o [num_parts] at a distance of part_stride;
// weights as of WeighParts.
__device__ __forceinline__ void MergeParts(const float* o, int32_t num_parts, int64_t part_stride,
                                           const float* weights, int32_t head, float (&sum)[8]) {
  constexpr int kBatch = 8;  // loads that are on their way together
  for (int32_t first = 0; first < num_parts; first += kBatch) {
#pragma unroll
    for (int32_t i = 0; i < kBatch; ++i) {
      // What is not there counts nothing, without a branch.
      const int32_t part = min(first + i, num_parts - 1);
      AddPart(o + part * part_stride, first + i < num_parts ? weights[part * 16 + head] : 0.0f,
              sum);
    }
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_PARTS_CUH_
