// DecodeAttend: new tokens' attention over the selected blocks, and the gate over all branches.
//
// A CTA owns (row, kv head, 16 heads) and a part of the selected blocks, of which it leaves o and
// statistics in the scratch; or a quarter of the heads of the compressed branch, whose parts it
// merges. The CTA that is the last to arrive merges what there is of the selected blocks and of the
// window, and writes o.
//
// Shared memory: DecodeShared. For merging, instead of V: weights of the parts of two branches
// [64][16], and lse of their heads.
#ifndef KERNELS_CUDA_DECODE_ATTEND_CUH_
#define KERNELS_CUDA_DECODE_ATTEND_CUH_

#include <cstdint>

#include "kernels/cuda/decode_tiles.cuh"
#include "kernels/cuda/grid_order.cuh"

namespace nsa::kernels::cuda {

constexpr int kDecodeAttendCtas = 2;  // of one SM

// CTAs of a (row, kv head, 16 heads).
constexpr int32_t AttendItems(const AttentionDims& dims) {
  const int64_t tokens = int64_t{dims.num_selected_blocks} * dims.select_block_tokens;
  const int64_t tiles = (tokens + kDecodeTileKeys - 1) / kDecodeTileKeys;
  return static_cast<int32_t>(tiles < kMaxDecodeParts ? tiles : kMaxDecodeParts) + kMergeParts;
}

// The 16 heads of a row that a CTA works on.
struct AttendHeads {
  int64_t row;
  int32_t kv_head;
  int32_t first;    // of the group
  int32_t count;    // up to 16
  int32_t first_q;  // of q
};

// Merges the compressed branch for heads [4 * quarter, +4) of the 16. All threads.
__device__ inline void MergeCompressed(const AttentionDims& dims, const ScratchPlace& scratch,
                                       const DecodeShared& shared, const AttendHeads& heads,
                                       int32_t num_parts, int32_t quarter) {
  constexpr int32_t kHeads = kDecodeTileHeads / kMergeParts;
  const DecodeScratch& layout = scratch.layout;
  auto* const weights = reinterpret_cast<float*>(shared.values());
  WeighParts(scratch.stats(layout.cmp) + heads.first, num_parts, layout.num_heads, weights,
             shared.of_heads());
  __syncthreads();
  const int32_t pieces = dims.head_dim_v / 8;
  for (int32_t i = threadIdx.x; i < kHeads * pieces; i += kDecodeThreads) {
    const int32_t head = quarter * kHeads + i / pieces;
    const int32_t place = (heads.first + head) * dims.head_dim_v + i % pieces * 8;
    float sum[8] = {};
    MergeParts(scratch.o(layout.cmp) + place, num_parts,
               int64_t{layout.num_heads} * dims.head_dim_v, weights, head, sum);
    auto* const to = reinterpret_cast<float4*>(scratch.floats(layout.merged) + place);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
  }
}

// Merges the branches. All threads.
__device__ inline void StoreOutputs(const DecodeAttendParams& params, const ScratchPlace& scratch,
                                    const DecodeShared& shared, const AttendHeads& heads,
                                    int64_t position) {
  const AttentionDims& dims = params.dims;
  const DecodeScratch& layout = scratch.layout;
  const int32_t num_slc = SelectedKeys(dims, position).num_parts();
  const int32_t num_win = WindowKeys(dims, position).num_parts();
  auto* const slc_weights = reinterpret_cast<float*>(shared.values());
  float* const win_weights = slc_weights + kMaxDecodeParts * 16;
  float* const slc_lse = shared.of_warps();
  float* const win_lse = slc_lse + 16;
  WeighParts(scratch.stats(layout.slc) + heads.first, num_slc, layout.num_heads, slc_weights,
             slc_lse);
  WeighParts(scratch.stats(layout.win) + heads.first, num_win, layout.num_heads, win_weights,
             win_lse);
  __syncthreads();

  // A thread takes 8 dimensions, and what it loads is on its way together: each round trip shows.
  const bool has_summaries = SummaryKeys(dims, position).end > 0;
  const int64_t part_stride = int64_t{layout.num_heads} * dims.head_dim_v;
  const int32_t pieces = dims.head_dim_v / 8;
  for (int32_t i = threadIdx.x; i < heads.count * pieces; i += kDecodeThreads) {
    const int32_t head = i / pieces, dim = i % pieces * 8, q_head = heads.first_q + head;
    const int32_t place = (heads.first + head) * dims.head_dim_v + dim;
    float gate[3];
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      gate[b] =
          LoadFloat(params.gate_dtype, params.gate,
                    heads.row * params.gate_row_stride + q_head * params.gate_head_stride + b);
    }
    float cmp[8] = {}, slc[8] = {}, win[8] = {}, o[8];
    if (has_summaries) AddPart(scratch.floats(layout.merged) + place, 1.0f, cmp);
    MergeParts(scratch.o(layout.slc) + place, num_slc, part_stride, slc_weights, head, slc);
    MergeParts(scratch.o(layout.win) + place, num_win, part_stride, win_weights, head, win);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      o[e] = fmaf(gate[0], cmp[e], fmaf(gate[1], slc[e], gate[2] * win[e]));
    }
    const auto store = [&](const Tensor3& to, const float(&values)[8]) {
      StoreFloats(dims.dtype, to.data, heads.row * to.row_stride + q_head * to.head_stride + dim,
                  values);
    };
    store(params.o, o);
    if (params.o_slc.data != nullptr) store(params.o_slc, slc);
    if (params.o_win.data != nullptr) store(params.o_win, win);
    if (dim != 0) continue;
    const int64_t of_head = heads.row * dims.num_q_heads + q_head;
    if (params.lse_slc != nullptr) params.lse_slc[of_head] = slc_lse[head] * kLn2;
    if (params.lse_win != nullptr) params.lse_win[of_head] = win_lse[head] * kLn2;
  }
}

