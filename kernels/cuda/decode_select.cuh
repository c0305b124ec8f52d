// DecodeSelect: compressed attention of new tokens, importance, top-n; and the window beside it.
//
// A CTA owns (row, kv head, 16 heads, a part of the summaries or of the window), and takes one
// after another as long as there are. It leaves the part's o and statistics in the scratch, and of
// summaries what each select block gets of them, relative to the maximum so far. The CTA that is
// the last of a (row, kv head) to arrive knows the sums over all parts, and with them the
// importance of all blocks, from which it chooses: by a search for the n-th best key, 11 bits at a
// time.
//
// Shared memory: DecodeShared. For the choice, instead of V: scores, where they fit (else they are
// in the scratch); instead of probabilities, lse and what the search counts.
#ifndef KERNELS_CUDA_DECODE_SELECT_CUH_
#define KERNELS_CUDA_DECODE_SELECT_CUH_

#include <cstdint>

#include "kernels/cuda/cta_scan.cuh"
#include "kernels/cuda/decode_tiles.cuh"
#include "kernels/cuda/grid_order.cuh"
#include "kernels/cuda/score_select_best.cuh"

namespace nsa::kernels::cuda {

// CTAs of one SM: enough loads on the way for its share of the memory's bandwidth.
constexpr int kDecodeSelectCtas = 2;

// One item of the grid.
struct SelectItem {
  int32_t row = -1;  // -1: there are no more
  int32_t part;      // of the summaries, and then of the window; past the last item, how far
  int32_t head_tile;
  int32_t kv_head;
};

// Items of a (row, kv head, 16 heads) by branch. A row without summaries has an item for them all
// the same, which makes its list.
__device__ inline int32_t NumSummaryItems(const AttentionDims& dims, int64_t position) {
  return max(1, SummaryKeys(dims, position).num_parts());
}

// Heads of the same part are neighbours, as they are in pages. All lanes of a warp.
__device__ inline SelectItem FindItem(const DecodeSelectParams& params, int32_t index) {
  const AttentionDims& dims = params.dims;
  const int32_t lane = threadIdx.x % 32, head_tiles = NumHeadTiles(dims);
  const int32_t heads = head_tiles * dims.num_kv_heads;
  SelectItem item;
  for (int32_t first = 0; first < params.num_rows; first += 32) {
    int32_t count = 0;
    if (first + lane < params.num_rows) {
      const DecodeRow row = params.rows[first + lane];
      if (row.sequence >= 0) {
        count = (NumSummaryItems(dims, row.position) + WindowKeys(dims, row.position).num_parts()) *
                heads;
      }
    }
    int32_t end = count;  // of items, up to and with this lane's row
    for (int delta = 1; delta < 32; delta *= 2) {
      const int32_t before = __shfl_up_sync(kFullWarp, end, delta);
      if (lane >= delta) end += before;
    }
    const unsigned hits = __ballot_sync(kFullWarp, index < end);
    if (hits != 0) {
      const int32_t source = __ffs(hits) - 1;
      const int32_t in_row = index - __shfl_sync(kFullWarp, end - count, source);
      item.row = first + source;
      item.part = in_row / heads;
      const int32_t head = in_row - item.part * heads;
      item.kv_head = head / head_tiles;
      item.head_tile = head - item.kv_head * head_tiles;
      return item;
    }
    index -= __shfl_sync(kFullWarp, end, 31);
  }
  item.part = index;
  return item;
}

// Adds up what the summaries of a tile give to select blocks, from the probabilities in p32.
// reach [blocks_per_tile,num_heads], from the first of the 16 heads on. kStrides, kOverlap: of a
// select and of a compression block, 0 for any. All threads.
template <int kStrides, int kOverlap>
__device__ inline void StoreReach(const AttentionDims& dims, const DecodeScratch& layout,
                                  const float* p32, int32_t tile, int32_t num_summaries,
                                  float* reach) {
  const int32_t strides =
      kStrides != 0 ? kStrides : dims.select_block_tokens / dims.compress_stride_tokens;
  const int32_t overlap =
      kOverlap != 0 ? kOverlap : dims.compress_block_tokens / dims.compress_stride_tokens;
  const int32_t first = tile * kDecodeTileKeys;
  const int32_t count = min(kDecodeTileKeys, num_summaries - first);
  const int32_t first_block = first / strides;
  const int32_t head = threadIdx.x % 16;
  const float* const p = p32 + head * DecodeShared::kSumsStride;
  for (int32_t j = threadIdx.x / 16; j < layout.blocks_per_tile; j += kDecodeThreads / 16) {
    const int32_t begin = (first_block + j) * strides - first, end = begin + strides;
    float sum = 0.0f;
    if constexpr (kStrides != 0) {
#pragma unroll
      for (int32_t i = 1 - kOverlap; i < kStrides; ++i) {
        const int32_t times = min(i + kOverlap, kStrides) - max(i, 0), place = begin + i;
        if (place >= 0 && place < count) sum = fmaf(static_cast<float>(times), p[place], sum);
      }
    } else {
      for (int32_t i = max(0, begin - overlap + 1); i < min(end, count); ++i) {
        const int32_t times = min(i + overlap, end) - max(i, begin);
        sum = fmaf(static_cast<float>(times), p[i], sum);
      }
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
    scores_ = num_candidates_ * 4 <= shared.values_bytes ? reinterpret_cast<float*>(shared.values())
                                                         : scratch.floats(scratch.layout.scores);
  }

  // Not inlined, for the registers of the loop over tiles.
  __device__ __noinline__ void Run(int32_t* to) {
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
    MakeScores();
    if (!ChooseFew(num_free, to + dims_.num_initial_blocks)) {
      __syncthreads();
      Choose(num_free, to + dims_.num_initial_blocks);
    }
  }

 private:
  // NSA equations 9 and 10: adds up what each tile gives to blocks over the heads, each by
  // 2^(maximum of the tile - lse). Four lanes take a block, of 4 of 16 heads each.
  __device__ __forceinline__ void MakeScores() {
    constexpr int kTiles = 4, kBatch = 5;  // of 8 blocks: a tile's 34
    const DecodeScratch& layout = scratch_.layout;
    const int32_t num_heads = layout.num_heads, num_places = layout.blocks_per_tile;
    const int32_t group_size = dims_.num_q_heads / dims_.num_kv_heads;
    const int32_t strides = dims_.select_block_tokens / dims_.compress_stride_tokens;
    const int32_t overlap = dims_.compress_block_tokens / dims_.compress_stride_tokens;
    const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* const tile_max = scratch_.floats(layout.tile_max);
    const float* const reach = scratch_.floats(layout.reach);
    float* const lse = shared_.p32();  // [num_heads]
    for (int32_t i = threadIdx.x; i < num_candidates_; i += kDecodeThreads) scores_[i] = 0.0f;
    for (int32_t first = 0; first < num_heads; first += kDecodeTileHeads) {
      WeighParts(scratch_.stats(layout.cmp) + first, keys_.num_parts(), num_heads,
                 reinterpret_cast<float*>(shared_.p()), lse + first);
    }
    __syncthreads();
    // A block gets something of two tiles at most, and then their order does not matter; else one
    // warp adds it all up in order.
    const bool any_order = strides + overlap <= kDecodeTileKeys + 2;
    const int32_t step = any_order ? kDecodeWarps : 1;
    const int32_t first_tile = any_order ? warp : warp == 0 ? 0 : keys_.num_tiles();
    for (int32_t tile = first_tile; tile < keys_.num_tiles(); tile += kTiles * step) {
      for (int32_t begin = lane / 4; begin < num_places + lane / 4; begin += 8 * kBatch) {
        float sums[kTiles][kBatch] = {};
        for (int32_t head = lane % 4 * 4; head < num_heads; head += kDecodeTileHeads) {
          float4 max[kTiles], values[kTiles][kBatch];  // on their way together
#pragma unroll
          for (int u = 0; u < kTiles; ++u) {
            const int64_t of_tile = min(tile + u * step, keys_.num_tiles() - 1);
            max[u] = __ldcg(reinterpret_cast<const float4*>(tile_max + of_tile * num_heads + head));
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              const int32_t place = min(begin + 8 * i, num_places - 1);
              values[u][i] = __ldcg(reinterpret_cast<const float4*>(
                  reach + (of_tile * num_places + place) * num_heads + head));
            }
          }
          const auto factor_of = [&](float tile_max, int32_t h) {
            return h < group_size ? Exp2(tile_max - lse[h]) : 0.0f;
          };
#pragma unroll
          for (int u = 0; u < kTiles; ++u) {
            const float4 factor =
                make_float4(factor_of(max[u].x, head), factor_of(max[u].y, head + 1),
                            factor_of(max[u].z, head + 2), factor_of(max[u].w, head + 3));
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
              const float4& value = values[u][i];
              sums[u][i] = fmaf(value.x, factor.x,
                                fmaf(value.y, factor.y,
                                     fmaf(value.z, factor.z, fmaf(value.w, factor.w, sums[u][i]))));
            }
          }
        }
#pragma unroll
        for (int u = 0; u < kTiles; ++u) {
          const int32_t of_tile = tile + u * step;
#pragma unroll
          for (int i = 0; i < kBatch; ++i) {
            float sum = sums[u][i];
            sum += __shfl_xor_sync(kFullWarp, sum, 1);
            sum += __shfl_xor_sync(kFullWarp, sum, 2);
            const int32_t place = begin + 8 * i;
            const int32_t block = of_tile * kDecodeTileKeys / strides + place;
            if (lane % 4 == 0 && place < num_places && of_tile < keys_.num_tiles() &&
                block < num_candidates_) {
              atomicAdd(scores_ + block, sum);
            }
          }
        }
      }
    }
    __syncthreads();
  }

