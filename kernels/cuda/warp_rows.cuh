// The rows of a warp in a tile of the window or of the summaries: where they come from and go to.
#ifndef KERNELS_CUDA_WARP_ROWS_CUH_
#define KERNELS_CUDA_WARP_ROWS_CUH_

#include <cstdint>

#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/warp_attention.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda {

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

// Starts to load the warp's rows of a run.
__device__ inline void LoadRows(const ConstTensor3& tensor, const WindowRun& run, SharedQ& q) {
  q.Load([&](int i) {
    const int32_t row = threadIdx.x / 32 * kTileRows + i;
    return run.Holds(row)
               ? static_cast<const char*>(tensor.data) +
                     (run.Query(row) * tensor.row_stride + run.Head(row) * tensor.head_stride) * 2
               : nullptr;
  });
}

// Ends a run: o, and lse [T,Hq], nullable.
template <class T, int kDv>
__device__ void StoreRows(const AttentionDims& dims, const LaneRow (&rows)[2], const Tensor3& o,
                          float* lse_of_heads, WarpAttention<T, kDv>& attention) {
  const int32_t c = threadIdx.x % 4;
  float lse[2];
  attention.Finish(lse);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!rows[r].active) continue;
    const int64_t to = rows[r].query * o.row_stride + rows[r].head * o.head_stride + c * 8;
#pragma unroll
    for (int group = 0; group < kDv / 32; ++group) {
      float values[8];
      attention.Get(group, r, values);
      StoreFloats(dims.dtype, o.data, to + group * 32, values);
    }
    if (lse_of_heads != nullptr && c == 0) {
      lse_of_heads[rows[r].query * dims.num_q_heads + rows[r].head] = lse[r];
    }
  }
}

// Attends to one tile of kKeys keys, of which the two rows of a lane see what `visible` says. All
// lanes of the warp.
template <int kKeys, class T, int kDv>
__device__ void AttendVisible(const LaneRow (&rows)[2], const VisibleKeys& visible,
                              const SharedQ& q, uint32_t k, uint32_t v,
                              WarpAttention<T, kDv>& attention) {
  bool sees_some = false, sees_all = true;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!rows[r].active) continue;
    sees_some |= visible.begin[r] < visible.end[r];
    sees_all &= visible.begin[r] == 0 && visible.end[r] == kKeys;
  }
  if (!__any_sync(kFullWarp, sees_some)) return;
  if (__all_sync(kFullWarp, sees_all)) {
    attention.template Attend<kKeys, false>(q, k, v, kKeys, visible);
  } else {
    attention.template Attend<kKeys, true>(q, k, v, kKeys, visible);
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_WARP_ROWS_CUH_
