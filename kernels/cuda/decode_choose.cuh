// DecodeSelect, its second kernel: the blocks' importance and the best n, from what the first has
// left of each 16 summaries; and o_cmp, merged from the parts, beside it.
//
// Blocks that are not forced are cut into chunks, one for each CTA that has enough of them. A CTA
// takes the best of its chunk, and the last of a (row, kv head) to arrive the best of those.
#ifndef KERNELS_CUDA_DECODE_CHOOSE_CUH_
#define KERNELS_CUDA_DECODE_CHOOSE_CUH_

#include <cstdint>

#include "kernels/cuda/cta_scan.cuh"
#include "kernels/cuda/decode_parts.cuh"
#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/grid_order.cuh"
#include "kernels/cuda/score_select_best.cuh"

namespace nsa::kernels::cuda {

constexpr int kChooseThreads = 256;
constexpr int kChooseCtas = 2;  // of one SM
// Blocks whose scores are made at a time: with fewer one CTA is as fast alone as several, which
// have half as many each.
constexpr int32_t kChunkBlocks = 1024;

// Shared memory of a CTA.
struct ChooseShared {
  static constexpr int kBits = 11;  // of a key, that the search looks at together
  static constexpr int32_t kSearchBytes = 4 << kBits;

  char* memory;
  int32_t num_heads, places, num_selected, batch_groups;

  __host__ __device__ ChooseShared(const AttentionDims& dims, const DecodeScratch& layout,
                                   char* shared)
      : memory(shared),
        num_heads(layout.num_heads),
        places(layout.places),
        num_selected(dims.num_selected_blocks) {
    batch_groups = (kChunkBlocks * layout.strides + layout.overlap) / kDecodeWarpKeys + 2;
  }

  // Weights of parts [kMaxDecodeParts][16], then what a search counts.
  __host__ __device__ char* search() const { return memory; }
  // For scans and what a search has found [32].
  __host__ __device__ int32_t* words() const {
    return reinterpret_cast<int32_t*>(memory + kSearchBytes);
  }
  __host__ __device__ float* lse() const {  // [num_heads]
    return reinterpret_cast<float*>(words() + 32);
  }
  // What the groups that reach kChunkBlocks blocks give them [batch_groups,places].
  __host__ __device__ float* reach() const { return lse() + num_heads; }
  __host__ __device__ int32_t* list() const {  // [n]
    return reinterpret_cast<int32_t*>(reach() + batch_groups * places);
  }
  __host__ __device__ float* scores() const {  // of a chunk, where they fit
    return reinterpret_cast<float*>(list() + num_selected);
  }
  __host__ int32_t BytesBeforeScores() const {
    return static_cast<int32_t>(reinterpret_cast<char*>(scores()) - memory);
  }
};

// The best `count` of `num` scores, of equal ones the first; fewer than all of them. Arguments are
// plain, so that a call takes them in registers.
struct Chooser {
  char* search;
  int32_t* words;
  const float* scores;  // in shared or global memory
  int32_t num, count;
  int32_t* to;  // shared

