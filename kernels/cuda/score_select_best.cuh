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
  uint32_t score = 0;  // of ScoreKey
  uint32_t block = 0;  // ~block

  __device__ __forceinline__ bool BetterThan(const RankedBlock& other) const {
    return score != other.score ? score > other.score : block > other.block;
  }
  __device__ __forceinline__ RankedBlock FromLane(int32_t lane) const {
    return {__shfl_sync(kFullWarp, score, lane), __shfl_sync(kFullWarp, block, lane)};
  }
  // Both in one number.
  __device__ __forceinline__ uint64_t Key() const {
    return static_cast<uint64_t>(score) << 32 | block;
  }
  __device__ __forceinline__ RankedBlock FromLaneBelow() const {
    return {__shfl_up_sync(kFullWarp, score, 1), __shfl_up_sync(kFullWarp, block, 1)};
  }
};

// In the order of scores, above 0. A score that is not a number counts as 0.
__device__ __forceinline__ uint32_t ScoreKey(float score) {
  return __float_as_uint(fmaxf(score, 0.0f)) + 1;
}

class BestBlocks {
 public:
  // Takes a block from each lane; the first `num_places` lanes, at most 32, are what counts.
  // Returns whether one of the blocks was better than the worst that counts. All lanes. `buffer`
  // [32] is shared memory of this warp alone, aligned to 16 bytes.
  __device__ __forceinline__ bool Add(const RankedBlock& added, int32_t num_places,
                                      uint64_t* buffer) {
    unsigned better = __ballot_sync(kFullWarp, added.BetterThan(worst_));
    if (better == 0) return false;
    // Beyond a few blocks, ranking all of them at once is quicker.
    if (__popc(better) > 4) {
      Merge(added, num_places, buffer);
      worst_ = best_.FromLane(num_places - 1);
      return true;
    }
    while (better != 0) {
      const int32_t source = __ffs(better) - 1;
      Insert(added.FromLane(source));
      worst_ = best_.FromLane(num_places - 1);
      better &= better - 1;
      better &= __ballot_sync(kFullWarp, added.BetterThan(worst_));
    }
    return true;
  }

  // Writes the chosen blocks in ascending order, the forced ones included. `num_candidates` ends
  // with the query's own block; num_free is the number of places. All lanes; `buffer` as above, and
  // nullable where no place is free or all candidates are taken.
  __device__ __forceinline__ void Store(const AttentionDims& dims, int32_t num_candidates,
                                        int32_t num_free, uint64_t* buffer, int32_t* to) const {
    const int32_t lane = threadIdx.x % 32;
    const int32_t num_selected = dims.num_selected_blocks;
    const int32_t num_initial = dims.num_initial_blocks;
    if (num_candidates <= num_selected) {
      for (int32_t i = lane; i < num_selected; i += 32) to[i] = i < num_candidates ? i : -1;
      return;
    }
    auto* const blocks = reinterpret_cast<uint32_t*>(buffer);
    const uint32_t block = lane < num_free ? ~best_.block : ~0u;
    if (num_free > 0) blocks[lane] = block;
    __syncwarp();
    int32_t rank = 0;
#pragma unroll 1
    for (int32_t i = 0; i < num_free; i += 4) {
      const uint4 others = *reinterpret_cast<const uint4*>(blocks + i);
      rank += (others.x < block ? 1 : 0) + (others.y < block ? 1 : 0) + (others.z < block ? 1 : 0) +
              (others.w < block ? 1 : 0);
    }
    __syncwarp();
    if (lane < num_free) blocks[rank] = block;
    __syncwarp();
    for (int32_t i = lane; i < num_selected; i += 32) {
      const int32_t place = i - num_initial;
      // The local blocks end with the query's own.
      int32_t chosen = num_candidates - num_selected + i;
      if (place < 0) {
        chosen = i;
      } else if (place < num_free) {
        chosen = static_cast<int32_t>(blocks[place]);
      }
      to[i] = chosen;
    }
    __syncwarp();
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

  // The place of a block, new or not, is how many are better.
  __device__ __forceinline__ void Merge(const RankedBlock& added, int32_t num_places,
                                        uint64_t* buffer) {
    const int32_t lane = threadIdx.x % 32;
    const uint64_t old_key = lane < num_places ? best_.Key() : 0, new_key = added.Key();
    int32_t old_place = lane, new_place = 0;
    if (__shfl_sync(kFullWarp, best_.score, 0) != 0) {
      buffer[lane] = old_key;
      __syncwarp();
#pragma unroll 1
      for (int32_t i = 0; i < num_places; i += 2) {
        const ulonglong2 keys = *reinterpret_cast<const ulonglong2*>(buffer + i);
        new_place += (keys.x > new_key ? 1 : 0) + (keys.y > new_key ? 1 : 0);
      }
      __syncwarp();
      buffer[lane] = new_key;
      __syncwarp();
#pragma unroll 4
      for (int32_t i = 0; i < 32; i += 2) {
        const ulonglong2 keys = *reinterpret_cast<const ulonglong2*>(buffer + i);
        old_place += (keys.x > old_key ? 1 : 0) + (keys.y > old_key ? 1 : 0);
        new_place += (keys.x > new_key ? 1 : 0) + (keys.y > new_key ? 1 : 0);
      }
    } else {
      buffer[lane] = new_key;
      __syncwarp();
#pragma unroll 8
      for (int32_t i = 0; i < 32; i += 2) {
        const ulonglong2 keys = *reinterpret_cast<const ulonglong2*>(buffer + i);
        new_place += (keys.x > new_key ? 1 : 0) + (keys.y > new_key ? 1 : 0);
      }
    }
    __syncwarp();
    buffer[lane] = 0;
    __syncwarp();
    if (old_key != 0 && old_place < 32) buffer[old_place] = old_key;
    if (new_key != 0 && new_place < 32) buffer[new_place] = new_key;
    __syncwarp();
    const uint64_t key = buffer[lane];
    best_ = {static_cast<uint32_t>(key >> 32), static_cast<uint32_t>(key)};
    __syncwarp();
  }

  RankedBlock best_;
  RankedBlock worst_;  // that counts; the same in all lanes
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_BEST_CUH_
