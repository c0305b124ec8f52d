#include "kernels/cuda/score_select.h"

#include "kernels/cuda/score_select_stages.h"

namespace nsa::kernels::cuda {
namespace {

constexpr size_t kAlignment = 256;

// Calls launch(scratch), unless there is nothing to do or no scratch.
template <class Launch>
cudaError_t LaunchStages(const ScoreAndSelectParams& params, const Launch& launch) {
  const Queries& queries = params.queries;
  if (queries.num_tokens == 0) return cudaSuccess;
  if (params.scratch == nullptr) return cudaErrorInvalidValue;
  ScoreSelectScratch scratch = CarveScoreSelect(
      params.dims,
      {queries.num_tokens, queries.num_segments, params.num_cmp_blocks, params.num_documents},
      params.scratch);
  if (params.lse_cmp != nullptr) scratch.lse = params.lse_cmp;
  return launch(scratch);
}

}  // namespace

bool HasFastScoreSelect(const AttentionDims& dims) {
  const int32_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  const bool has_head_dims =
      (dk == 64 && dv == 64) || (dk == 128 && dv == 128) || (dk == 192 && dv == 128);
  return has_head_dims && dims.group_size() <= kMaxFastGroup;
}

bool HasFastRank(const AttentionDims& dims) {
  const int32_t num_free =
      dims.num_selected_blocks - dims.num_initial_blocks - dims.num_local_blocks;
  const int32_t cmp_strides = dims.compress_block_tokens / dims.compress_stride_tokens;
  const int32_t slc_strides = dims.select_block_tokens / dims.compress_stride_tokens;
  const auto is_one_of = [](int32_t strides, const auto&... of) {
    return ((strides == of) || ...);
  };
  return HasFastScoreSelect(dims) && num_free <= kMaxFastFree && is_one_of(cmp_strides, 1, 2, 4) &&
         is_one_of(slc_strides, 2, 4, 8) && cmp_strides <= slc_strides;
}

ScoreSelectScratch CarveScoreSelect(const AttentionDims& dims, const ScoreLimits& limits,
                                    void* base) {
  const auto begin = reinterpret_cast<uintptr_t>(base);
  ScoreSelectScratch scratch{};
  scratch.num_tiles = NumTiles(limits.num_cmp_blocks, limits.num_documents);
  const auto take = [&](size_t num_bytes) {
    void* const place = reinterpret_cast<void*>(begin + scratch.num_bytes);
    scratch.num_bytes += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return place;
  };
  const size_t tile_rows = size_t{kTileSummaries} * dims.num_kv_heads * scratch.num_tiles;
  const size_t list_bytes = sizeof(int32_t) * (size_t(limits.num_segments) + 1);
  scratch.next_item = static_cast<int32_t*>(take(2 * sizeof(int32_t)));
  scratch.attend_begin = static_cast<int32_t*>(take(list_bytes));
  scratch.rank_begin = static_cast<int32_t*>(take(list_bytes));
  scratch.keys = take(tile_rows * dims.head_dim_qk * SizeOf(dims.dtype));
  scratch.values = take(tile_rows * dims.head_dim_v * SizeOf(dims.dtype));
  scratch.lse =
      static_cast<float*>(take(sizeof(float) * size_t(limits.num_tokens) * dims.num_q_heads));
  return scratch;
}

size_t ScoreSelectScratchBytes(const AttentionDims& dims, const ScoreLimits& limits) {
  return CarveScoreSelect(dims, limits, nullptr).num_bytes;
}

cudaError_t LaunchScoreSelectFast(const ScoreAndSelectParams& params, const Device& device,
                                  cudaStream_t stream) {
  return LaunchStages(params, [&](const ScoreSelectScratch& scratch) {
    cudaError_t error = LaunchPrepareScoreSelect(params, scratch, stream);
    if (error != cudaSuccess) return error;
    error = LaunchAttendSummaries(params, scratch, device.num_sms, stream);
    if (error != cudaSuccess) return error;
    if (HasFastRank(params.dims)) {
      return LaunchRankBlocks(params, scratch, device.num_sms, stream);
    }
    // In place of the keys that have been read.
    error = LaunchPackKeysAny(params, scratch, stream);
    return error != cudaSuccess ? error : LaunchRankBlocksAny(params, scratch, stream);
  });
}

cudaError_t LaunchScoreSelectAny(const ScoreAndSelectParams& params, const Device&,
                                 cudaStream_t stream) {
  return LaunchStages(params, [&](const ScoreSelectScratch& scratch) {
    const cudaError_t error = LaunchAttendSummariesAny(params, scratch, stream);
    return error != cudaSuccess ? error : LaunchRankBlocksAny(params, scratch, stream);
  });
}

}  // namespace nsa::kernels::cuda