  // If they are few and stand out; else returns false. As many groups of threads have one that is
  // no worse than the count-th best of the groups' best; what is no worse than that is ranked one
  // by one.
  __device__ __forceinline__ bool ChooseFew() const {
    constexpr int32_t kGroups = 64, kPerGroup = kChooseThreads / kGroups, kMost = 256;
    if (count > kGroups) return false;
    auto* const best = reinterpret_cast<uint32_t*>(search);            // [kGroups]
    auto* const keys = reinterpret_cast<uint64_t*>(best + kGroups);    // [kMost]
    auto* const is_chosen = reinterpret_cast<int32_t*>(keys + kMost);  // [kMost]
    uint32_t top = 0;
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < num; i += kChooseThreads) top = max(top, KeyOf(i));
#pragma unroll
    for (int mask = 1; mask < kPerGroup; mask *= 2) {
      top = max(top, __shfl_xor_sync(kFullWarp, top, mask));
    }
    if (threadIdx.x % kPerGroup == 0) best[threadIdx.x / kPerGroup] = top;
    if (threadIdx.x == 0) words[0] = 0;
    __syncthreads();
    if (threadIdx.x < kGroups) {
      const uint32_t mine = best[threadIdx.x];
      int32_t rank = 0;
#pragma unroll 16
      for (int32_t i = 0; i < kGroups; ++i) {
        rank +=
            best[i] > mine || (best[i] == mine && i < static_cast<int32_t>(threadIdx.x)) ? 1 : 0;
      }
      if (rank == count - 1) words[1] = static_cast<int32_t>(mine);
    }
    __syncthreads();
    const auto least = max(static_cast<uint32_t>(words[1]), 1u);
#pragma unroll 4
    for (int32_t i = threadIdx.x; i < num; i += kChooseThreads) {
      const uint32_t key = KeyOf(i);
      if (key < least) continue;
      const int32_t place = atomicAdd(words, 1);
      if (place < kMost) keys[place] = static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(i);
    }
    __syncthreads();
    const int32_t num_keys = words[0], mine = threadIdx.x;
    if (num_keys > kMost) return false;
    if (mine < num_keys) {
      int32_t rank = 0;
      for (int32_t i = 0; i < num_keys; ++i) rank += keys[i] > keys[mine] ? 1 : 0;
      is_chosen[mine] = rank < count ? 1 : 0;
    }
    __syncthreads();
    if (mine < num_keys && is_chosen[mine] != 0) {
      const auto number_of = [&](int32_t i) { return ~static_cast<uint32_t>(keys[i]); };
      int32_t place = 0;
      for (int32_t i = 0; i < num_keys; ++i) {
        place += is_chosen[i] != 0 && number_of(i) < number_of(mine) ? 1 : 0;
      }
      to[place] = static_cast<int32_t>(number_of(mine));
    }
    return true;
  }

  // In any case, by a search for the last one's key, 11 bits at a time.
  __device__ __forceinline__ void Choose() const {
    constexpr int kBits = ChooseShared::kBits, kDigits = 1 << kBits;
    constexpr int kPerThread = kDigits / kChooseThreads;
    auto* const counts = reinterpret_cast<int32_t*>(search);
    uint32_t known = 0;    // of the last key that is chosen
    int32_t left = count;  // to choose of those that share `known`
    for (int32_t shift = 32 - kBits; shift > -kBits; shift -= kBits) {
      const int32_t low = max(shift, 0), bits = kBits - (low - shift);
      for (int32_t i = threadIdx.x; i < kDigits; i += kChooseThreads) counts[i] = 0;
      __syncthreads();
#pragma unroll 4
      for (int32_t i = threadIdx.x; i < num; i += kChooseThreads) {
        const uint32_t key = KeyOf(i);
        if ((static_cast<uint64_t>(key) >> (low + bits)) == known) {
          atomicAdd(counts + (key >> low & ((1u << bits) - 1)), 1);
        }
      }
      __syncthreads();
      // From the greatest digit on.
      const int32_t top = kDigits - 1 - static_cast<int32_t>(threadIdx.x) * kPerThread;
      int32_t sum = 0, total;
#pragma unroll
      for (int32_t i = 0; i < kPerThread; ++i) sum += counts[top - i];
      int32_t better = ScanBefore<kChooseThreads>(sum, words, total);
      if (better < left && better + sum >= left) {
        int32_t digit = top;
        for (; better + counts[digit] < left; --digit) better += counts[digit];
        words[kDigitWord] = digit;
        words[kDigitWord + 1] = left - better;
      }
      __syncthreads();
      known = known << bits | static_cast<uint32_t>(words[kDigitWord]);
      left = words[kDigitWord + 1];
    }
    // Each thread has some in a row; of equal ones the first are chosen.
    const int32_t per_thread = (num + kChooseThreads - 1) / kChooseThreads;
    const int32_t first = min(static_cast<int32_t>(threadIdx.x) * per_thread, num);
    const int32_t last = min(first + per_thread, num);
    int32_t num_better = 0, num_equal = 0, total;
#pragma unroll 4
    for (int32_t i = first; i < last; ++i) {
      const uint32_t key = KeyOf(i);
      num_better += key > known ? 1 : 0;
      num_equal += key == known ? 1 : 0;
    }
    const int32_t better_before = ScanBefore<kChooseThreads>(num_better, words, total);
    int32_t equal = ScanBefore<kChooseThreads>(num_equal, words, total);
    int32_t place = better_before + min(equal, left);
    for (int32_t i = first; i < last; ++i) {
      const uint32_t key = KeyOf(i);
      if (key > known || (key == known && equal++ < left)) to[place++] = i;
    }
  }

