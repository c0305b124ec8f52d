// DecodeSelect: compressed attention of new tokens, importance, top-n; and the window beside it.
//
// A CTA owns (row, kv head, 16 heads, a part of the summaries or of the window), and takes one
// after another as long as there are. It leaves the part's o and statistics in the scratch, and of
// summaries what each select block gets of them, relative to the maximum so far. The CTA that is
// the last of a (row, kv head) to arrive knows the sums over all parts, and with them the
// importance of all blocks, from which it chooses: by a search for the n-th best key, 11 bits at a
// time.
//
// Shared memory: DecodeShared. For the choice, instead of V: factors of tiles and scores, where
// these fit (else they are in the scratch), and behind them instead of probabilities the counts.
#ifndef KERNELS_CUDA_DECODE_SELECT_CUH_
#define KERNELS_CUDA_DECODE_SELECT_CUH_

#include <cstdint>

#include "kernels/cuda/cta_scan.cuh"
#include "kernels/cuda/decode_tiles.cuh"
#include "kernels/cuda/grid_order.cuh"
#include "kernels/cuda/score_select_best.cuh"

namespace nsa::kernels::cuda {

// CTAs of one SM: enough loads on the way for its share of the memory's bandwidth.
constexpr int kDecodeSelectCtas = 3;

// One item of the grid.
struct SelectItem {
  int32_t row = -1;  // -1: there are no more
  int32_t part;      // of the summaries, and then of the window
  int32_t head_tile;
  int32_t kv_head;
};

// Items of a row by branch. A row without summaries has an item for them all the same, which makes
// its list.
__device__ inline int32_t NumSummaryItems(const AttentionDims& dims, int64_t position) {
  return max(1, SummaryKeys(dims, position).num_parts());
}

// All lanes of a warp.
__device__ inline SelectItem FindItem(const DecodeSelectParams& params, int64_t index) {
  const AttentionDims& dims = params.dims;
  const int32_t head_tiles = NumHeadTiles(dims);
  const auto parts_of = [&](int64_t position) {
    return NumSummaryItems(dims, position) + WindowKeys(dims, position).num_parts();
  };
  const auto run_at = [&](int32_t i) {
    const DecodeRow row = params.rows[i];
    if (row.sequence < 0) return BlockRun{i, 0, 0};
    return BlockRun{i, 0, int64_t{parts_of(row.position)} * head_tiles * dims.num_kv_heads};
  };
  const BlockGroup group = FindGroup(run_at, static_cast<int32_t>(params.num_rows), 1, index);
  SelectItem item;
  if (group.document < 0) return item;
  const int32_t parts = parts_of(params.rows[group.document].position);
  const auto in_row = static_cast<int32_t>(group.first_block);
  item.row = group.document;
  item.part = in_row % parts;
  item.head_tile = in_row / parts % head_tiles;
  item.kv_head = in_row / parts / head_tiles;
  return item;
}

// Adds up what the summaries of a tile give to select blocks, from the probabilities in p32.
// reach [blocks_per_tile,num_heads], from the first of the 16 heads on. All threads.
__device__ inline void StoreReach(const AttentionDims& dims, const DecodeScratch& layout,
                                  const float* p32, int32_t tile, int32_t num_summaries,
                                  float* reach) {
  const int32_t strides = dims.select_block_tokens / dims.compress_stride_tokens;
  const int32_t overlap = dims.compress_block_tokens / dims.compress_stride_tokens;
  const int32_t first = tile * kDecodeTileKeys;
  const int32_t count = min(kDecodeTileKeys, num_summaries - first);
  const int32_t first_block = first / strides;
  const int32_t head = threadIdx.x % 16;
  const float* const p = p32 + head * DecodeShared::kSumsStride;
  for (int32_t j = threadIdx.x / 16; j < layout.blocks_per_tile; j += kDecodeThreads / 16) {
    const int32_t begin = (first_block + j) * strides - first, end = begin + strides;
    float sum = 0.0f;
    for (int32_t i = max(0, begin - overlap + 1); i < min(end, count); ++i) {
      const int32_t times = min(i + overlap, end) - max(i, begin);
      sum = fmaf(static_cast<float>(times), p[i], sum);
    }
    reach[j * layout.num_heads + head] = sum;
  }
}

// The blocks of a (row, kv head), by the last CTA to arrive. All threads.
class Chooser {
 public:
  __device__ Chooser(const DecodeSelectParams& params, const ScratchPlace& scratch,
                     const DecodeShared& shared, int64_t position)
      : dims_(params.dims),
        scratch_(scratch),
        shared_(shared),
        keys_(SummaryKeys(params.dims, position)),
        num_candidates_(NumCandidates(params.dims, position)) {
    const int32_t num_factors = keys_.num_tiles() * scratch.layout.num_heads;
    factors_ = scratch.floats(scratch.layout.tile_max);
    scores_ = scratch.floats(scratch.layout.scores);
    if ((num_factors + num_candidates_) * 4 <= shared.values_bytes()) {
      factors_ = reinterpret_cast<float*>(shared.values());
      scores_ = factors_ + num_factors;
    }
  }

