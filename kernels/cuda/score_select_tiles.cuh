// Where summaries lie among tiles, and which of them a query sees.
#ifndef KERNELS_CUDA_SCORE_SELECT_TILES_CUH_
#define KERNELS_CUDA_SCORE_SELECT_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/score_select_stages.h"

namespace nsa::kernels::cuda {

// Compression blocks that the token at `position` of its document sees.
__device__ __forceinline__ int32_t NumVisible(const AttentionDims& dims, uint32_t position) {
  const uint32_t length = dims.compress_block_tokens;
  if (position + 1 < length) return 0;
  return static_cast<int32_t>((position + 1 - length) / dims.compress_stride_tokens + 1);
}

struct Tile {
  int64_t first_row;    // of the summaries
  int32_t num_present;  // summaries in it; 0: the tile is not used
};

// Of the tiles of a kv head, in the order of documents.
__device__ inline Tile FindTile(const Document* documents, int32_t num_documents, int32_t tile) {
  int32_t low = 0, high = num_documents;  // TileBegin(low) <= tile < TileBegin(high)
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (TileBegin(documents[middle].cmp_block_begin, middle) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Document document = documents[low];
  const int64_t first =
      (tile - TileBegin(document.cmp_block_begin, low)) * static_cast<int64_t>(kTileSummaries);
  const int64_t present = document.num_cmp_blocks - first;
  return {document.cmp_block_begin + first,
          static_cast<int32_t>(present < 0                ? 0
                               : present < kTileSummaries ? present
                                                          : kTileSummaries)};
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_TILES_CUH_