  __device__ uint32_t KeyOf(int32_t i) const { return ScoreKey(scores[i]); }

  static constexpr int kDigitWord = kChooseThreads / 32;  // behind what scans use
};

// Writes their numbers in ascending order. All threads, which have met at a barrier since the
// scores were written; to be followed by __syncthreads.
__device__ __noinline__ inline void ChooseBest(char* search, int32_t* words, const float* scores,
                                               int32_t num, int32_t count, int32_t* to) {
  const Chooser chooser{search, words, scores, num, count, to};
  if (chooser.ChooseFew()) return;
  __syncthreads();
  chooser.Choose();
}

// NSA equations 9 and 10 for select blocks [begin, end): what groups of summaries give to them,
// over the heads, each by 2^(maximum of the group - lse). scores [end - begin]. All threads.
__device__ inline void MakeScores(const ScratchPlace& scratch, const ChooseShared& shared,
                                  int32_t num_summaries, int32_t begin, int32_t end,
                                  float* scores) {
  constexpr int kAtOnce = 2, kBatch = 5;  // groups and places whose loads are on their way together
  constexpr int32_t kStep = kChooseThreads / 4, kLogWarpKeys = 4;
  static_assert(1 << kLogWarpKeys == kDecodeWarpKeys);
  const DecodeScratch& layout = scratch.layout;
  const int32_t num_heads = layout.num_heads, places = layout.places;
  const int32_t group_size = layout.group_size;
  const int32_t strides = layout.strides, overlap = layout.overlap;
  const int32_t lane = threadIdx.x % 4;
  const float* const maxima = scratch.floats(layout.maxima);
  const float* const reach = scratch.floats(layout.reach);
  const float* const lse = shared.lse();
  const auto first_group = [&](int32_t block) {
    return max(block * strides - overlap + 1, 0) >> kLogWarpKeys;
  };
  const auto end_group = [&](int32_t block) {  // of the groups that reach it
    return (min((block + 1) * strides, num_summaries) + kDecodeWarpKeys - 1) >> kLogWarpKeys;
  };
  for (int32_t first = begin; first < end; first += kChunkBlocks) {
    const int32_t last = min(first + kChunkBlocks, end);
    const int32_t origin = first_group(first), num_groups = end_group(last - 1) - origin;
    __syncthreads();  // `reach` has been read
    // Four lanes take a group, 4 of 16 heads each.
    for (int32_t i = threadIdx.x / 4; i < (num_groups + 7) / 8 * 8; i += kAtOnce * kStep) {
      for (int32_t batch = 0; batch < places; batch += kBatch) {
        float sums[kAtOnce][kBatch] = {};
        for (int32_t head = lane * 4; head < num_heads; head += kDecodeTileHeads) {
          float4 max[kAtOnce], values[kAtOnce][kBatch];
#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) {
            const int64_t of_group =
                int64_t{origin + min(i + t * kStep, num_groups - 1)} * num_heads;
            max[t] = __ldcg(reinterpret_cast<const float4*>(maxima + of_group + head));
            const float* const of_places = reach + of_group * places + head;
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
              values[t][u] = __ldcg(reinterpret_cast<const float4*>(
                  of_places + min(batch + u, places - 1) * num_heads));
            }
          }
          const auto factor_of = [&](float group_max, int32_t h) {
            return h < group_size ? Exp2(group_max - lse[h]) : 0.0f;
          };
#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) {
            const float4 factor =
                make_float4(factor_of(max[t].x, head), factor_of(max[t].y, head + 1),
                            factor_of(max[t].z, head + 2), factor_of(max[t].w, head + 3));
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
              const float4& value = values[t][u];
              sums[t][u] = fmaf(value.x, factor.x,
                                fmaf(value.y, factor.y,
                                     fmaf(value.z, factor.z, fmaf(value.w, factor.w, sums[t][u]))));
            }
          }
        }
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
          for (int u = 0; u < kBatch; ++u) {
            float sum = sums[t][u];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
            if (lane == 0 && i + t * kStep < num_groups && batch + u < places) {
              shared.reach()[(i + t * kStep) * places + batch + u] = sum;
            }
          }
        }
      }
    }
    __syncthreads();
    for (int32_t block = first + static_cast<int32_t>(threadIdx.x); block < last;
         block += kChooseThreads) {
      float score = 0.0f;
      if (strides == 4 && overlap == 2) {
        // Of its own group, and the first of four of the group before.
        const int32_t group = block / 4, place = (group - origin) * places + block % 4;
        if (block % 4 == 0 && group > 0) score = shared.reach()[place - 1];
        if (group < end_group(block)) score += shared.reach()[place];
        scores[block - begin] = score;
        continue;
      }
      for (int32_t group = first_group(block); group < end_group(block); ++group) {
        score += shared.reach()[(group - origin) * places + block - layout.FirstReached(group)];
      }
      scores[block - begin] = score;
    }
  }
}

