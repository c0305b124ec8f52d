#include "kernels/cuda/score_select.h"

#include "kernels/cuda/score_select_stages.h"

namespace nsa::kernels::cuda {
namespace {

constexpr size_t kAlignment = 256;

bool IsAligned(const ConstTensor3& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0 && tensor.row_stride % 8 == 0 &&
         tensor.head_stride % 8 == 0;
}

bool AreAligned(const ScoreAndSelectParams& params) {
  const Tensor3& o = params.o_cmp;
  return IsAligned(params.queries.q) && IsAligned(params.kc) && IsAligned(params.vc) &&
         IsAligned({o.data, o.row_stride, o.head_stride});
}

ScoreLimits LimitsOf(const ScoreAndSelectParams& params) {
  return {params.queries.num_tokens, params.queries.num_segments, params.num_cmp_blocks,
          params.num_documents};
}

}  // namespace

bool ScoreSelectSupports(const AttentionDims& dims) {
  return dims.dtype == DType::kBF16 || dims.dtype == DType::kF16;
}

bool HasFastScoreSelect(const AttentionDims& dims) {
  const int32_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  const bool has_head_dims =
      (dk == 64 && dv == 64) || (dk == 128 && dv == 128) || (dk == 192 && dv == 128);
  const int32_t num_free =
      dims.num_selected_blocks - dims.num_initial_blocks - dims.num_local_blocks;
  return ScoreSelectSupports(dims) && has_head_dims && dims.group_size() <= kMaxFastGroup &&
         num_free <= kMaxFastFree &&
         dims.compress_block_tokens == 2 * dims.compress_stride_tokens &&
         dims.select_block_tokens == 4 * dims.compress_stride_tokens;
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
  if (!HasFastScoreSelect(dims)) return 0;
  return CarveScoreSelect(dims, limits, nullptr).num_bytes;
}

cudaError_t LaunchScoreAndSelect(const ScoreAndSelectParams& params, int num_sms,
                                 cudaStream_t stream) {
  if (!ScoreSelectSupports(params.dims) || !AreAligned(params)) return cudaErrorInvalidValue;
  if (params.queries.num_tokens == 0) return cudaSuccess;
  if (!HasFastScoreSelect(params.dims)) return LaunchScoreSelectPlain(params, stream);
  if (params.scratch == nullptr) return cudaErrorInvalidValue;
  ScoreSelectScratch carved = CarveScoreSelect(params.dims, LimitsOf(params), params.scratch);
  if (params.lse_cmp != nullptr) carved.lse = params.lse_cmp;
  cudaError_t error = LaunchPrepareScoreSelect(params, carved, stream);
  if (error == cudaSuccess) error = LaunchAttendSummaries(params, carved, num_sms, stream);
  if (error == cudaSuccess) error = LaunchRankBlocks(params, carved, num_sms, stream);
  return error;
}

}  // namespace nsa::kernels::cuda
