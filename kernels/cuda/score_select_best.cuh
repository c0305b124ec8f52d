// The best blocks of one query so far, sorted, one in each lane of a warp.
#ifndef KERNELS_CUDA_SCORE_SELECT_BEST_CUH_
#define KERNELS_CUDA_SCORE_SELECT_BEST_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

// A score and its block as numbers of which the greater pair is the better block: the higher score,
// and of equal ones the lower block. {0, 0} is worse than every block.
struct RankedBlock {
  uint32_t score = 0;  // bits of a float >= 0, and 1
  uint32_t block = 0;  // ~block

  __device__ __forceinline__ bool BetterThan(const RankedBlock& other) const {
    return score != other.score ? score > other.score : block > other.block;
  }
  __device__ __forceinline__ RankedBlock FromLane(int32_t lane) const {
    return {__shfl_sync(kFullWarp, score, lane), __shfl_sync(kFullWarp, block, lane)};
  }
  __device__ __forceinline__ RankedBlock FromLaneXor(int32_t mask) const {
    return {__shfl_xor_sync(kFullWarp, score, mask), __shfl_xor_sync(kFullWarp, block, mask)};
  }
  __device__ __forceinline__ RankedBlock FromLaneBelow() const {
    return {__shfl_up_sync(kFullWarp, score, 1), __shfl_up_sync(kFullWarp, block, 1)};
  }
};

class BestBlocks {
 public:
  // Takes a new block from each lane for which `valid` is set; the first `num_places` lanes, at
  // most 32, are what counts. All lanes. A score that is not a number counts as 0.
  __device__ __forceinline__ void Add(float score, int32_t block, bool valid, int32_t num_places) {
    RankedBlock added;
    if (valid) added = {__float_as_uint(fmaxf(score, 0.0f)) + 1, ~static_cast<uint32_t>(block)};
    unsigned better = __ballot_sync(kFullWarp, added.BetterThan(worst_));
    // Beyond a few blocks, sorting all of them is quicker.
    if (__popc(better) > 4) {
      Merge(added);
      worst_ = best_.FromLane(num_places - 1);
      return;
    }
    while (better != 0) {
      const int32_t source = __ffs(better) - 1;
      Insert(added.FromLane(source));
      worst_ = best_.FromLane(num_places - 1);
      better &= better - 1;
      better &= __ballot_sync(kFullWarp, added.BetterThan(worst_));
    }
  }

  // Writes the chosen blocks in ascending order, the forced ones included. `num_candidates` ends
  // with the query's own block; num_free is the number of places.
  __device__ __forceinline__ void Store(const AttentionDims& dims, int32_t num_candidates,
                                        int32_t num_free, int32_t* to) const {
    const int32_t lane = threadIdx.x % 32;
    const int32_t num_selected = dims.num_selected_blocks;
    if (num_candidates <= num_selected) {
      for (int32_t i = lane; i < num_selected; i += 32) to[i] = i < num_candidates ? i : -1;
      return;
    }
    for (int32_t i = lane; i < dims.num_initial_blocks; i += 32) to[i] = i;
    for (int32_t i = lane; i < dims.num_local_blocks; i += 32) {
      to[dims.num_initial_blocks + num_free + i] = num_candidates - dims.num_local_blocks + i;
    }
    const auto block = static_cast<int32_t>(~best_.block);
    int32_t rank = 0;
    for (int32_t i = 0; i < num_free; ++i) {
      rank += __shfl_sync(kFullWarp, block, i) < block ? 1 : 0;
    }
    if (lane < num_free) to[dims.num_initial_blocks + rank] = block;
  }

 private:
  // `added` is the same in all lanes and better than the worst that counts.
  __device__ __forceinline__ void Insert(const RankedBlock& added) {
    const int32_t lane = threadIdx.x % 32;
    const RankedBlock below = best_.FromLaneBelow();
    const int32_t place = __popc(__ballot_sync(kFullWarp, best_.BetterThan(added)));
    if (lane == place) {
      best_ = added;
    } else if (lane > place) {
      best_ = below;
    }
  }

  // The lane keeps the better or the worse of its own and its partner's.
  static __device__ __forceinline__ void Exchange(RankedBlock& mine, int32_t mask,
                                                  bool keep_better) {
    const RankedBlock other = mine.FromLaneXor(mask);
    if (other.BetterThan(mine) == keep_better) mine = other;
  }

  __device__ __forceinline__ void Merge(RankedBlock added) {
    const int32_t lane = threadIdx.x % 32;
    // The best last, so that lane by lane the better ones of both are the best 32.
#pragma unroll
    for (int32_t size = 2; size <= 32; size *= 2) {
#pragma unroll
      for (int32_t mask = size / 2; mask > 0; mask /= 2) {
        const bool descends = (lane & size) != 0 && size < 32;
        Exchange(added, mask, ((lane & mask) == 0) == descends);
      }
    }
    if (added.BetterThan(best_)) best_ = added;
#pragma unroll
    for (int32_t mask = 16; mask > 0; mask /= 2) Exchange(best_, mask, (lane & mask) == 0);
  }

  RankedBlock best_;
  RankedBlock worst_;  // that counts; the same in all lanes
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_BEST_CUH_