  // Writes the `count` best blocks in ascending order, if they are few and stand out; else returns
  // false. As many groups of threads have one that is no worse than the count-th best of the
  // groups' best; what is no worse than that is ranked one by one.
  __device__ bool ChooseFew(int32_t count, int32_t* to) {
    constexpr int32_t kGroups = kDecodeThreads / 4, kMost = kDecodeThreads;
    if (count > kGroups) return false;
    auto* const best = reinterpret_cast<uint32_t*>(shared_.p());       // [kGroups]
    auto* const keys = reinterpret_cast<uint64_t*>(best + kGroups);    // [kMost]
    auto* const is_chosen = reinterpret_cast<int32_t*>(keys + kMost);  // [kMost]
    int32_t* const words = shared_.words();
    uint32_t top = 0;
#pragma unroll 4
    for (int32_t block = begin() + threadIdx.x; block < end(); block += kDecodeThreads) {
      top = max(top, ScoreKey(scores_[block]));
    }
    top = max(top, __shfl_xor_sync(kFullWarp, top, 1));
    top = max(top, __shfl_xor_sync(kFullWarp, top, 2));
    if (threadIdx.x % 4 == 0) best[threadIdx.x / 4] = top;
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
    const auto least = static_cast<uint32_t>(words[1]);
#pragma unroll 4
    for (int32_t block = begin() + threadIdx.x; block < end(); block += kDecodeThreads) {
      const uint32_t key = ScoreKey(scores_[block]);
      if (key < least) continue;
      const int32_t place = atomicAdd(words, 1);
      if (place < kMost)
        keys[place] = static_cast<uint64_t>(key) << 32 | ~static_cast<uint32_t>(block);
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
      const auto block_of = [&](int32_t i) { return ~static_cast<uint32_t>(keys[i]); };
      int32_t place = 0;
      for (int32_t i = 0; i < num_keys; ++i) {
        place += is_chosen[i] != 0 && block_of(i) < block_of(mine) ? 1 : 0;
      }
      to[place] = static_cast<int32_t>(block_of(mine));
    }
    return true;
  }

