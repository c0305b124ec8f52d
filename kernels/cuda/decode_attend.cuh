// DecodeAttend: new tokens' attention over the selected blocks and the window, in one kernel; and
// the merging of all branches by their gates, in another.
#ifndef KERNELS_CUDA_DECODE_ATTEND_CUH_
#define KERNELS_CUDA_DECODE_ATTEND_CUH_

#include <cstdint>

#include "kernels/cuda/decode_stream.cuh"

namespace nsa::kernels::cuda {

struct BlockWork {
  static constexpr KeyLayout kLayout = KeyLayout::kRecords;
  static constexpr bool kGivesPages = false;

  const DecodeAttendParams& params;
  const DecodeScratch& layout;

  __device__ static int32_t NumParts(const AttentionDims& dims, int32_t position) {
    return SelectedKeys(dims, position).num_parts() + WindowKeys(dims, position).num_parts();
  }
  __device__ static void Locate(const AttentionDims& dims, StreamPart& part) {
    const DecodeKeys selected = SelectedKeys(dims, part.position);
    part.is_window = part.part >= selected.num_parts();
    if (part.is_window) part.part -= selected.num_parts();
    part.Take(part.is_window ? WindowKeys(dims, part.position) : selected, part.part);
  }
  // The record of the kv head in the page.
  __device__ const char* Page(const StreamPart& part, int32_t key) const {
    const AttentionDims& dims = params.dims;
    const int64_t first = int64_t{part.sequence} * params.tables.max_pages;
    const void* page;
    if (part.is_window) {
      page = params.tables.win[first + Quotient(WindowOrigin(dims, part.position) + key,
                                                dims.select_block_tokens)];
    } else {
      const int64_t row_head = int64_t{part.row} * dims.num_kv_heads + part.kv_head;
      page = params.tables.slc[first + __ldcg(params.block_indices +
                                              row_head * dims.num_selected_blocks +
                                              Quotient(key, dims.select_block_tokens))];
    }
    return static_cast<const char*>(page) + part.kv_head * RecordBytes(dims);
  }
  __device__ WarpKeys Keys(const StreamPart& part, int32_t key, const char* record) const {
    const AttentionDims& dims = params.dims;
    const auto token = static_cast<uint32_t>(
        part.is_window ? WindowOrigin(dims, part.position) + key : int64_t{key});
    const auto in_block = static_cast<int32_t>(token % dims.select_block_tokens);
    return {record + in_block * dims.head_dim_qk * 2,
            record + (dims.select_block_tokens * dims.head_dim_qk + in_block * dims.head_dim_v) * 2,
            0};
  }
  __device__ void SetPlaces(const StreamPart& part, const RowHeads& heads,
                            const ScratchPlace& scratch, StreamRound& round) const {
    const DecodePartsLayout& parts = part.is_window ? layout.win : layout.slc;
    const int64_t place = int64_t{part.part} * layout.num_heads + heads.first;
    round.stats = scratch.stats(parts) + place;
    round.o = scratch.o(parts) + place * params.dims.head_dim_v;
  }
  __device__ __forceinline__ void StoreKeys(const StreamRound&, int32_t, float, float,
                                            const float (&)[2][4], float*) const {}
};

// kOverlaps, here and below: launched while the kernel before may still run (LaunchAfter).
template <class T, int kDk, int kDv, bool kOverlaps>
__global__ void __launch_bounds__(kStreamThreads<kDv>, 1)
    DecodeAttendKernel(const __grid_constant__ DecodeAttendParams params,
                       const __grid_constant__ DecodeScratch layout, int32_t num_stages) {
  if constexpr (kOverlaps) LetNextGridStart();
  const BlockWork work{params, layout};
  StreamParts<T, kDk, kDv, kOverlaps>(work, layout, num_stages);
}

constexpr int kGateThreads = 128;
// CTAs of 16 heads.
constexpr int32_t kGateCtas = 2;

// Grid: (kGateCtas, Hkv * head tiles, rows). A thread takes 8 dimensions, and what it loads is on
// its way together: each round trip shows.
template <bool kOverlaps>
__global__ void __launch_bounds__(kGateThreads)
    DecodeGateKernel(const __grid_constant__ DecodeAttendParams params,
                     const __grid_constant__ DecodeScratch layout) {
  constexpr int32_t kHeads = kDecodeTileHeads / kGateCtas;
  __shared__ float slc_weights[kMaxDecodeParts * kDecodeTileHeads];
  __shared__ float win_weights[kMaxDecodeParts * kDecodeTileHeads];
  __shared__ float slc_lse[kDecodeTileHeads], win_lse[kDecodeTileHeads];
  const AttentionDims& dims = params.dims;
  const DecodeRow row = params.rows[blockIdx.z];
  if constexpr (kOverlaps) WaitForGridBefore();
  if (row.sequence < 0) return;
  const int32_t head_tiles = NumHeadTiles(dims);
  const RowHeads heads(dims, blockIdx.z, blockIdx.y / head_tiles, blockIdx.y % head_tiles);
  const ScratchPlace scratch(params.scratch, layout, heads.row_head(dims));
  const int32_t num_slc = SelectedKeys(dims, row.position).num_parts();
  const int32_t num_win = WindowKeys(dims, row.position).num_parts();
  WeighParts(scratch.stats(layout.slc) + heads.first, num_slc, layout.num_heads, slc_weights,
             slc_lse);
  WeighParts(scratch.stats(layout.win) + heads.first, num_win, layout.num_heads, win_weights,
             win_lse);
  __syncthreads();

  const int64_t part_stride = int64_t{layout.num_heads} * dims.head_dim_v;
  const int32_t pieces = dims.head_dim_v / 8;
  for (int32_t i = threadIdx.x; i < kHeads * pieces; i += kGateThreads) {
    const int32_t head = blockIdx.x * kHeads + i / pieces, dim = i % pieces * 8;
    if (head >= heads.count) break;
    const int32_t q_head = heads.first_q + head;
    const int32_t place = (heads.first + head) * dims.head_dim_v + dim;
    float gate[3];
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      gate[b] =
          LoadFloat(params.gate_dtype, params.gate,
                    heads.row * params.gate_row_stride + q_head * params.gate_head_stride + b);
    }
    float cmp[8] = {}, slc[8] = {}, win[8] = {}, o[8];
    AddPart(scratch.floats(layout.merged) + place, 1.0f, cmp);
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
    const int64_t of_head = int64_t{heads.row} * dims.num_q_heads + q_head;
    if (params.lse_slc != nullptr) params.lse_slc[of_head] = slc_lse[head] * kLn2;
    if (params.lse_win != nullptr) params.lse_win[of_head] = win_lse[head] * kLn2;
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_ATTEND_CUH_
