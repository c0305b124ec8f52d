// Sliding-window attention for any shape: a tile of keys at a time, packed as records are, and one
// warp for each 16 rows.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pack_tokens.cuh"
#include "kernels/cuda/warp_attention.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWindowTileRows = kThreads / 32 * kTileRows;

// One of a lane's two rows.
struct LaneRow {
  bool active;
  int64_t query;  // row of q
  int64_t head;
  int64_t position;

  __device__ LaneRow(const WindowRun& run, int32_t row)
      : active(run.Holds(row)),
        query(run.Query(row)),
        head(run.Head(row)),
        position(run.Position(row)) {}
};

template <class T, int kDv>
__device__ void AttendRun(const AttendWindowParams& params, const WindowRun& run,
                          const LaneRow (&rows)[2], char* tile, SharedQ& q,
                          WarpAttention<T, kDv>& attention) {
  const AttentionDims& dims = params.dims;
  const ConstTensor3& q_tensor = params.queries.q;
  q.Load([&](int i) {
    const int32_t row = threadIdx.x / 32 * kTileRows + i;
    return run.Holds(row)
               ? static_cast<const char*>(q_tensor.data) +
                     (run.Query(row) * q_tensor.row_stride + run.Head(row) * q_tensor.head_stride) *
                         2
               : nullptr;
  });
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
    bool sees_some = false, sees_all = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t begin = rows[r].position - dims.window_tokens + 1 - key;
      const int64_t end = rows[r].position + 1 - key;
      visible.begin[r] = static_cast<int>(min(max(begin, int64_t{0}), int64_t{kTileKeys}));
      visible.end[r] = static_cast<int>(min(max(end, int64_t{0}), int64_t{kTileKeys}));
      if (!rows[r].active) continue;
      sees_some |= visible.begin[r] < visible.end[r];
      sees_all &= visible.begin[r] == 0 && visible.end[r] == kTileKeys;
    }
    if (!__any_sync(kFullWarp, sees_some)) continue;
    if (__all_sync(kFullWarp, sees_all)) {
      attention.template Attend<0, false>(q, SharedAddress(k), SharedAddress(v), kTileKeys,
                                          visible);
    } else {
      attention.template Attend<0, true>(q, SharedAddress(k), SharedAddress(v), kTileKeys, visible);
    }
  }
}

template <class T, int kDv>
__device__ void StoreRows(const AttendWindowParams& params, const LaneRow (&rows)[2],
                          WarpAttention<T, kDv>& attention) {
  const int32_t c = threadIdx.x % 4;
  float lse[2];
  attention.Finish(lse);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!rows[r].active) continue;
    const int64_t to =
        rows[r].query * params.o_win.row_stride + rows[r].head * params.o_win.head_stride + c * 8;
#pragma unroll
    for (int group = 0; group < kDv / 32; ++group) {
      float values[8];
      attention.Get(group, r, values);
      StoreFloats(params.dims.dtype, params.o_win.data, to + group * 32, values);
    }
    if (params.lse_win != nullptr && c == 0) {
      params.lse_win[rows[r].query * params.dims.num_q_heads + rows[r].head] = lse[r];
    }
  }
}

// Grid: one CTA for each tile of rows, which it owns.
template <class T, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
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
    StoreRows(params, rows, attention);
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

cudaError_t LaunchAttendWindowAny(const AttendWindowParams& params, cudaStream_t stream) {
  if (params.queries.num_tokens == 0) return cudaSuccess;
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, stream)
                                           : Launch<__half>(params, stream);
}

}  // namespace nsa::kernels::cuda