  // The same of any blocks, by a search for the last one's key, 11 bits at a time.
  __device__ void Choose(int32_t count, int32_t* to) {
    constexpr int kBits = 11, kDigits = 1 << kBits, kPerThread = kDigits / kDecodeThreads;
    auto* const counts = reinterpret_cast<int32_t*>(shared_.p());
    int32_t* const words = shared_.words();
    uint32_t known = 0;    // of the last key that is chosen
    int32_t left = count;  // to choose of those that share `known`
    for (int32_t shift = 32 - kBits; shift > -kBits; shift -= kBits) {
      const int32_t low = max(shift, 0), bits = kBits - (low - shift);
      for (int32_t i = threadIdx.x; i < kDigits; i += kDecodeThreads) counts[i] = 0;
      __syncthreads();
#pragma unroll 4
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
        words[12] = digit;
        words[13] = left - better;
      }
      __syncthreads();
      known = known << bits | static_cast<uint32_t>(words[12]);
      left = words[13];
    }
    // Each thread has blocks in a row; of equal ones the first are chosen.
    const int32_t per_thread = (end() - begin() + kDecodeThreads - 1) / kDecodeThreads;
    const int32_t first = min(begin() + static_cast<int32_t>(threadIdx.x) * per_thread, end());
    const int32_t last = min(first + per_thread, end());
    int32_t num_better = 0, num_equal = 0, total;
#pragma unroll 4
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
  float* scores_;  // [blocks]
};

