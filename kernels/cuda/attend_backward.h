// The backward of the branches that attend to a run of keys: the window, whose keys are tokens, and
// the compressed branch, whose keys are summaries. To the kernels both are the same: summaries are
// the tokens of a shorter document, and a rule says which of them a query sees.
#ifndef KERNELS_CUDA_ATTEND_BACKWARD_H_
#define KERNELS_CUDA_ATTEND_BACKWARD_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/backward_params.h"
#include "kernels/cuda/launch.h"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

// The query at position p of its document sees the `window` keys before key
// floor((p - first_position) / stride) + 1, or as many as there are.
struct VisibleRule {
  int32_t first_position;  // of a query that sees key 0
  int32_t stride;
  int32_t window;
};

// Gradients at the rows of a TokenRows.
struct GradientRows {
  float* own;
  float* halo;
  int64_t row_stride;   // in elements
  int64_t head_stride;  // in elements
  bool adds;
};

struct AttendBackwardArgs {
  AttentionDims dims;
  Queries queries;
  TokenRows k;
  TokenRows v;
  OutputGradients outputs;
  QueryGradients queries_gradients;
  GradientRows dk;
  GradientRows dv;
  VisibleRule rule;
};

// The compressed branch as such: `segments` [num_documents] are to be filled by ListSummaries.
AttendBackwardArgs MakeArgs(const AttendSummariesBackwardParams& params, Segment* segments);
AttendBackwardArgs MakeArgs(const AttendWindowBackwardParams& params);

// segments[i] = all summaries of document i.
cudaError_t LaunchListSummaries(const Document* documents, int32_t num_documents, Segment* segments,
                                cudaStream_t stream);

// Any dims.
cudaError_t LaunchAttendBackwardAny(const AttendBackwardArgs& args, const Device& device,
                                    cudaStream_t stream);

// Of the Hopper kernel's chunks of queries: tiles of 64 rows, and the keys that a query sees at
// most.
struct ChunkLimits {
  int32_t max_tiles;  // 32 and more
  int64_t max_keys;
};

// What the Hopper kernel keeps beside the gradients.
size_t AttendBackwardScratchBytes(const AttentionDims& dims, int64_t num_tokens,
                                  int32_t num_segments, int32_t num_kv_heads,
                                  const ChunkLimits& limits);
// For dims that HasFastAttendBackward; `scratch` is 256-byte aligned.
cudaError_t LaunchAttendBackwardFast(const AttendBackwardArgs& args, const ChunkLimits& limits,
                                     void* scratch, const Device& device, cudaStream_t stream);

// Scratch of the stages, for every call within `limits`.
size_t SummariesBackwardScratchBytes(const AttentionDims& dims, const BackwardLimits& limits);
size_t WindowBackwardScratchBytes(const AttentionDims& dims, const BackwardLimits& limits);

// (Dk, Dv) of (64,64), (128,128), (192,128), groups of at most 64.
bool HasFastAttendSummariesBackward(const AttentionDims& dims);
// And a window of at most kMaxFastWindow.
bool HasFastAttendWindowBackward(const AttentionDims& dims);
constexpr int32_t kMaxFastWindow = 65536;

// The stages. cudaErrorInvalidValue when scratch is needed and there is none.
cudaError_t LaunchAttendWindowBackwardAny(const AttendWindowBackwardParams& params,
                                          const Device& device, cudaStream_t stream);
cudaError_t LaunchAttendWindowBackwardFast(const AttendWindowBackwardParams& params,
                                           const Device& device, cudaStream_t stream);
cudaError_t LaunchAttendSummariesBackwardAny(const AttendSummariesBackwardParams& params,
                                             const Device& device, cudaStream_t stream);
cudaError_t LaunchAttendSummariesBackwardFast(const AttendSummariesBackwardParams& params,
                                              const Device& device, cudaStream_t stream);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_ATTEND_BACKWARD_H_