  __device__ void Run(int32_t* to) {
    const int32_t num_selected = dims_.num_selected_blocks;
    const int32_t num_free = num_selected - dims_.num_initial_blocks - dims_.num_local_blocks;
    if (num_candidates_ <= num_selected) {
      for (int32_t i = threadIdx.x; i < num_selected; i += kDecodeThreads) {
        to[i] = i < num_candidates_ ? i : -1;
      }
      return;
    }
    for (int32_t i = threadIdx.x; i < num_selected; i += kDecodeThreads) {
      if (i < dims_.num_initial_blocks) {
        to[i] = i;
      } else if (i >= dims_.num_initial_blocks + num_free) {
        to[i] = num_candidates_ - num_selected + i;
      }
    }
    if (num_free == 0) return;
    MakeFactors();
    MakeScores();
    __syncthreads();
    Choose(num_free, to + dims_.num_initial_blocks);
  }

 private:
  // 2^(maximum of the tile - lse), by tile and head; 0 where there is no head.
  __device__ void MakeFactors() {
    const int32_t num_heads = scratch_.layout.num_heads;
    const int32_t group_size = dims_.num_q_heads / dims_.num_kv_heads;
    const float* const tile_max = scratch_.floats(scratch_.layout.tile_max);
    for (int32_t first = 0; first < num_heads; first += kDecodeTileHeads) {
      __syncthreads();  // of the 16 heads before
      WeighParts(scratch_.stats(scratch_.layout.cmp) + first, keys_.num_parts(), num_heads,
                 reinterpret_cast<float*>(shared_.p()), shared_.of_heads());
      __syncthreads();
      const int32_t head = threadIdx.x % 16;
      const float lse = shared_.of_heads()[head];
#pragma unroll 4
      for (int32_t tile = threadIdx.x / 16; tile < keys_.num_tiles(); tile += kDecodeThreads / 16) {
        const int32_t place = tile * num_heads + first + head;
        factors_[place] = first + head < group_size ? Exp2(__ldcg(tile_max + place) - lse) : 0.0f;
      }
    }
    __syncthreads();
  }

  // NSA equations 9 and 10 of the blocks that are not forced.
  __device__ void MakeScores() {
    const DecodeScratch& layout = scratch_.layout;
    const int32_t strides = dims_.select_block_tokens / dims_.compress_stride_tokens;
    const int32_t overlap = dims_.compress_block_tokens / dims_.compress_stride_tokens;
    const float* const reach = scratch_.floats(layout.reach);
#pragma unroll 2
    for (int32_t block = begin() + threadIdx.x; block < end(); block += kDecodeThreads) {
      const int32_t first = max(block * strides - overlap + 1, 0) / kDecodeTileKeys;
      const int32_t last = min(block * strides + strides, keys_.end) - 1;
      float score = 0.0f;
      for (int32_t tile = first; tile * kDecodeTileKeys <= last; ++tile) {
        const int32_t place = block - tile * kDecodeTileKeys / strides;
        const auto* const from = reinterpret_cast<const float4*>(
            reach + (int64_t{tile} * layout.blocks_per_tile + place) * layout.num_heads);
        const auto* const factors =
            reinterpret_cast<const float4*>(factors_ + tile * layout.num_heads);
#pragma unroll 4
        for (int32_t i = 0; i < layout.num_heads / 4; ++i) {
          const float4 sums = __ldcg(from + i), factor = factors[i];
          score = fmaf(sums.x, factor.x, score);
          score = fmaf(sums.y, factor.y, score);
          score = fmaf(sums.z, factor.z, score);
          score = fmaf(sums.w, factor.w, score);
        }
      }
      scores_[block] = score;
    }
  }

