#include "kernels/cuda/attend_backward.h"

#include <limits>

namespace nsa::kernels::cuda {
namespace {

constexpr size_t kAlignment = 256;

// The key tiles of a chunk of the window see different rows of it at a time: it is kept so small
// that what CTAs are at stays in the L2. Summaries see the same rows: fewer, longer items cost
// less.
ChunkLimits WindowLimits(const AttentionDims& dims) { return {64, dims.window_tokens}; }
ChunkLimits SummariesLimits(int64_t num_cmp_blocks) { return {256, num_cmp_blocks}; }

// Of the list of documents' summaries, which scratch begins with.
size_t ListBytes(int32_t num_documents) {
  return (num_documents * sizeof(Segment) + kAlignment - 1) / kAlignment * kAlignment;
}

// dk or dv of the window.
GradientRows ToRows(const TokenGradients& gradients, const AttentionDims& dims, int32_t head_dim) {
  return {gradients.own, gradients.halo, int64_t{dims.num_kv_heads} * head_dim, head_dim,
          gradients.adds};
}

bool HasFastDims(const AttentionDims& dims) {
  const int32_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  const bool has_head_dims =
      (dk == 64 && dv == 64) || (dk == 128 && dv == 128) || (dk == 192 && dv == 128);
  return has_head_dims && dims.group_size() <= 64;
}

// Calls launch(args) with the summaries listed in the scratch.
template <class Launch>
cudaError_t LaunchOverSummaries(const AttendSummariesBackwardParams& params, const Launch& launch,
                                cudaStream_t stream) {
  if (params.scratch == nullptr) return cudaErrorInvalidValue;
  Segment* const segments = static_cast<Segment*>(params.scratch);
  const cudaError_t error =
      LaunchListSummaries(params.queries.documents, params.num_documents, segments, stream);
  return error != cudaSuccess ? error : launch(MakeArgs(params, segments));
}

}  // namespace

AttendBackwardArgs MakeArgs(const AttendWindowBackwardParams& params) {
  const AttentionDims& dims = params.dims;
  return {.dims = dims,
          .queries = params.queries,
          .k = params.k,
          .v = params.v,
          .outputs = params.outputs,
          .queries_gradients = params.queries_gradients,
          .dk = ToRows(params.dk, dims, dims.head_dim_qk),
          .dv = ToRows(params.dv, dims, dims.head_dim_v),
          .rule = {.first_position = 0, .stride = 1, .window = dims.window_tokens}};
}

AttendBackwardArgs MakeArgs(const AttendSummariesBackwardParams& params, Segment* segments) {
  const AttentionDims& dims = params.dims;
  const int64_t dk_row = int64_t{dims.num_kv_heads} * dims.head_dim_qk;
  const int64_t row = dk_row + int64_t{dims.num_kv_heads} * dims.head_dim_v;
  return {.dims = dims,
          .queries = params.queries,
          .k = {params.kc, {}, segments, params.num_documents},
          .v = {params.vc, {}, segments, params.num_documents},
          .outputs = params.outputs,
          .queries_gradients = params.queries_gradients,
          .dk = {params.d_summaries, nullptr, row, dims.head_dim_qk, false},
          .dv = {params.d_summaries + dk_row, nullptr, row, dims.head_dim_v, false},
          .rule = {.first_position = dims.compress_block_tokens - 1,
                   .stride = dims.compress_stride_tokens,
                   .window = std::numeric_limits<int32_t>::max()}};
}

size_t SummariesBackwardScratchBytes(const AttentionDims& dims, const BackwardLimits& limits) {
  if (!HasFastAttendSummariesBackward(dims)) return ListBytes(limits.num_documents);
  return ListBytes(limits.num_documents) +
         AttendBackwardScratchBytes(dims, limits.num_tokens, limits.num_segments,
                                    limits.num_kv_heads, SummariesLimits(limits.num_cmp_blocks));
}

size_t WindowBackwardScratchBytes(const AttentionDims& dims, const BackwardLimits& limits) {
  if (!HasFastAttendWindowBackward(dims)) return 0;
  return AttendBackwardScratchBytes(dims, limits.num_tokens, limits.num_segments,
                                    limits.num_kv_heads, WindowLimits(dims));
}

bool HasFastAttendSummariesBackward(const AttentionDims& dims) { return HasFastDims(dims); }

bool HasFastAttendWindowBackward(const AttentionDims& dims) {
  return HasFastDims(dims) && dims.window_tokens <= kMaxFastWindow;
}

cudaError_t LaunchAttendWindowBackwardAny(const AttendWindowBackwardParams& params,
                                          const Device& device, cudaStream_t stream) {
  return LaunchAttendBackwardAny(MakeArgs(params), device, stream);
}

cudaError_t LaunchAttendWindowBackwardFast(const AttendWindowBackwardParams& params,
                                           const Device& device, cudaStream_t stream) {
  if (params.scratch == nullptr) return cudaErrorInvalidValue;
  return LaunchAttendBackwardFast(MakeArgs(params), WindowLimits(params.dims), params.scratch,
                                  device, stream);
}

cudaError_t LaunchAttendSummariesBackwardAny(const AttendSummariesBackwardParams& params,
                                             const Device& device, cudaStream_t stream) {
  return LaunchOverSummaries(
      params,
      [&](const AttendBackwardArgs& args) { return LaunchAttendBackwardAny(args, device, stream); },
      stream);
}

cudaError_t LaunchAttendSummariesBackwardFast(const AttendSummariesBackwardParams& params,
                                              const Device& device, cudaStream_t stream) {
  void* const lists = static_cast<char*>(params.scratch) + ListBytes(params.num_documents);
  return LaunchOverSummaries(
      params,
      [&](const AttendBackwardArgs& args) {
        return LaunchAttendBackwardFast(args, SummariesLimits(params.num_cmp_blocks), lists, device,
                                        stream);
      },
      stream);
}

}  // namespace nsa::kernels::cuda