constexpr int32_t MostChunks(int32_t blocks) {
  return blocks <= kChunkBlocks ? 1 : (2 * blocks + kChunkBlocks - 1) / kChunkBlocks;
}

// Chunk `index` of how many; CTAs from `count` on have none.
struct Chunk {
  int32_t begin, end;  // blocks
  int32_t count;

  __device__ Chunk(const AttentionDims& dims, int32_t num_candidates, int32_t num_free,
                   int32_t num_choosers, int32_t index) {
    const int32_t first = dims.num_initial_blocks;
    const int32_t size = num_candidates - dims.num_local_blocks - first;
    // Each has more blocks than are chosen.
    count = num_free <= kChunkBlocks / 4 ? min(num_choosers, MostChunks(size)) : 1;
    const int32_t each = Quotient(size, count), more = size - each * count;
    begin = first + each * index + min(index, more);
    end = begin + each + (index < more ? 1 : 0);
  }
};

// Chooses the blocks of a (row, kv head). All threads.
__device__ inline void ChooseBlocks(const DecodeSelectParams& params, const ScratchPlace& scratch,
                                    const ChooseShared& shared, const DecodeRow& row,
                                    int64_t row_head, int32_t num_choosers, int32_t scores_bytes) {
  const AttentionDims& dims = params.dims;
  const DecodeScratch& layout = scratch.layout;
  const int32_t n = dims.num_selected_blocks, num_initial = dims.num_initial_blocks;
  const int32_t num_candidates = NumCandidates(dims, row.position);
  const int32_t num_free = n - num_initial - dims.num_local_blocks;
  int32_t* const list = shared.list();
  if (num_candidates <= n || num_free == 0) {
    if (blockIdx.x != 0) return;
    for (int32_t i = threadIdx.x; i < n; i += kChooseThreads) {
      list[i] = num_candidates <= n ? (i < num_candidates ? i : -1)
                                    : (i < num_initial ? i : num_candidates - n + i);
    }
  } else {
    const Chunk chunk(dims, num_candidates, num_free, num_choosers, blockIdx.x);
    if (static_cast<int32_t>(blockIdx.x) >= chunk.count) return;
    const DecodeKeys keys = SummaryKeys(dims, row.position);
    for (int32_t first = 0; first < layout.num_heads; first += kDecodeTileHeads) {
      WeighParts<kChooseThreads>(scratch.stats(layout.cmp) + first, keys.num_parts(),
                                 layout.num_heads, reinterpret_cast<float*>(shared.search()),
                                 shared.lse() + first);
    }
    const int32_t size = chunk.end - chunk.begin;
    float* const scores =
        size * 4 <= scores_bytes ? shared.scores() : scratch.floats(layout.scores) + chunk.begin;
    MakeScores(scratch, shared, keys.end, chunk.begin, chunk.end, scores);
    __syncthreads();
    int32_t* const free = list + num_initial;
    ChooseBest(shared.search(), shared.words(), scores, size, num_free, free);
    __syncthreads();
    if (chunk.count == 1) {
      for (int32_t i = threadIdx.x; i < num_free; i += kChooseThreads) free[i] += chunk.begin;
    } else {
      float* const best_scores = scratch.floats(layout.best_scores);
      int32_t* const best_blocks = scratch.best_blocks();
      for (int32_t i = threadIdx.x; i < num_free; i += kChooseThreads) {
        best_scores[blockIdx.x * num_free + i] = scores[free[i]];
        best_blocks[blockIdx.x * num_free + i] = chunk.begin + free[i];
      }
      if (!ArrivesLast(scratch.counter(), chunk.count, shared.words() + 31)) return;
      const int32_t num_best = chunk.count * num_free;
      float* to_choose = best_scores;
      if (num_best * 4 <= scores_bytes) {
        to_choose = shared.scores();
        for (int32_t i = threadIdx.x; i < num_best; i += kChooseThreads) {
          to_choose[i] = __ldcg(best_scores + i);
        }
        __syncthreads();
      }
      ChooseBest(shared.search(), shared.words(), to_choose, num_best, num_free, free);
      __syncthreads();
      for (int32_t i = threadIdx.x; i < num_free; i += kChooseThreads) {
        free[i] = __ldcg(best_blocks + free[i]);
      }
    }
    for (int32_t i = threadIdx.x; i < n; i += kChooseThreads) {
      if (i < num_initial) list[i] = i;
      if (i >= num_initial + num_free) list[i] = num_candidates - n + i;
    }
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < n; i += kChooseThreads) {
    params.block_indices[row_head * n + i] = list[i];
  }
}

