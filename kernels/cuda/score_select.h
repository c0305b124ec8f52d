// Compressed attention, importance and top-n on the GPU: Kernels::ScoreAndSelect without absl.
//
// Head dims (64,64), (128,128) and (192,128), groups of up to 64 heads, l / d = 2, l' / d = 4 and
// up to 32 free places run on Hopper's tensor cores (score_select_attend, score_select_rank); all
// else that semantics allow, in plain arithmetic (score_select_plain). Which one is taken depends
// on the dims alone, so that no result depends on how queries are grouped, placed or aligned.
#ifndef KERNELS_CUDA_SCORE_SELECT_H_
#define KERNELS_CUDA_SCORE_SELECT_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "kernels/params.h"

namespace nsa::kernels::cuda {

// Whether there is a kernel for `dims`: bf16 and f16, and what Validate(NsaConfig) allows.
// Rows and heads of q, kc, vc and o_cmp must be aligned to 16 bytes.
bool ScoreSelectSupports(const AttentionDims& dims);

// Bytes of scratch that a call within `limits` needs; 256-byte aligned memory.
size_t ScoreSelectScratchBytes(const AttentionDims& dims, const ScoreLimits& limits);

// Enqueues the stage. Allocates nothing and never waits, so it can be captured in a graph. Two
// calls that may run at the same time need scratch of their own. cudaErrorInvalidValue when there
// is none and some is needed, or when dims are not supported.
cudaError_t LaunchScoreAndSelect(const ScoreAndSelectParams& params, int num_sms,
                                 cudaStream_t stream);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_H_
