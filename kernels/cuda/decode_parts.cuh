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

  __device__ RowHeads(const DecodeScratch& layout, int32_t row_of_heads, int32_t kv_head_of_heads,
                      int32_t head_tile)
      : row(row_of_heads),
        kv_head(kv_head_of_heads),
        first(head_tile * kDecodeTileHeads),
        count(min(kDecodeTileHeads, layout.group_size - first)),
        first_q(kv_head * layout.group_size + first) {}
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

// What the parts of a branch count for a head of 16: o is the sum of weight * o of the parts. A
// warp takes a head; stats [num_parts,stride] are those of the heads.
class PartWeights {
 public:
  __device__ __forceinline__ PartWeights(const float2* stats, int32_t num_parts, int32_t stride,
                                         int32_t head)
      : num_parts_(num_parts), head_(head) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t part = static_cast<int32_t>(threadIdx.x) % 32 + 32 * i;
      parts_[i] = make_float2(-INFINITY, 0.0f);
      if (part < num_parts) parts_[i] = __ldcg(stats + part * stride + head);
    }
  }
  // weights [num_parts,16] and lse [16], in units of log2, are shared.
  __device__ __forceinline__ void Store(float* weights, float* lse) const {
    const int32_t lane = threadIdx.x % 32;
    float max = -INFINITY, sum = 0.0f, of_lane[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) max = fmaxf(max, parts_[i].x);
    for (int mask = 1; mask < 32; mask *= 2) {
      max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      of_lane[i] = 0.0f;
      if (lane + 32 * i < num_parts_) of_lane[i] = Exp2(parts_[i].x - max);
      sum = fmaf(of_lane[i], parts_[i].y, sum);
    }
    for (int mask = 1; mask < 32; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
    const float inverse = __fdividef(1.0f, sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int32_t part = lane + 32 * i;
      if (part < num_parts_) weights[part * kDecodeTileHeads + head_] = of_lane[i] * inverse;
    }
    if (lane == 0) lse[head_] = num_parts_ > 0 ? max + Log2(sum) : -INFINITY;
  }

 private:
  static constexpr int kPerLane = kMaxDecodeParts / 32;

  const int32_t num_parts_, head_;
  float2 parts_[kPerLane];  // (max, sum)
};

// Of 16 heads, by kThreads threads. To be followed by __syncthreads.
template <int kThreads>
__device__ __forceinline__ void WeighParts(const float2* stats, int32_t num_parts, int32_t stride,
                                           float* weights, float* lse) {
  constexpr int kWarps = kThreads / 32, kHeads = kDecodeTileHeads / kWarps;  // of a warp
  static_assert(kWarps * kHeads == kDecodeTileHeads);
  const int32_t first = static_cast<int32_t>(threadIdx.x) / 32 * kHeads;
  if constexpr (kHeads == 2) {
    const PartWeights low(stats, num_parts, stride, first);
    const PartWeights high(stats, num_parts, stride, first + 1);
    low.Store(weights, lse);
    high.Store(weights, lse);
  } else {
    static_assert(kHeads == 1);
    PartWeights(stats, num_parts, stride, first).Store(weights, lse);
  }
}

// Eight values of a head of 16 in some parts, on their way together.
template <int kParts>
class PartValues {
 public:
  // Parts from `first` on: o [num_parts] at a distance of part_stride. At least one part exists.
  __device__ __forceinline__ PartValues(const float* o, int32_t first, int32_t num_parts,
                                        int64_t part_stride)
      : first_(first), num_parts_(num_parts) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      // What is not there counts nothing, without a branch.
      const auto* const from =
          reinterpret_cast<const float4*>(o + max(min(first + i, num_parts - 1), 0) * part_stride);
      low_[i] = __ldcg(from);
      high_[i] = __ldcg(from + 1);
    }
  }
  // weights as of PartWeights.
  __device__ __forceinline__ void AddTo(const float* weights, int32_t head, float (&sum)[8]) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (first_ + i >= num_parts_) break;
      const float weight = weights[(first_ + i) * kDecodeTileHeads + head];
      const float values[8] = {low_[i].x,  low_[i].y,  low_[i].z,  low_[i].w,
                               high_[i].x, high_[i].y, high_[i].z, high_[i].w};
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[e] = fmaf(weight, values[e], sum[e]);
    }
  }

 private:
  const int32_t first_, num_parts_;
  float4 low_[kParts], high_[kParts];
};

// Adds up eight values of a head of 16 from parts `first` on.
__device__ __forceinline__ void MergeParts(const float* o, int32_t first, int32_t num_parts,
                                           int64_t part_stride, const float* weights, int32_t head,
                                           float (&sum)[8]) {
  constexpr int kBatch = 8;
  for (; first < num_parts; first += kBatch) {
    PartValues<kBatch>(o, first, num_parts, part_stride).AddTo(weights, head, sum);
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_PARTS_CUH_
