#include "nsa/passes/saved_forward.h"

#include <utility>

#include "nsa/passes/block_fetch.h"

namespace nsa {

absl::StatusOr<std::unique_ptr<SavedForwardImpl>> SavedForwardImpl::Create(
    const PassContext& context, const SaveOptions& options) {
  const kernels::AttentionDims& dims = context.dims;
  const int64_t tokens = context.rank_plan.num_tokens;
  const int64_t rows = tokens * dims.num_q_heads;
  std::unique_ptr<SavedForwardImpl> saved(new SavedForwardImpl());
  saved->owner_ = &context;
  const auto take = [&saved](int64_t num_bytes) {
    return std::exchange(saved->num_bytes_, saved->num_bytes_ + AlignUp(num_bytes));
  };
  std::array<int64_t, 3> outputs, lse;
  for (int64_t& offset : outputs) offset = take(rows * dims.head_dim_v * SizeOf(dims.dtype));
  for (int64_t& offset : lse) offset = take(rows * int64_t{sizeof(float)});
  const int64_t indices =
      take(tokens * dims.num_kv_heads * dims.num_selected_blocks * int64_t{sizeof(int32_t)});
  const int64_t summaries =
      take(options.keep_summaries ? context.layout.num_bytes[kSummariesBuffer] : 0);
  const int64_t locations =
      take(options.keep_blocks ? context.layout.num_bytes[kLocationsBuffer] : 0);
  // At least a byte, so that a rank that sees no remote block keeps them too.
  const int64_t slots =
      take(options.keep_blocks ? 1 + context.rank_plan.num_remote_slc_blocks * dims.num_kv_heads *
                                         context.layout.record_bytes
                               : 0);
  absl::StatusOr<std::unique_ptr<kernels::Memory>> memory =
      context.kernels->Allocate(saved->num_bytes_);
  if (!memory.ok()) return memory.status();
  saved->memory_ = *std::move(memory);
  char* const data = static_cast<char*>(saved->memory_->data());
  for (int branch = 0; branch < 3; ++branch) {
    saved->branch_outputs_[branch] =
        Tensor(data + outputs[branch], dims.dtype, {tokens, dims.num_q_heads, dims.head_dim_v});
    saved->lse_[branch] = reinterpret_cast<float*>(data + lse[branch]);
  }
  saved->block_indices_ = reinterpret_cast<int32_t*>(data + indices);
  if (options.keep_summaries) saved->summaries_ = data + summaries;
  if (options.keep_blocks) {
    saved->slots_ = data + slots;
    saved->locations_ = reinterpret_cast<int32_t*>(data + locations);
    NSA_RETURN_IF_ERROR(WriteOwnLocations(context, saved->locations_));
  }
  return saved;
}

ForwardOutputs SavedForwardImpl::outputs(const Tensor& o) const {
  return {.o = o,
          .o_cmp = branch_outputs_[0],
          .o_slc = branch_outputs_[1],
          .o_win = branch_outputs_[2],
          .lse_cmp = lse_[0],
          .lse_slc = lse_[1],
          .lse_win = lse_[2],
          .block_indices = block_indices_};
}

}  // namespace nsa
