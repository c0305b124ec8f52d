// How a step of decoding is cut into work for CTAs, and how its scratch is laid out.
//
// What a query attends to in one branch are its keys, counted from 0: summaries; tokens of the
// selected blocks, in the order of the list; tokens of the window, from a multiple of 16 on. They
// are cut into parts of whole tiles of 128 keys by the query's position alone, so that no result
// depends on the rows beside it. A CTA takes 16 heads over one part, a warp of it 16 keys at a
// time.
#ifndef KERNELS_CUDA_DECODE_WORK_H_
#define KERNELS_CUDA_DECODE_WORK_H_

#include <cstdint>

#include "kernels/cuda/record_layout.h"
#include "kernels/decode_params.h"

namespace nsa::kernels::cuda {

constexpr int32_t kDecodeTileKeys = 128;
constexpr int32_t kDecodeTileHeads = 16;
constexpr int32_t kDecodeWarpKeys = 16;
// Parts of a branch: their results are read by one CTA, so there are not too many of them. From
// some on they have two tiles, since to end a part costs as much as half a tile.
constexpr int32_t kMaxDecodeParts = 64;
constexpr int32_t kManyDecodeTiles = 17;
// CTAs that choose the blocks of a (row, kv head), each from a chunk of them.
constexpr int32_t kMaxDecodeChunks = 64;

// Positions are below 2^31: divisions of 64 bits would cost more than a tile's arithmetic.
constexpr int32_t Quotient(int64_t a, int32_t b) {
  return static_cast<int32_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

// Keys [begin, end) of a query in one branch, as tiles and parts. begin < 16.
struct DecodeKeys {
  int32_t begin = 0;
  int32_t end = 0;

  constexpr int32_t num_tiles() const { return (end + kDecodeTileKeys - 1) / kDecodeTileKeys; }
  constexpr int32_t tiles_per_part() const {
    const int32_t least = num_tiles() < kManyDecodeTiles ? 1 : 2;
    const int32_t fitting = (num_tiles() + kMaxDecodeParts - 1) / kMaxDecodeParts;
    return fitting > least ? fitting : least;
  }
  constexpr int32_t num_parts() const {
    return Quotient(num_tiles() + tiles_per_part() - 1, tiles_per_part());
  }
};

// Of 16 heads.
constexpr int32_t NumHeadTiles(const AttentionDims& dims) {
  return (dims.num_q_heads / dims.num_kv_heads + kDecodeTileHeads - 1) / kDecodeTileHeads;
}

// Blocks that the query at `position` may select, its own the last.
constexpr int32_t NumCandidates(const AttentionDims& dims, int64_t position) {
  return Quotient(position, dims.select_block_tokens) + 1;
}

constexpr DecodeKeys SummaryKeys(const AttentionDims& dims, int64_t position) {
  const int64_t behind = position + 1 - dims.compress_block_tokens;
  return {0, behind < 0 ? 0 : Quotient(behind, dims.compress_stride_tokens) + 1};
}

// Lists end with the query's own block, which counts up to the query's token.
constexpr DecodeKeys SelectedKeys(const AttentionDims& dims, int64_t position) {
  const int32_t candidates = NumCandidates(dims, position);
  const int32_t picks =
      candidates < dims.num_selected_blocks ? candidates : dims.num_selected_blocks;
  const auto in_block =
      static_cast<int32_t>(position - int64_t{candidates - 1} * dims.select_block_tokens);
  return {0, (picks - 1) * dims.select_block_tokens + in_block + 1};
}

// The token that key 0 of the window is.
constexpr int64_t WindowOrigin(const AttentionDims& dims, int64_t position) {
  const int64_t first = position + 1 - dims.window_tokens;
  return first < 0 ? 0 : first / 16 * 16;
}

constexpr DecodeKeys WindowKeys(const AttentionDims& dims, int64_t position) {
  const int64_t origin = WindowOrigin(dims, position), first = position + 1 - dims.window_tokens;
  return {first < 0 ? 0 : static_cast<int32_t>(first - origin),
          static_cast<int32_t>(position + 1 - origin)};
}

// Where the results of the parts of a branch lie, in bytes from the start of a (row, kv head)'s
// scratch. Heads are padded to whole head tiles.
struct DecodePartsLayout {
  int64_t stats;  // [parts,heads] (max, sum): of scale * q.k in units of log2; of 2^(that - max)
  int64_t o;      // [parts,heads,Dv] f32, to be divided by the sum
};

// The scratch of a (row, kv head); that of a row does not move with the number of rows. The counter
// is zero before and after each kernel. What is said of 16 keys of the summaries counts them from a
// multiple of 16 on.
struct DecodeScratch {
  int32_t group_size;   // query heads of a kv head
  int32_t head_tiles;   // of 16 heads, of the group
  int32_t num_heads;    // of the group, padded
  int32_t strides;      // of a select block, l'/d
  int32_t overlap;      // strides of a compression block, l/d
  int32_t places;       // select blocks that 16 summaries can reach
  int64_t counter;      // int32, arrivals of CTAs that choose
  int64_t maxima;       // [groups of 16 keys,heads] f32, the maximum that `reach` is relative to
  int64_t reach;        // [groups,places,heads] f32, sums of 2^(s - max) by block
  int64_t scores;       // [blocks] f32
  int64_t best_scores;  // [chunks,free places] f32, the best of each chunk; no more than blocks
  int64_t best_blocks;  // [chunks,free places] int32
  DecodePartsLayout cmp, slc, win;
  int64_t merged;  // [heads,Dv] f32, o_cmp
  int64_t bytes;   // of all

  // The first select block that 16 summaries from 16 * group on reach.
  constexpr int32_t FirstReached(int32_t group) const {
    return strides == 4 ? group * 4 : Quotient(group * kDecodeWarpKeys, strides);
  }
};

constexpr DecodeScratch MakeDecodeScratch(const AttentionDims& dims, int64_t max_tokens) {
  constexpr int64_t kAlignment = 256;
  DecodeScratch s{};
  s.group_size = dims.num_q_heads / dims.num_kv_heads;
  s.head_tiles = NumHeadTiles(dims);
  s.num_heads = s.head_tiles * kDecodeTileHeads;
  s.strides = dims.select_block_tokens / dims.compress_stride_tokens;
  s.overlap = dims.compress_block_tokens / dims.compress_stride_tokens;
  const int32_t most_before = kDecodeWarpKeys % s.strides == 0 ? 0 : s.strides - 1;  // in its block
  s.places = (most_before + kDecodeWarpKeys + s.overlap - 2) / s.strides + 1;

  int64_t offset = 0;
  const auto take = [&](int64_t num_bytes) {
    const int64_t begin = offset;
    offset += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  const auto take_parts = [&](int64_t max_keys) {
    const int64_t tiles = (max_keys + kDecodeTileKeys - 1) / kDecodeTileKeys;
    const int64_t parts = tiles < kMaxDecodeParts ? tiles : kMaxDecodeParts;
    const int64_t stats = take(parts * s.num_heads * 8);
    return DecodePartsLayout{stats, take(parts * s.num_heads * dims.head_dim_v * 4)};
  };
  const int64_t last = max_tokens > 0 ? max_tokens - 1 : 0;
  const int64_t summaries = SummaryKeys(dims, last).end;
  const int64_t groups = (summaries + kDecodeWarpKeys - 1) / kDecodeWarpKeys;
  const int64_t blocks = NumCandidates(dims, last);
  const int64_t most_best = int64_t{kMaxDecodeChunks} * dims.num_selected_blocks;
  const int64_t best = most_best < blocks ? most_best : blocks;
  s.counter = take(4);
  s.maxima = take(groups * s.num_heads * 4);
  s.reach = take(groups * s.places * s.num_heads * 4);
  s.scores = take(blocks * 4);
  s.best_scores = take(best * 4);
  s.best_blocks = take(best * 4);
  s.cmp = take_parts(summaries);
  s.slc = take_parts(int64_t{dims.num_selected_blocks} * dims.select_block_tokens);
  s.win = take_parts(int64_t{dims.window_tokens} + 15);
  s.merged = take(int64_t{s.num_heads} * dims.head_dim_v * 4);
  s.bytes = offset;
  return s;
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_WORK_H_
