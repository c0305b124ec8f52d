// DecodeSelect, its first kernel: compressed attention of new tokens, and what each select block
// gets of it.
//
// Parts are those of the summaries. Beside o and statistics each warp leaves, of its 16 summaries,
// what each block that they reach gets of each head, relative to the maximum so far: which sums the
// blocks' importance is made of is known when all parts are done (decode_choose.cuh).
#ifndef KERNELS_CUDA_DECODE_SELECT_CUH_
#define KERNELS_CUDA_DECODE_SELECT_CUH_

#include <cstdint>

#include "kernels/cuda/decode_stream.cuh"

namespace nsa::kernels::cuda {

// What 16 summaries give to select blocks [places,num_heads], from the first of 16 heads on; from
// probabilities as WarpAttention leaves them. For blocks of 4 strides and summaries of 2: of what a
// lane has, keys 4j to 4j + 2 count twice for block j, and key 4j + 3 once, and once for the next.
__device__ __forceinline__ void StoreReachOf4(const float (&p)[2][4], int32_t num_heads,
                                              float* reach) {
  const int32_t lane = threadIdx.x % 32, c = lane % 4;
  const bool is_odd = c % 2 != 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum[2], before[2];
#pragma unroll
    for (int o = 0; o < 2; ++o) {
      const float p0 = p[o][2 * r], p1 = p[o][2 * r + 1];
      sum[o] = fmaf(2.0f, p0, is_odd ? p1 : 2.0f * p1);
      sum[o] += __shfl_xor_sync(kFullWarp, sum[o], 1);
      before[o] = __shfl_sync(kFullWarp, p1, (lane & ~3) | ((c + 3) % 4));
    }
    float* const to = reach + lane / 4 + 8 * r;
    if (c == 0) {
      to[0] = sum[0];
      to[2 * num_heads] = sum[1] + before[0];
      to[4 * num_heads] = before[1];
    } else if (c == 2) {
      to[num_heads] = sum[0] + before[0];
      to[3 * num_heads] = sum[1] + before[1];
    }
  }
}

// The same for any blocks, through shared memory [16][kPStride] of the warp.
__device__ inline void StoreReach(const DecodeScratch& layout, const float (&p)[2][4],
                                  int32_t first, float* shared, float* reach) {
  const int32_t strides = layout.strides, overlap = layout.overlap;
  const int32_t first_block = layout.FirstReached(first / kDecodeWarpKeys);
  const int32_t lane = threadIdx.x % 32, head = lane % 16;
  __syncwarp();  // what was there has been read
#pragma unroll
  for (int o = 0; o < 2; ++o) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float* const to = shared + (lane / 4 + 8 * r) * StreamShared::kPStride + o * 8 + lane % 4 * 2;
      to[0] = p[o][2 * r];
      to[1] = p[o][2 * r + 1];
    }
  }
  __syncwarp();
  const float* const of_head = shared + head * StreamShared::kPStride;
  for (int32_t j = lane / 16; j < layout.places; j += 2) {
    const int32_t begin = (first_block + j) * strides - first, end = begin + strides;
    float sum = 0.0f;
    for (int32_t i = max(0, begin - overlap + 1); i < min(end, kDecodeWarpKeys); ++i) {
      const int32_t times = min(i + overlap, end) - max(i, begin);
      sum = fmaf(static_cast<float>(times), of_head[i], sum);
    }
    reach[j * layout.num_heads + head] = sum;
  }
}

struct SummaryWork {
  static constexpr KeyLayout kLayout = KeyLayout::kRows;
  static constexpr bool kGivesPages = true;

  const DecodeSelectParams& params;
  const DecodeScratch& layout;

  __device__ static int32_t NumParts(const AttentionDims& dims, int32_t position) {
    return SummaryKeys(dims, position).num_parts();
  }
  __device__ static void Locate(const AttentionDims& dims, StreamPart& part) {
    part.Take(SummaryKeys(dims, part.position), part.part);
  }
  __device__ int32_t Block(const StreamPart&, int32_t key) const {
    return key / kSummaryPageBlocks;
  }
  __device__ const char* Page(const StreamPart& part, int32_t block) const {
    return static_cast<const char*>(
        params.tables.summaries[part.sequence * params.tables.max_summary_pages + block]);
  }
  __device__ WarpKeys Keys(const StreamPart& part, int32_t key, const char* page) const {
    const AttentionDims& dims = params.dims;
    const int64_t k_bytes = dims.num_kv_heads * dims.head_dim_qk * 2;
    const int64_t v_bytes = dims.num_kv_heads * dims.head_dim_v * 2;
    const char* const row = page + key % kSummaryPageBlocks * (k_bytes + v_bytes);
    return {row + part.kv_head * dims.head_dim_qk * 2,
            row + k_bytes + part.kv_head * dims.head_dim_v * 2, k_bytes + v_bytes};
  }
  __device__ void SetPlaces(const StreamPart& part, const RowHeads& heads,
                            const ScratchPlace& scratch, StreamRound& round) const {
    const int64_t place = int64_t{part.part} * layout.num_heads + heads.first;
    round.maxima = scratch.floats(layout.maxima) + heads.first;
    round.reach = scratch.floats(layout.reach) + heads.first;
    round.stats = scratch.stats(layout.cmp) + place;
    round.o = scratch.o(layout.cmp) + place * params.dims.head_dim_v;
  }
  // max: of rows g and g + 8 of lane 4g + c.
  __device__ __forceinline__ void StoreKeys(const StreamRound& round, int32_t key, float max_low,
                                            float max_high, const float (&p)[2][4],
                                            float* shared) const {
    const int32_t lane = threadIdx.x % 32;
    const int64_t of_group = int64_t{key / kDecodeWarpKeys} * layout.num_heads;
    if (lane % 4 == 0) {
      round.maxima[of_group + lane / 4] = max_low;
      round.maxima[of_group + lane / 4 + 8] = max_high;
    }
    float* const reach = round.reach + of_group * layout.places;
    if (layout.strides == 4 && layout.overlap == 2) {
      StoreReachOf4(p, layout.num_heads, reach);
    } else {
      StoreReach(layout, p, key, shared, reach);
    }
  }
};

// kOverlaps: launched while the kernel before may still run (LaunchAfter).
template <class T, int kDk, int kDv, bool kOverlaps>
__global__ void __launch_bounds__(kStreamThreads<kDv>, 1)
    DecodeSelectKernel(const __grid_constant__ DecodeSelectParams params,
                       const __grid_constant__ DecodeScratch layout, int32_t num_stages) {
  if constexpr (kOverlaps) LetNextGridStart();
  const SummaryWork work{params, layout};
  StreamParts<T, kDk, kDv, kOverlaps>(work, num_stages);
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_SELECT_CUH_
