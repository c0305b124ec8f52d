// Lists of selected blocks as a trained model, or one that selects at random, would make them.
#ifndef BENCHMARKS_DRAWN_BLOCKS_H_
#define BENCHMARKS_DRAWN_BLOCKS_H_

#include <cstdint>
#include <vector>

#include "kernels/types.h"

namespace nsa::benchmarks {

// [num_tokens,Hkv,n] ascending, -1 padded, of one document: the first block, the last two, and
// others drawn at random. With `pool_blocks`, 32 neighbouring queries draw theirs from a common
// pool of that many; with 0 each draws for itself.
std::vector<int32_t> DrawBlocks(const kernels::AttentionDims& dims, int64_t num_tokens,
                                int64_t pool_blocks);

// (query, key) pairs that such lists select, of one kv head on average.
double CountSelectedPairs(const kernels::AttentionDims& dims, const std::vector<int32_t>& indices);

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_DRAWN_BLOCKS_H_