  // Writes the `count` best blocks in ascending order.
  __device__ void Choose(int32_t count, int32_t* to) {
    constexpr int kBits = 11, kDigits = 1 << kBits, kPerThread = kDigits / kDecodeThreads;
    auto* const counts = reinterpret_cast<int32_t*>(shared_.p());
    int32_t* const words = shared_.words();  // [8] for scans, digit, how many are left to choose
    uint32_t known = 0;                      // of the last key that is chosen
    int32_t left = count;                    // to choose of those that share `known`
    for (int32_t shift = 32 - kBits; shift > -kBits; shift -= kBits) {
      const int32_t low = max(shift, 0), bits = kBits - (low - shift);
      for (int32_t i = threadIdx.x; i < kDigits; i += kDecodeThreads) counts[i] = 0;
      __syncthreads();
      for (int32_t block = begin() + threadIdx.x; block < end(); block += kDecodeThreads) {
        const uint32_t key = ScoreKey(scores_[block]);
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
      int32_t better = ScanBefore<kDecodeThreads>(sum, words, total);
      if (better < left && better + sum >= left) {
        int32_t digit = top;
        for (; better + counts[digit] < left; --digit) better += counts[digit];
        words[8] = digit;
        words[9] = left - better;
      }
      __syncthreads();
      known = known << bits | static_cast<uint32_t>(words[8]);
      left = words[9];
    }
    // Each thread has blocks in a row; of equal ones the first are chosen.
    const int32_t per_thread = (end() - begin() + kDecodeThreads - 1) / kDecodeThreads;
    const int32_t first = min(begin() + static_cast<int32_t>(threadIdx.x) * per_thread, end());
    const int32_t last = min(first + per_thread, end());
    int32_t num_better = 0, num_equal = 0, total;
    for (int32_t block = first; block < last; ++block) {
      const uint32_t key = ScoreKey(scores_[block]);
      num_better += key > known ? 1 : 0;
      num_equal += key == known ? 1 : 0;
    }
    const int32_t better_before = ScanBefore<kDecodeThreads>(num_better, words, total);
    int32_t equal = ScanBefore<kDecodeThreads>(num_equal, words, total);
    int32_t place = better_before + min(equal, left);
    for (int32_t block = first; block < last; ++block) {
      const uint32_t key = ScoreKey(scores_[block]);
      if (key > known || (key == known && equal++ < left)) to[place++] = block;
    }
  }

  // Blocks that are not forced.
  __device__ int32_t begin() const { return dims_.num_initial_blocks; }
  __device__ int32_t end() const { return num_candidates_ - dims_.num_local_blocks; }

  const AttentionDims& dims_;
  const ScratchPlace scratch_;
  const DecodeShared shared_;
  const DecodeKeys keys_;
  const int32_t num_candidates_;
  float* factors_;  // [tiles,heads]
  float* scores_;   // [blocks]
};

// o_cmp and lse_cmp of all heads of a (row, kv head), for a caller who looks. All threads.
template <class T>
__device__ void StoreCompressed(const DecodeSelectParams& params, const ScratchPlace& scratch,
                                const DecodeShared& shared, int64_t row, int32_t kv_head,
                                int32_t num_parts) {
  const AttentionDims& dims = params.dims;
  const int32_t group_size = dims.num_q_heads / dims.num_kv_heads;
  const int32_t num_heads = scratch.layout.num_heads, pieces = dims.head_dim_v / 4;
  for (int32_t first = 0; first < num_heads; first += kDecodeTileHeads) {
    auto* const weights = reinterpret_cast<float*>(shared.p());
    __syncthreads();
    WeighParts(scratch.stats(scratch.layout.cmp) + first, num_parts, num_heads, weights,
               shared.of_heads());
    __syncthreads();
    for (int32_t i = threadIdx.x; i < kDecodeTileHeads * pieces; i += kDecodeThreads) {
      const int32_t head = i / pieces, dim = i % pieces * 4;
      if (first + head >= group_size) break;
      const int32_t q_head = kv_head * group_size + first + head;
      if (params.o_cmp.data != nullptr) {
        StoreFour<T>(params.o_cmp, row, q_head, dim,
                     MergeParts(scratch.o(scratch.layout.cmp), num_parts,
                                int64_t{num_heads} * dims.head_dim_v, weights, head,
                                (first + head) * dims.head_dim_v + dim));
      }
      if (params.lse_cmp != nullptr && dim == 0) {
        params.lse_cmp[row * dims.num_q_heads + q_head] = shared.of_heads()[head] * kLn2;
      }
    }
  }
}

// kOverlaps: launched while the kernel before may still run (LaunchAfter).
template <class T, bool kOverlaps>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeSelectCtas)
    DecodeSelectKernel(const __grid_constant__ DecodeSelectParams params,
                       const __grid_constant__ DecodeScratch layout) {
  extern __shared__ __align__(128) char memory[];
  if constexpr (kOverlaps) LetNextGridStart();
  const AttentionDims& dims = params.dims;
  const DecodeShared shared(dims, memory);
  const int32_t group_size = dims.num_q_heads / dims.num_kv_heads;
  const int32_t warp = threadIdx.x / 32;
  TileAttention<T> attention(dims, shared);
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    // Rows, tables and q were there before the tokens were appended, so they need no waiting.
    const SelectItem item = FindItem(params, index);
    if (item.row < 0) break;
    const DecodeRow row = params.rows[item.row];
    const int32_t first_head = item.head_tile * kDecodeTileHeads;
    attention.Start(params.q, item.row, item.kv_head * group_size + first_head,
                    min(kDecodeTileHeads, group_size - first_head));
    const ScratchPlace scratch(params.scratch, layout,
                               int64_t{item.row} * dims.num_kv_heads + item.kv_head);
    const int32_t num_summary_items = NumSummaryItems(dims, row.position);
    const bool is_window = item.part >= num_summary_items;
    const DecodeKeys keys =
        is_window ? WindowKeys(dims, row.position) : SummaryKeys(dims, row.position);
    const int32_t part = is_window ? item.part - num_summary_items : item.part;
    const int32_t first_tile = part * keys.tiles_per_part();
    const int32_t end_tile = min(first_tile + keys.tiles_per_part(), keys.num_tiles());
    for (int32_t tile = first_tile; tile < end_tile; ++tile) {
      const int32_t first = tile * kDecodeTileKeys, mine = first + warp * 16;
      const int32_t begin = max(keys.begin - first, 0), end = keys.end - first;
      const bool sees_some = mine < keys.end && mine + 16 > keys.begin;
      WarpKeys warp_keys;
      if (is_window) {
        const int64_t token = WindowOrigin(dims, row.position) + mine;
        if (sees_some) {
          const int64_t block = token / dims.select_block_tokens;
          warp_keys = RecordKeys(
              dims, params.tables.win[row.sequence * params.tables.max_pages + block], item.kv_head,
              static_cast<int32_t>(token - block * dims.select_block_tokens));
        }
        if constexpr (kOverlaps) WaitForGridBefore();
        attention.template Attend<KeyLayout::kRecords, false>(warp_keys, begin, end);
      } else {
        if (sees_some) {
          const char* const page = static_cast<const char*>(
              params.tables.summaries[row.sequence * params.tables.max_summary_pages +
                                      mine / kSummaryPageBlocks]);
          const int64_t k_bytes = dims.num_kv_heads * dims.head_dim_qk * 2;
          const int64_t v_bytes = dims.num_kv_heads * dims.head_dim_v * 2;
          warp_keys.row_bytes = k_bytes + v_bytes;
          warp_keys.k = page + mine % kSummaryPageBlocks * warp_keys.row_bytes +
                        item.kv_head * dims.head_dim_qk * 2;
          warp_keys.v = page + mine % kSummaryPageBlocks * warp_keys.row_bytes + k_bytes +
                        item.kv_head * dims.head_dim_v * 2;
        }
        if constexpr (kOverlaps) WaitForGridBefore();
        attention.template Attend<KeyLayout::kRows, true>(warp_keys, begin, end);
        const int64_t of_tile = int64_t{tile} * layout.num_heads + first_head;
        const int32_t lane = threadIdx.x % 32;
        if (warp == 0 && lane % 4 == 0) {
          float* const tile_max = scratch.floats(layout.tile_max) + of_tile;
          tile_max[lane / 4] = attention.max(0);
          tile_max[lane / 4 + 8] = attention.max(1);
        }
        StoreReach(dims, layout, shared.p32(), tile, keys.end,
                   scratch.floats(layout.reach) +
                       int64_t{tile} * layout.blocks_per_tile * layout.num_heads + first_head);
      }
      __syncthreads();  // shared memory has been read
    }
    if (first_tile < end_tile) {
      const DecodePartsLayout& parts = is_window ? layout.win : layout.cmp;
      const int32_t place = part * layout.num_heads + first_head;
      attention.Store(is_window ? KeyLayout::kRecords : KeyLayout::kRows,
                      scratch.stats(parts) + place,
                      scratch.o(parts) + int64_t{place} * dims.head_dim_v);
    }
    if (is_window) continue;
    if constexpr (kOverlaps) WaitForGridBefore();
    if (!ArrivesLast(scratch.counters(), num_summary_items * NumHeadTiles(dims),
                     shared.words() + 15)) {
      continue;
    }
    Chooser(params, scratch, shared, row.position)
        .Run(params.block_indices +
             (int64_t{item.row} * dims.num_kv_heads + item.kv_head) * dims.num_selected_blocks);
    if (params.o_cmp.data != nullptr || params.lse_cmp != nullptr) {
      StoreCompressed<T>(params, scratch, shared, item.row, item.kv_head, keys.num_parts());
    }
  }
  if constexpr (kOverlaps) WaitForGridBefore();
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_SELECT_CUH_
