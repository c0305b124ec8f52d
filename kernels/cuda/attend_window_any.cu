// Sliding-window attention for any shape, on any GPU: a tile of keys at a time, packed as records
// are, and one warp for each 16 rows.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pack_tokens.cuh"
#include "kernels/cuda/warp_attention.cuh"
#include "kernels/cuda/warp_rows.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda {
namespace {

// Shared memory is what GPUs differ in: with four warps, heads of 256 take 96 KiB, smaller ones
// leave room for several CTAs on an SM, and one computes while another waits for its tile.
constexpr int kThreads = 128;
constexpr int kWindowTileRows = kThreads / 32 * kTileRows;

template <class T, int kDv>
__device__ void AttendRun(const AttendWindowParams& params, const WindowRun& run,
                          const LaneRow (&rows)[2], char* tile, SharedQ& q,
                          WarpAttention<T, kDv>& attention) {
  const AttentionDims& dims = params.dims;
  LoadRows(params.queries.q, run, q);
  q.WaitUntilLoaded();
  attention.Reset();
  uint4* const k = reinterpret_cast<uint4*>(tile);
  uint4* const v = k + kTileKeys * dims.head_dim_qk / 8;
  for (int64_t key = run.FirstKey(dims.window_tokens) / kTileKeys * kTileKeys; key < run.EndKey();
       key += kTileKeys) {
    __syncthreads();
    PackTokens<kThreads>(params.k, run.document, key, kTileKeys, run.kv_head, dims.head_dim_qk, k);
    PackTokens<kThreads>(params.v, run.document, key, kTileKeys, run.kv_head, dims.head_dim_v, v);
    __syncthreads();
    VisibleKeys visible;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t begin = rows[r].position - dims.window_tokens + 1 - key;
      const int64_t end = rows[r].position + 1 - key;
      visible.begin[r] = static_cast<int>(min(max(begin, int64_t{0}), int64_t{kTileKeys}));
      visible.end[r] = static_cast<int>(min(max(end, int64_t{0}), int64_t{kTileKeys}));
    }
    AttendVisible<kTileKeys>(rows, visible, q, SharedAddress(k), SharedAddress(v), attention);
  }
}

// Grid: one CTA for each tile of rows, which it owns.
template <class T, int kDv>
__global__ void __launch_bounds__(kThreads)
    AttendWindowKernel(const __grid_constant__ AttendWindowParams params) {
  extern __shared__ __align__(128) char memory[];
  const AttentionDims& dims = params.dims;
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  char* const q_memory = memory + kTileKeys * (dims.head_dim_qk + dims.head_dim_v) * 2;
  SharedQ q(reinterpret_cast<uint4*>(q_memory) + warp * dims.head_dim_qk * 2, dims.head_dim_qk,
            params.queries.q.data);
  WarpAttention<T, kDv> attention(dims.softmax_scale * 1.4426950408889634f);

  ForEachRun<kWindowTileRows>(params, blockIdx.x, [&](const WindowRun& run) {
    const int32_t row = warp * kTileRows + lane / 4;
    const LaneRow rows[2] = {LaneRow(run, row), LaneRow(run, row + 8)};
    AttendRun(params, run, rows, memory, q, attention);
    StoreRows(dims, rows, params.o_win, params.lse_win, attention);
  });
}

template <class T, int kDv>
cudaError_t LaunchShape(const AttendWindowParams& params, cudaStream_t stream) {
  const AttentionDims& dims = params.dims;
  const int32_t shared_bytes =
      (kTileKeys * (dims.head_dim_qk + dims.head_dim_v) + kWindowTileRows * dims.head_dim_qk) * 2;
  const auto kernel = AttendWindowKernel<T, kDv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const unsigned grid = static_cast<unsigned>(NumWindowTiles<kWindowTileRows>(params));
  kernel<<<grid, kThreads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const AttendWindowParams& params, cudaStream_t stream) {
  switch (params.dims.head_dim_v) {
    case 64:
      return LaunchShape<T, 64>(params, stream);
    case 128:
      return LaunchShape<T, 128>(params, stream);
    case 192:
      return LaunchShape<T, 192>(params, stream);
    default:
      return LaunchShape<T, 256>(params, stream);
  }
}

}  // namespace

cudaError_t LaunchAttendWindowAny(const AttendWindowParams& params, const Device&,
                                  cudaStream_t stream) {
  if (params.queries.num_tokens == 0) return cudaSuccess;
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, stream)
                                           : Launch<__half>(params, stream);
}

}  // namespace nsa::kernels::cuda
