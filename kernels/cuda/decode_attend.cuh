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
  __device__ int32_t Block(const StreamPart& part, int32_t key) const {
    const AttentionDims& dims = params.dims;
    if (part.is_window) {
      return Quotient(WindowOrigin(dims, part.position) + key, dims.select_block_tokens);
    }
    const int64_t row_head = int64_t{part.row} * dims.num_kv_heads + part.kv_head;
    return __ldcg(params.block_indices + row_head * dims.num_selected_blocks +
                  Quotient(key, dims.select_block_tokens));
  }
  // The record of the kv head in the page.
  __device__ const char* Page(const StreamPart& part, int32_t block) const {
    void* const* const table = part.is_window ? params.tables.win : params.tables.slc;
    return static_cast<const char*>(table[part.sequence * params.tables.max_pages + block]) +
           part.kv_head * RecordBytes(params.dims);
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
  StreamParts<T, kDk, kDv, kOverlaps>(work, num_stages);
}

constexpr int kGateThreads = 256;

// Grid: (Hkv * head tiles, rows). A thread takes 8 dimensions, and what it loads is on its way
// together: each round trip shows.
template <bool kOverlaps>
__global__ void __launch_bounds__(kGateThreads)
    DecodeGateKernel(const __grid_constant__ DecodeAttendParams params,
                     const __grid_constant__ DecodeScratch layout) {
  constexpr int kAtOnce = 8;  // parts of a branch
  __shared__ float slc_weights[kMaxDecodeParts * kDecodeTileHeads];
  __shared__ float win_weights[kMaxDecodeParts * kDecodeTileHeads];
  __shared__ float slc_lse[kDecodeTileHeads], win_lse[kDecodeTileHeads];
  const AttentionDims& dims = params.dims;
  const DecodeRow row = params.rows[blockIdx.y];
  const int32_t kv_head = layout.head_tiles == 1 ? static_cast<int32_t>(blockIdx.x)
                                                 : Quotient(blockIdx.x, layout.head_tiles);
  const RowHeads heads(layout, blockIdx.y, kv_head, blockIdx.x - kv_head * layout.head_tiles);
  const ScratchPlace scratch(params.scratch, layout, heads.row_head(dims));
  const int32_t num_slc = SelectedKeys(dims, row.position).num_parts();
  const int32_t num_win = WindowKeys(dims, row.position).num_parts();
  const int64_t part_stride = int64_t{layout.num_heads} * dims.head_dim_v;
  const int32_t pieces = dims.head_dim_v / 8, num_pieces = heads.count * pieces;
  if constexpr (kOverlaps) WaitForGridBefore();
  if (row.sequence < 0) return;

  bool is_weighed = false;
  for (int32_t first = 0; first < num_pieces; first += kGateThreads) {
    const int32_t i = min(first + static_cast<int32_t>(threadIdx.x), num_pieces - 1);
    const int32_t head = Quotient(i, pieces), dim = (i - head * pieces) * 8;
    const int32_t q_head = heads.first_q + head;
    const int32_t place = (heads.first + head) * dims.head_dim_v + dim;
    const float* const slc_o = scratch.o(layout.slc) + place;
    const float* const win_o = scratch.o(layout.win) + place;
    const PartValues<kAtOnce> slc_values(slc_o, 0, num_slc, part_stride);
    const PartValues<kAtOnce> win_values(win_o, 0, num_win, part_stride);
    const PartValues<1> cmp_values(scratch.floats(layout.merged) + place, 0, 1, 0);
    float gate[3];
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      gate[b] =
          LoadFloat(params.gate_dtype, params.gate,
                    heads.row * params.gate_row_stride + q_head * params.gate_head_stride + b);
    }
    if (!is_weighed) {
      const int32_t of_warp = static_cast<int32_t>(threadIdx.x) / 32 * 2;
      const float2* const slc_stats = scratch.stats(layout.slc) + heads.first;
      const float2* const win_stats = scratch.stats(layout.win) + heads.first;
      const PartWeights slc_low(slc_stats, num_slc, layout.num_heads, of_warp);
      const PartWeights win_low(win_stats, num_win, layout.num_heads, of_warp);
      const PartWeights slc_high(slc_stats, num_slc, layout.num_heads, of_warp + 1);
      const PartWeights win_high(win_stats, num_win, layout.num_heads, of_warp + 1);
      slc_low.Store(slc_weights, slc_lse);
      win_low.Store(win_weights, win_lse);
      slc_high.Store(slc_weights, slc_lse);
      win_high.Store(win_weights, win_lse);
      __syncthreads();
      is_weighed = true;
    }
    float cmp[8] = {}, slc[8] = {}, win[8] = {}, o[8];
    const float one[kDecodeTileHeads] = {1.0f};
    cmp_values.AddTo(one, 0, cmp);
    slc_values.AddTo(slc_weights, head, slc);
    MergeParts(slc_o, kAtOnce, num_slc, part_stride, slc_weights, head, slc);
    win_values.AddTo(win_weights, head, win);
    MergeParts(win_o, kAtOnce, num_win, part_stride, win_weights, head, win);
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      o[e] = fmaf(gate[0], cmp[e], fmaf(gate[1], slc[e], gate[2] * win[e]));
    }
    if (first + static_cast<int32_t>(threadIdx.x) >= num_pieces) continue;
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
