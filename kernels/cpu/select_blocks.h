// Top-n over block scores (NSA equations 11 and 12).
#ifndef KERNELS_CPU_SELECT_BLOCKS_H_
#define KERNELS_CPU_SELECT_BLOCKS_H_

#include <cstdint>
#include <vector>

#include "kernels/types.h"

namespace nsa::kernels::cpu {

struct ScoredBlock {
  float score;
  int32_t block;
};

// Of blocks [0, num_candidates), of which the last is the query's own: the first n_init, the last
// n_local, and those of the highest scores, ties to the lower index; all when there are no more
// than n. selected [n] is ascending, padded with -1. `heap` is scratch that callers keep for its
// capacity.
void SelectBlocks(const AttentionDims& dims, const float* scores, int64_t num_candidates,
                  std::vector<ScoredBlock>& heap, int32_t* selected);

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_SELECT_BLOCKS_H_
