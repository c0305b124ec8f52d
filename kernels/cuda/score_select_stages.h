// The kernels behind LaunchScoreSelectFast and LaunchScoreSelectAny, one launch function each, and
// the scratch they share.
#ifndef KERNELS_CUDA_SCORE_SELECT_STAGES_H_
#define KERNELS_CUDA_SCORE_SELECT_STAGES_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/score_select.h"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

// Summaries of a document are cut into tiles from its first one on, so that a query's sums run over
// the same tiles wherever its document lies in the sequence.
constexpr int32_t kTileSummaries = 128;

// Rows of a CTA: (query, head of one kv head) pairs.
constexpr int32_t kAttendRows = 128;
constexpr int32_t kRankRows = 256;
constexpr int32_t kRankWarpRows = 16;  // a warp's rows are of one query
constexpr int32_t kMaxFastGroup = 64;
constexpr int32_t kMaxFastFree = 32;  // a query's best blocks so far lie in the lanes of one warp

// Warps that share a query in the ranking kernel.
constexpr int32_t RankWarpsPerQuery(int32_t group_size) {
  return group_size <= 16 ? 1 : group_size <= 32 ? 2 : 4;
}

// Where a document's tiles begin among all tiles of a kv head. Rounding leaves at most one tile
// unused for each document before.
__host__ __device__ constexpr int64_t TileBegin(int64_t cmp_block_begin, int32_t document) {
  return cmp_block_begin / kTileSummaries + document;
}
constexpr int64_t NumTiles(int64_t num_cmp_blocks, int32_t num_documents) {
  return num_cmp_blocks / kTileSummaries + num_documents;
}

struct ScoreSelectScratch {
  int32_t* next_item;     // [2] of the attending and of the ranking kernel
  int32_t* attend_begin;  // [num_segments + 1] groups of queries before a segment
  int32_t* rank_begin;    // [num_segments + 1]
  // [Hkv,tiles] tiles of 128 summaries. For Hopper, keys are [Dk/64][128][64], values [2][Dv][64];
  // for any GPU, both as records hold tokens (record_layout.h).
  void* keys;
  void* values;
  float* lse;  // [T,Hq] where the caller asks for none
  int64_t num_tiles;
  size_t num_bytes;
};

// Offsets from `base`.
ScoreSelectScratch CarveScoreSelect(const AttentionDims& dims, const ScoreLimits& limits,
                                    void* base);

// For Hopper. Packs summaries into tiles, counts groups, and resets the counters.
cudaError_t LaunchPrepareScoreSelect(const ScoreAndSelectParams& params,
                                     const ScoreSelectScratch& scratch, cudaStream_t stream);
// o_cmp and lse.
cudaError_t LaunchAttendSummaries(const ScoreAndSelectParams& params,
                                  const ScoreSelectScratch& scratch, int num_sms,
                                  cudaStream_t stream);
// Block indices, from q, keys and lse. For dims that HasFastRank.
cudaError_t LaunchRankBlocks(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                             int num_sms, cudaStream_t stream);

// For any GPU and any dims. Packs keys into tiles.
cudaError_t LaunchPackKeysAny(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                              cudaStream_t stream);
// Packs keys and values into tiles; then o_cmp and lse.
cudaError_t LaunchAttendSummariesAny(const ScoreAndSelectParams& params,
                                     const ScoreSelectScratch& scratch, cudaStream_t stream);
// Block indices, from q, keys and lse.
cudaError_t LaunchRankBlocksAny(const ScoreAndSelectParams& params,
                                const ScoreSelectScratch& scratch, cudaStream_t stream);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_STAGES_H_