// o_cmp and lse_cmp of all heads of a (row, kv head), for a caller who looks. All threads.
__device__ __noinline__ inline void StoreCompressed(const DecodeSelectParams& params,
                                                    const ScratchPlace& scratch,
                                                    const DecodeShared& shared, int64_t row,
                                                    int32_t kv_head, int32_t num_parts) {
  const AttentionDims& dims = params.dims;
  const int32_t group_size = dims.num_q_heads / dims.num_kv_heads;
  const int32_t num_heads = scratch.layout.num_heads, pieces = dims.head_dim_v / 8;
  for (int32_t first = 0; first < num_heads; first += kDecodeTileHeads) {
    auto* const weights = reinterpret_cast<float*>(shared.p());
    __syncthreads();
    WeighParts(scratch.stats(scratch.layout.cmp) + first, num_parts, num_heads, weights,
               shared.of_heads());
    __syncthreads();
    for (int32_t i = threadIdx.x; i < kDecodeTileHeads * pieces; i += kDecodeThreads) {
      const int32_t head = i / pieces, dim = i % pieces * 8;
      if (first + head >= group_size) break;
      const int32_t q_head = kv_head * group_size + first + head;
      if (params.o_cmp.data != nullptr) {
        float o[8] = {};
        MergeParts(scratch.o(scratch.layout.cmp) + (first + head) * dims.head_dim_v + dim,
                   num_parts, int64_t{num_heads} * dims.head_dim_v, weights, head, o);
        StoreFloats(dims.dtype, params.o_cmp.data,
                    row * params.o_cmp.row_stride + q_head * params.o_cmp.head_stride + dim, o);
      }
      if (params.lse_cmp != nullptr && dim == 0) {
        params.lse_cmp[row * dims.num_q_heads + q_head] = shared.of_heads()[head] * kLn2;
      }
    }
  }
}

