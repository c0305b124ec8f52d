// The backward of the selected attention, as the kernels of it see it.
//
// It goes through the queries of one kv head in pieces:
// 1. The lists of blocks of the piece's queries are inverted: for each block, which queries picked
//    it, ascending. A block's list is cut into items of at most kItemPicks picks.
// 2. For each item, dK and dV of the block, and dS of each of its picks, in 16 bits, to scratch.
//    What the items of a block that has several made is then summed in order.
// 3. For each query, dq = scale * the sum of dS K over its picks in ascending order.
// So S and dP are computed once, and every sum has one owner and a fixed order. dS of a pick is a
// function of that query and block alone: no bit of dq depends on pieces, items and tiles.
#ifndef KERNELS_CUDA_SELECTED_BACKWARD_CUH_
#define KERNELS_CUDA_SELECTED_BACKWARD_CUH_

#include <cstdint>

#include "kernels/backward_params.h"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/record_layout.h"

namespace nsa::kernels::cuda {

// dS of a pick is kept in fragments of 16 keys x 16 heads, as mma's operand A of 16-bit values has
// them, with keys for rows: [picks][ceil(G / 16)][l' / 16][32 lanes] of 16 bytes.
constexpr int kFragmentRows = 16;

// A query that picked a block.
struct BlockPick {
  int32_t index;        // (query - first query of the piece) * n + place in its list
  int32_t num_visible;  // tokens of the block, from its first on, that the query sees; at most l'
};

// Picks [begin, begin + count) of one block.
struct BlockItem {
  int32_t block;  // global
  int32_t begin;
  int32_t count;
  int32_t partial;  // where the sums go: -1 to the record's gradients, which they are added to
};

// A block of several items, whose sums are in `count` partials from `first` on.
struct SplitBlock {
  int32_t block;
  int32_t first;
  int32_t count;
};

struct ItemCounts {
  int32_t items;
  int32_t splits;
};

// More picks an item: fewer partial sums; fewer: less that the last items keep waiting for.
constexpr int kItemPicks = 512;
// Queries whose picks a CTA counts and sorts.
constexpr int kChunkQueries = 128;

// The queries [query_begin, query_begin + num_queries) of one kv head, and its part of the scratch.
struct SelectedPiece {
  int32_t kv_head;
  int32_t num_queries;
  int64_t query_begin;
  int32_t num_chunks;  // of kChunkQueries
  int32_t* before;     // [num_chunks,B] picks of a block by earlier chunks
  uint32_t* masks;     // [num_chunks,B] zero between uses: which of 32 queries picked a block
  int32_t* counts;     // [B] picks of a block
  int32_t* begins;     // [B] the first of them in `picks`
  BlockPick* picks;    // [num_queries * n] block by block, queries ascending
  BlockItem* items;    // longest first
  SplitBlock* splits;
  ItemCounts* num_items;
  float* partials;  // [.,(Dk+Dv)*l']
  uint4* ds;        // [num_queries * n][ceil(G / 16)][l' / 16][32]
};

__host__ __device__ inline int32_t HeadTiles(const AttentionDims& dims) {
  return (dims.num_q_heads / dims.num_kv_heads + kFragmentRows - 1) / kFragmentRows;
}
// Of dS of one pick.
__host__ __device__ inline int32_t PickFragments(const AttentionDims& dims) {
  return HeadTiles(dims) * (dims.select_block_tokens / kFragmentRows);
}
__host__ __device__ inline int64_t RecordValues(const AttentionDims& dims) {
  return int64_t{dims.select_block_tokens} * (dims.head_dim_qk + dims.head_dim_v);
}

// Where block `block` lies.
__device__ inline int32_t LocationOf(const AttendSelectedBackwardParams& params, int32_t kv_head,
                                     int64_t block) {
  return params.locations[kv_head * params.num_blocks + block];
}
__device__ inline const char* RecordAt(const AttendSelectedBackwardParams& params,
                                       int64_t location) {
  const int64_t slot = location - params.num_own_records;
  return static_cast<const char*>(slot < 0 ? params.own_records : params.slots) +
         (slot < 0 ? location : slot) * RecordBytes(params.dims);
}
__device__ inline float* GradientsAt(const AttendSelectedBackwardParams& params, int64_t location) {
  const int64_t slot = location - params.num_own_records;
  return (slot < 0 ? params.own_gradients : params.slot_gradients) +
         (slot < 0 ? location : slot) * RecordValues(params.dims);
}
// Where an item's sums go.
__device__ inline float* SumsOf(const AttendSelectedBackwardParams& params,
                                const SelectedPiece& piece, const BlockItem& item) {
  return item.partial < 0 ? GradientsAt(params, LocationOf(params, piece.kv_head, item.block))
                          : piece.partials + item.partial * RecordValues(params.dims);
}

// dS of a pick as mma's operand A, with heads for rows.
__device__ inline uint4 TransposeFragment(const uint4& ds) {
  return make_uint4(TransposeMatrix(ds.x), TransposeMatrix(ds.z), TransposeMatrix(ds.y),
                    TransposeMatrix(ds.w));
}

// Writes scale * sums [16 heads,dimensions as records order them], heads from 16 * head_tile on.
// A tile of the sums beyond Dk is not read. All lanes of a warp.
template <int kTiles>
__device__ inline void StoreQueryGradients(const AttendSelectedBackwardParams& params,
                                           int32_t kv_head, int64_t query, int32_t head_tile,
                                           const float (&sums)[kTiles][4]) {
  const AttentionDims& dims = params.dims;
  const int32_t lane = threadIdx.x % 32, dk = dims.head_dim_qk;
  const int32_t group_size = dims.num_q_heads / dims.num_kv_heads;
  const HeadRange& heads = params.queries.kv_heads;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t head = head_tile * kFragmentRows + lane / 4 + r * 8;
    if (head >= group_size) continue;
    const int64_t row = (query * heads.size() + kv_head - heads.begin) * group_size + head;
    float4* const to =
        reinterpret_cast<float4*>(params.queries_gradients.dq + row * dk) + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kTiles; m += 2) {
      if (m * 8 >= dk) break;
      float4& place = to[m / 4 * 8 + m % 4 / 2];
      const float4 before = params.queries_gradients.adds ? place : make_float4(0, 0, 0, 0);
      const float scale = dims.softmax_scale;
      place = make_float4(
          fmaf(sums[m][2 * r], scale, before.x), fmaf(sums[m][2 * r + 1], scale, before.y),
          fmaf(sums[m + 1][2 * r], scale, before.z), fmaf(sums[m + 1][2 * r + 1], scale, before.w));
    }
  }
}

// Steps 2, but for the last sums, and 3 of a piece.
using LaunchPiece = cudaError_t (*)(const AttendSelectedBackwardParams& params,
                                    const SelectedPiece& piece, const Device& device,
                                    cudaStream_t stream);
cudaError_t LaunchSelectedKeysAny(const AttendSelectedBackwardParams& params,
                                  const SelectedPiece& piece, const Device& device,
                                  cudaStream_t stream);
cudaError_t LaunchSelectedQueriesAny(const AttendSelectedBackwardParams& params,
                                     const SelectedPiece& piece, const Device& device,
                                     cudaStream_t stream);

cudaError_t LaunchSelectedQueriesFast(const AttendSelectedBackwardParams& params,
                                      const SelectedPiece& piece, const Device& device,
                                      cudaStream_t stream);

// Runs all steps for all pieces.
cudaError_t LaunchSelectedBackward(const AttendSelectedBackwardParams& params, const Device& device,
                                   LaunchPiece launch_keys, LaunchPiece launch_queries,
                                   cudaStream_t stream);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SELECTED_BACKWARD_CUH_