// Merges the compressed branch for 16 heads. All threads.
__device__ inline void MergeCompressed(const DecodeSelectParams& params,
                                       const ScratchPlace& scratch, const ChooseShared& shared,
                                       const RowHeads& heads, int32_t num_parts) {
  const AttentionDims& dims = params.dims;
  const DecodeScratch& layout = scratch.layout;
  auto* const weights = reinterpret_cast<float*>(shared.search());
  float* const lse = shared.lse();
  WeighParts<kChooseThreads>(scratch.stats(layout.cmp) + heads.first, num_parts, layout.num_heads,
                             weights, lse);
  __syncthreads();
  const int32_t pieces = dims.head_dim_v / 8;
  for (int32_t i = threadIdx.x; i < heads.count * pieces; i += kChooseThreads) {
    const int32_t head = Quotient(i, pieces), dim = (i - head * pieces) * 8;
    const int32_t place = (heads.first + head) * dims.head_dim_v + dim;
    const int32_t q_head = heads.first_q + head;
    float sum[8] = {};
    MergeParts(scratch.o(layout.cmp) + place, 0, num_parts,
               int64_t{layout.num_heads} * dims.head_dim_v, weights, head, sum);
    auto* const to = reinterpret_cast<float4*>(scratch.floats(layout.merged) + place);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    if (params.o_cmp.data != nullptr) {
      StoreFloats(dims.dtype, params.o_cmp.data,
                  heads.row * params.o_cmp.row_stride + q_head * params.o_cmp.head_stride + dim,
                  sum);
    }
    if (params.lse_cmp != nullptr && dim == 0) {
      params.lse_cmp[int64_t{heads.row} * dims.num_q_heads + q_head] = lse[head] * kLn2;
    }
  }
}

// Grid: (num_choosers + head tiles, Hkv, rows). kOverlaps: launched while the kernel
// before may still run (LaunchAfter).
template <bool kOverlaps>
__global__ void __launch_bounds__(kChooseThreads, kChooseCtas)
    DecodeChooseKernel(const __grid_constant__ DecodeSelectParams params,
                       const __grid_constant__ DecodeScratch layout, int32_t num_choosers,
                       int32_t scores_bytes) {
  extern __shared__ __align__(128) char memory[];
  if constexpr (kOverlaps) LetNextGridStart();
  const AttentionDims& dims = params.dims;
  const DecodeRow row = params.rows[blockIdx.z];
  // Also who has nothing to do: who waits for this grid waits for the one before, too.
  if constexpr (kOverlaps) WaitForGridBefore();
  if (row.sequence < 0) return;
  const ChooseShared shared(dims, layout, memory);
  const int64_t row_head = int64_t{blockIdx.z} * dims.num_kv_heads + blockIdx.y;
  const ScratchPlace scratch(params.scratch, layout, row_head);
  const int32_t head_tile = static_cast<int32_t>(blockIdx.x) - num_choosers;
  if (head_tile >= 0) {
    MergeCompressed(params, scratch, shared, RowHeads(layout, blockIdx.z, blockIdx.y, head_tile),
                    SummaryKeys(dims, row.position).num_parts());
  } else {
    ChooseBlocks(params, scratch, shared, row, row_head, num_choosers, scores_bytes);
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_CHOOSE_CUH_
