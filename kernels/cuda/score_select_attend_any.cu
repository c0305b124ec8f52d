// Attention over summaries for any shape, on any GPU: o_cmp and lse.
//
// First, summaries are packed into tiles in the layout of records (record_layout.h). Then a CTA of
// four warps owns 64 rows (window_rows.cuh), a warp 16 of them, and walks the document's summaries
// from the first on, 32 a step; while it computes a step, the next one is copied.
//
// Shared memory: [2] of K [32,Dk] and V [32,Dv], then q of the warps [4][16,Dk]; 96 KiB at most.
#include <cstdint>

#include "kernels/cuda/pack_tokens.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_tiles.cuh"
#include "kernels/cuda/warp_attention.cuh"
#include "kernels/cuda/warp_rows.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = kThreads / 32 * kTileRows;
constexpr int kStepSummaries = 32;
constexpr int kPackThreads = 256;

// Grid: [tiles, kv heads, 1 or 2]. A CTA owns the keys of a tile, or its values.
__global__ void __launch_bounds__(kPackThreads)
    PackSummariesKernel(const __grid_constant__ ScoreAndSelectParams params,
                        const __grid_constant__ ScoreSelectScratch scratch) {
  const int32_t index = blockIdx.x, head = params.queries.kv_heads.begin + blockIdx.y;
  const Tile tile = FindTile(params.queries.documents, params.num_documents, index);
  if (tile.num_present == 0) return;
  const bool is_values = blockIdx.z != 0;
  const ConstTensor3& from = is_values ? params.vc : params.kc;
  const int32_t head_dim = is_values ? params.dims.head_dim_v : params.dims.head_dim_qk;
  char* const to = static_cast<char*>(is_values ? scratch.values : scratch.keys) +
                   (head * scratch.num_tiles + index) * (kTileSummaries * 2) * head_dim;
  const auto row_at = [&](int32_t summary) {
    return summary < tile.num_present
               ? static_cast<const char*>(from.data) +
                     ((tile.first_row + summary) * from.row_stride + head * from.head_stride) * 2
               : nullptr;
  };
  PackRows<kPackThreads>(kTileSummaries, head_dim, row_at, reinterpret_cast<uint4*>(to));
}

// Grid: one CTA for each tile of rows, which it owns; the last queries, which see most, first.
template <class T, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
    AttendSummariesAnyKernel(const __grid_constant__ ScoreAndSelectParams params,
                             const __grid_constant__ ScoreSelectScratch scratch) {
  extern __shared__ __align__(128) char memory[];
  const AttentionDims& dims = params.dims;
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t k_bytes = kStepSummaries * dims.head_dim_qk * 2;
  const int32_t v_bytes = kStepSummaries * dims.head_dim_v * 2;
  const uint32_t steps = SharedAddress(memory);
  SharedQ q(
      reinterpret_cast<uint4*>(memory + 2 * (k_bytes + v_bytes)) + warp * dims.head_dim_qk * 2,
      dims.head_dim_qk, params.queries.q.data);
  WarpAttention<T, kDv> attention(dims.softmax_scale * 1.4426950408889634f);

  ForEachRun<kRows>(params, gridDim.x - 1 - blockIdx.x, [&](const WindowRun& run) {
    const int32_t row = warp * kTileRows + lane / 4;
    const LaneRow rows[2] = {LaneRow(run, row), LaneRow(run, row + 8)};
    int32_t num_visible[2];
    for (int r = 0; r < 2; ++r) {
      num_visible[r] =
          rows[r].active ? NumVisible(dims, static_cast<uint32_t>(rows[r].position)) : 0;
    }
    const int32_t num_steps =
        (NumVisible(dims, static_cast<uint32_t>(run.EndKey() - 1)) + kStepSummaries - 1) /
        kStepSummaries;
    const int64_t first_summary =
        (run.kv_head * scratch.num_tiles +
         TileBegin(params.queries.documents[run.document].cmp_block_begin, run.document)) *
        kTileSummaries;
    const char* const keys =
        static_cast<const char*>(scratch.keys) + first_summary * dims.head_dim_qk * 2;
    const char* const values =
        static_cast<const char*>(scratch.values) + first_summary * dims.head_dim_v * 2;
    const auto start = [&](int32_t step) {
      if (step < num_steps) {
        const uint32_t to = steps + step % 2 * (k_bytes + v_bytes);
        for (int32_t i = threadIdx.x * 16; i < k_bytes; i += kThreads * 16) {
          CopyAsync16(to + i, keys + int64_t{step} * k_bytes + i, true);
        }
        for (int32_t i = threadIdx.x * 16; i < v_bytes; i += kThreads * 16) {
          CopyAsync16(to + k_bytes + i, values + int64_t{step} * v_bytes + i, true);
        }
      }
      CopyAsyncCommit();
    };
    __syncthreads();  // the run before has been read
    LoadRows(params.queries.q, run, q);
    start(0);
    attention.Reset();
    for (int32_t step = 0; step < num_steps; ++step) {
      CopyAsyncWait<0>();
      __syncthreads();  // the step is there, and the one before has been read
      start(step + 1);
      VisibleKeys visible;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        visible.begin[r] = 0;
        visible.end[r] = min(max(num_visible[r] - step * kStepSummaries, 0), kStepSummaries);
      }
      const uint32_t k = steps + step % 2 * (k_bytes + v_bytes);
      AttendVisible<kStepSummaries>(rows, visible, q, k, k + k_bytes, attention);
    }
    CopyAsyncWait<0>();  // for q without a step: copies to the same place have no order
    StoreRows(dims, rows, params.o_cmp, scratch.lse, attention);
  });
}

template <class T, int kDv>
cudaError_t LaunchShape(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                        cudaStream_t stream) {
  const AttentionDims& dims = params.dims;
  const int32_t shared_bytes =
      (2 * kStepSummaries * (dims.head_dim_qk + dims.head_dim_v) + kRows * dims.head_dim_qk) * 2;
  const auto kernel = AttendSummariesAnyKernel<T, kDv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(NumWindowTiles<kRows>(params)), kThreads, shared_bytes, stream>>>(
      params, scratch);
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                   cudaStream_t stream) {
  switch (params.dims.head_dim_v) {
    case 64:
      return LaunchShape<T, 64>(params, scratch, stream);
    case 128:
      return LaunchShape<T, 128>(params, scratch, stream);
    case 192:
      return LaunchShape<T, 192>(params, scratch, stream);
    default:
      return LaunchShape<T, 256>(params, scratch, stream);
  }
}

// Keys, and values where `has_values`.
cudaError_t PackSummaries(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                          bool has_values, cudaStream_t stream) {
  if (scratch.num_tiles == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(scratch.num_tiles),
                  static_cast<unsigned>(params.queries.kv_heads.size()), has_values ? 2 : 1);
  PackSummariesKernel<<<grid, kPackThreads, 0, stream>>>(params, scratch);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchPackKeysAny(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                              cudaStream_t stream) {
  return PackSummaries(params, scratch, /*has_values=*/false, stream);
}

cudaError_t LaunchAttendSummariesAny(const ScoreAndSelectParams& params,
                                     const ScoreSelectScratch& scratch, cudaStream_t stream) {
  const cudaError_t error = PackSummaries(params, scratch, /*has_values=*/true, stream);
  if (error != cudaSuccess) return error;
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, scratch, stream)
                                           : Launch<__half>(params, scratch, stream);
}

}  // namespace nsa::kernels::cuda
