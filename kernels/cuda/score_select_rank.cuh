// What consumers and selectors of the ranking kernel share: its arguments and its shared memory.
#ifndef KERNELS_CUDA_SCORE_SELECT_RANK_CUH_
#define KERNELS_CUDA_SCORE_SELECT_RANK_CUH_

#include <cstdint>

#include "kernels/cuda/score_select_blocks.h"
#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_work.cuh"

namespace nsa::kernels::cuda {

struct RankArgs {
  AttentionDims dims;
  WorkList list;
  QueryRows rows;
  const char* keys;   // tiles
  int64_t num_tiles;  // of a kv head
  const float* lse;
  int32_t* block_indices;
  float scale_log2;
  int32_t num_free;  // places that are not forced
};

namespace rank {

constexpr int kWarpgroups = kRankRows / 128;
constexpr int kConsumerWarps = kWarpgroups * 4;
constexpr int kSelectorWarps = 7;
constexpr int kThreads = (kConsumerWarps + kSelectorWarps + 1) * 32;
// Of a thread: 2 * consumer + 2 * selector is what the block is given, 4 * 128.
constexpr int kConsumerRegisters = 176;
constexpr int kSelectorRegisters = 80;
constexpr int kSets = kRankRows / kRankWarpRows;  // of 16 rows
constexpr int kSetsPerWarpgroup = kSets / kWarpgroups;
constexpr int kScoreSlots = 2;

template <int kDk, int kStrides>
struct Shape {
  using Order = ScoreOrder<kStrides>;
  static constexpr int kQueryBytes = 64 * kDk * 2;  // of a block of rows
  static constexpr int kKeyBytes = kTileSummaries * kDk * 2;
  static constexpr int kSlots = kDk == 64 ? 6 : kDk == 128 ? 3 : 2;
  static constexpr int kChunkRows = kDk == 192 ? 8 : 16;  // of 32 scores
  static constexpr int kChunkBlocks = kChunkRows * 32;
  static constexpr int kChunkTiles = kChunkBlocks / Order::kTileBlocks;
  static constexpr int kScoreBytes = kSetsPerWarpgroup * kChunkBlocks * 4;
  static constexpr int kKeys = kRankRows / 64 * kQueryBytes;
  static constexpr int kScores = kKeys + kSlots * kKeyBytes;
  static constexpr int kKeyBarriers = kScores + kWarpgroups * kScoreSlots * kScoreBytes;
  static constexpr int kScoreBarriers = kKeyBarriers + RingBarriers<kSlots>::kBytes;
  static constexpr int kBytes = kScoreBarriers + kWarpgroups * RingBarriers<kScoreSlots>::kBytes;

  // Of the scores that a warpgroup leaves for its selectors, and the scores
  // [set][row of the chunk][lane] themselves.
  static __device__ __forceinline__ RingBarriers<kScoreSlots> ScoreBarriers(uint32_t shared,
                                                                            int32_t warpgroup) {
    return RingBarriers<kScoreSlots>(shared + kScoreBarriers +
                                     warpgroup * RingBarriers<kScoreSlots>::kBytes);
  }
  static constexpr __device__ int32_t ScoreOffset(int32_t warpgroup, int32_t slot) {
    return kScores + (warpgroup * kScoreSlots + slot) * kScoreBytes;
  }
};

}  // namespace rank
}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_RANK_CUH_