// kOverlaps: launched while the kernel before may still run (LaunchAfter).
template <class T, int kDk, int kDv, bool kOverlaps>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeSelectCtas)
    DecodeSelectKernel(const __grid_constant__ DecodeSelectParams params,
                       const __grid_constant__ DecodeScratch layout, int32_t values_bytes) {
  extern __shared__ __align__(128) char memory[];
  if constexpr (kOverlaps) LetNextGridStart();
  const AttentionDims& dims = params.dims;
  const DecodeShared shared(dims, memory, values_bytes);
  const int32_t group_size = dims.num_q_heads / dims.num_kv_heads;
  const int32_t warp = threadIdx.x / 32;
  TileAttention<T, kDk, kDv> attention(dims, shared);
  // The first item of a CTA is its own, for the others it draws tickets: a CTA that had to choose
  // takes fewer. There are as many tickets as items, and who draws the last one puts them back.
  int32_t* const tickets =
      ScratchPlace(params.scratch, layout, 0).counters() + 1 + NumHeadTiles(dims);
  // The first warp finds items for all. Rows, tables and q were there before the tokens were
  // appended, so nothing has to be waited for until there are keys to read.
  auto* const shared_item = reinterpret_cast<SelectItem*>(shared.words() + 8);
  if (warp == 0) *shared_item = FindItem(params, blockIdx.x);
  bool waits = kOverlaps;
  for (;;) {
    __syncthreads();
    const SelectItem item = *shared_item;
    if (item.row < 0) {
      if (threadIdx.x == 0 && item.part == static_cast<int32_t>(gridDim.x) - 1) *tickets = 0;
      break;
    }
    int32_t next = 0;  // asked for early, it is there when it is needed
    if (threadIdx.x == 0) next = static_cast<int32_t>(gridDim.x) + atomicAdd(tickets, 1);
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
          const int32_t block = Quotient(token, dims.select_block_tokens);
          warp_keys = RecordKeys(
              dims, params.tables.win[row.sequence * params.tables.max_pages + block], item.kv_head,
              static_cast<int32_t>(token - int64_t{block} * dims.select_block_tokens));
        }
        if constexpr (kOverlaps) {
          if (waits) WaitForGridBefore();
          waits = false;
        }
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
        if constexpr (kOverlaps) {
          if (waits) WaitForGridBefore();
          waits = false;
        }
        attention.template Attend<KeyLayout::kRows, true>(warp_keys, begin, end);
        const int64_t of_tile = int64_t{tile} * layout.num_heads + first_head;
        const int32_t lane = threadIdx.x % 32;
        if (warp == 0 && lane % 4 == 0) {
          float* const tile_max = scratch.floats(layout.tile_max) + of_tile;
          tile_max[lane / 4] = attention.max(0);
          tile_max[lane / 4 + 8] = attention.max(1);
        }
        float* const reach = scratch.floats(layout.reach) +
                             int64_t{tile} * layout.blocks_per_tile * layout.num_heads + first_head;
        if (dims.select_block_tokens == 4 * dims.compress_stride_tokens &&
            dims.compress_block_tokens == 2 * dims.compress_stride_tokens) {
          StoreReach<4, 2>(dims, layout, shared.p32(), tile, keys.end, reach);
        } else {
          StoreReach<0, 0>(dims, layout, shared.p32(), tile, keys.end, reach);
        }
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
    if (!is_window && ArrivesLast(scratch.counters(), num_summary_items * NumHeadTiles(dims),
                                  shared.words() + 15)) {
      Chooser(params, scratch, shared, row.position)
          .Run(params.block_indices +
               (int64_t{item.row} * dims.num_kv_heads + item.kv_head) * dims.num_selected_blocks);
      if (params.o_cmp.data != nullptr || params.lse_cmp != nullptr) {
        StoreCompressed(params, scratch, shared, item.row, item.kv_head, keys.num_parts());
      }
    }
    __syncthreads();  // all have read the item
    if (warp == 0) *shared_item = FindItem(params, __shfl_sync(kFullWarp, next, 0));
  }
  if constexpr (kOverlaps) WaitForGridBefore();
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_SELECT_CUH_
