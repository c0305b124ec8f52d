// Compressed attention, importance and top-n on the GPU: Kernels::ScoreAndSelect without absl.
//
// The kernels for Hopper's tensor cores serve head dims (64,64), (128,128) and (192,128) and groups
// of up to 64 heads: score_select_attend any l, d and l', score_select_rank up to 32 free places,
// l / d of 1, 2 and 4 and l' / d of 2, 4 and 8 where l <= l'. score_select_attend_any and
// score_select_rank_any serve all dims on any GPU. Which one is taken depends on the GPU and the
// dims alone (dispatch.h), so that no result depends on how queries are grouped, placed or aligned.
#ifndef KERNELS_CUDA_SCORE_SELECT_H_
#define KERNELS_CUDA_SCORE_SELECT_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

// Whether Hopper's tensor cores attend over summaries for `dims`.
bool HasFastScoreSelect(const AttentionDims& dims);
// Whether they rank blocks as well; where not, LaunchScoreSelectFast takes the kernel for any dims.
bool HasFastRank(const AttentionDims& dims);

// Bytes of scratch that a call within `limits` needs; 256-byte aligned memory.
size_t ScoreSelectScratchBytes(const AttentionDims& dims, const ScoreLimits& limits);

// Each enqueues the stage, allocates nothing and never waits, so that it can be captured in a
// graph. Rows and heads of q, kc, vc and o_cmp are aligned to 16 bytes, and dims.dtype is of 16
// bits. cudaErrorInvalidValue when there is no scratch.
//
// For dims that HasFastScoreSelect.
cudaError_t LaunchScoreSelectFast(const ScoreAndSelectParams& params, const Device& device,
                                  cudaStream_t stream);
// For any dims.
cudaError_t LaunchScoreSelectAny(const ScoreAndSelectParams& params, const Device& device,
                                 cudaStream_t stream);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_H_
