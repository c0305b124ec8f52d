// How the ranking kernel for Hopper makes scores of blocks from probabilities of summaries, and in
// which order it leaves them for those who rank them.
//
// A tile of 128 summaries is 128 / kStrides select blocks, kStrides = l' / d. The threads of a quad
// hold 32 summaries in a row each, which are whole blocks. A summary reaches kReach = l / d - 1
// strides, fewer than kStrides, past the one that it begins with, and so into one more block.
#ifndef KERNELS_CUDA_SCORE_SELECT_BLOCKS_H_
#define KERNELS_CUDA_SCORE_SELECT_BLOCKS_H_

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "kernels/cuda/score_select_stages.h"

namespace nsa::kernels::cuda::rank {

// NSA equations 9 and 10: a summary counts as often as its strides lie in a block. `p` are those
// that begin in a block; `own` becomes what they add to it, `next` what they add to the one after.
template <int kStrides, int kReach>
__host__ __device__ __forceinline__ void SumBlock(const float (&p)[kStrides], float& own,
                                                  float& next) {
  static_assert(kReach < kStrides);
  own = p[0];
  next = 0.0f;
  for (int i = 1; i < kStrides - kReach; ++i) own += p[i];
  if constexpr (kReach > 0) {
    float rest = p[kStrides - 1];
    for (int i = kStrides - 2; i >= kStrides - kReach; --i) rest = fmaf(kStrides - i, p[i], rest);
    own = fmaf(kReach + 1, own, rest);
    next = p[kStrides - kReach];
    for (int i = 1; i < kReach; ++i) next = fmaf(i + 1, p[kStrides - kReach + i], next);
  }
}

// Scores of consecutive tiles, as rows of one float for each lane of a warp.
template <int kStrides>
struct ScoreOrder {
  static constexpr int kTileBlocks = kTileSummaries / kStrides;
  static constexpr int kThreadBlocks = 32 / kStrides;
  // Of a tile, that a lane has when sums over the eight threads at its place of a quad are shared
  // out among these: kLaneBlocks in a row, and with 4 blocks a thread every second lane none.
  static constexpr int kLaneBlocks = kThreadBlocks < 8 ? 1 : kThreadBlocks / 8;

  // Where the lane's first block lies among those of its tile, in floats; the next one lies 32
  // further on. -1: it has none.
  static constexpr __host__ __device__ int32_t Place(int32_t lane) {
    if (kThreadBlocks >= 8) return lane;
    return (lane & 4) != 0 ? -1 : lane / 8 * 4 + lane % 4;
  }
  // The block in a row and lane is FirstBlock(lane) + RowBlock(row); it grows with the row.
  static constexpr __host__ __device__ int32_t FirstBlock(int32_t lane) {
    const int32_t of_thread = lane % kTileBlocks / 4 * kLaneBlocks;
    return lane / kTileBlocks * kTileBlocks + lane % 4 * kThreadBlocks + of_thread;
  }
  static constexpr __host__ __device__ int32_t RowBlock(int32_t row) {
    return kLaneBlocks == 1 ? row * 32 : row / 2 * 64 + row % 2;
  }
};

}  // namespace nsa::kernels::cuda::rank

#endif  // KERNELS_CUDA_SCORE_SELECT_BLOCKS_H_