// Grid: (AttendItems, Hkv * head tiles, rows). kOverlaps: launched while the kernel before may
// still run (LaunchAfter).
template <class T, int kDk, int kDv, bool kOverlaps>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeAttendCtas)
    DecodeAttendKernel(const __grid_constant__ DecodeAttendParams params,
                       const __grid_constant__ DecodeScratch layout) {
  extern __shared__ __align__(128) char memory[];
  const AttentionDims& dims = params.dims;
  const DecodeRow row = params.rows[blockIdx.z];
  const DecodeKeys keys = SelectedKeys(dims, row.position);
  const DecodeKeys summaries = SummaryKeys(dims, row.position);
  const int32_t num_slc_items = AttendItems(dims) - kMergeParts;
  const int32_t item = blockIdx.x;
  const bool merges = item >= num_slc_items;
  if (row.sequence < 0 || (merges ? summaries.end == 0 : item >= keys.num_parts())) {
    if constexpr (kOverlaps) WaitForGridBefore();  // who waits for this grid waits for both
    return;
  }

  const int32_t head_tiles = NumHeadTiles(dims);
  const int32_t group_size = dims.num_q_heads / dims.num_kv_heads;
  const int32_t head_tile = blockIdx.y % head_tiles;
  AttendHeads heads;
  heads.row = blockIdx.z;
  heads.kv_head = blockIdx.y / head_tiles;
  heads.first = head_tile * kDecodeTileHeads;
  heads.count = min(kDecodeTileHeads, group_size - heads.first);
  heads.first_q = heads.kv_head * group_size + heads.first;
  const int64_t row_head = heads.row * dims.num_kv_heads + heads.kv_head;
  const DecodeShared shared(dims, memory, DecodeShared::TileBytes(dims));
  const ScratchPlace scratch(params.scratch, layout, row_head);

  if (merges) {
    if constexpr (kOverlaps) WaitForGridBefore();
    MergeCompressed(dims, scratch, shared, heads, summaries.num_parts(), item - num_slc_items);
  } else {
    TileAttention<T, kDk, kDv> attention(dims, shared);
    attention.Start(params.q, heads.row, heads.first_q, heads.count);
    if constexpr (kOverlaps) WaitForGridBefore();
    const int32_t* const picks = params.block_indices + row_head * dims.num_selected_blocks;
    const int32_t first_tile = item * keys.tiles_per_part();
    const int32_t end_tile = min(first_tile + keys.tiles_per_part(), keys.num_tiles());
    for (int32_t tile = first_tile; tile < end_tile; ++tile) {
      const int32_t mine = tile * kDecodeTileKeys + threadIdx.x / 32 * 16;
      WarpKeys warp_keys;
      if (mine < keys.end) {
        const int32_t pick = mine / dims.select_block_tokens;
        const void* const page =
            params.tables.slc[row.sequence * params.tables.max_pages + picks[pick]];
        warp_keys = RecordKeys(dims, page, heads.kv_head, mine - pick * dims.select_block_tokens);
      }
      if (tile != first_tile) __syncthreads();  // shared memory has been read
      attention.template Attend<KeyLayout::kRecords, false>(warp_keys, 0,
                                                            keys.end - tile * kDecodeTileKeys);
    }
    const int32_t place = item * layout.num_heads + heads.first;
    attention.Store(KeyLayout::kRecords, scratch.stats(layout.slc) + place,
                    scratch.o(layout.slc) + int64_t{place} * dims.head_dim_v);
  }
  const int32_t num_arrivals = keys.num_parts() + (summaries.end > 0 ? kMergeParts : 0);
  if (ArrivesLast(scratch.counters() + 1 + head_tile, num_arrivals, shared.words() + 15)) {
    StoreOutputs(params, scratch, shared, heads, row.position);
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_ATTEND_CUH_
