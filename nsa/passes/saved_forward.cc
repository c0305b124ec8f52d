#include "nsa/passes/saved_forward.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace nsa {
namespace {

// Where each part begins.
struct Layout {
  std::array<int64_t, 3> outputs, lse;
  int64_t block_indices, summaries, locations, slots;
  int64_t num_bytes = 0;
};

Layout LayoutOf(const PassContext& context, const SaveOptions& options) {
  const kernels::AttentionDims& dims = context.dims;
  const int64_t tokens = context.rank_plan.num_tokens;
  const int64_t rows = tokens * dims.num_q_heads;
  Layout layout;
  const auto take = [&layout](int64_t num_bytes) {
    return std::exchange(layout.num_bytes, layout.num_bytes + AlignUp(num_bytes));
  };
  for (int64_t& offset : layout.outputs) offset = take(rows * dims.head_dim_v * SizeOf(dims.dtype));
  for (int64_t& offset : layout.lse) offset = take(rows * int64_t{sizeof(float)});
  layout.block_indices =
      take(tokens * dims.num_kv_heads * dims.num_selected_blocks * int64_t{sizeof(int32_t)});
  layout.summaries = take(options.keep_summaries ? context.layout.num_bytes[kSummariesBuffer] : 0);
  layout.locations = take(options.keep_blocks ? context.layout.num_bytes[kLocationsBuffer] : 0);
  // At least a byte, so that a rank that sees no remote block keeps them too.
  layout.slots = take(options.keep_blocks ? 1 + context.rank_plan.num_remote_slc_blocks *
                                                    dims.num_kv_heads * context.layout.record_bytes
                                          : 0);
  // At least a byte, too, for a rank without tokens.
  layout.num_bytes = std::max(layout.num_bytes, AlignUp(1));
  return layout;
}

}  // namespace

int64_t SavedForwardImpl::NumBytes(const PassContext& context, const SaveOptions& options) {
  return LayoutOf(context, options).num_bytes;
}

absl::StatusOr<std::unique_ptr<SavedForwardImpl>> SavedForwardImpl::Create(
    const PassContext& context, const SaveOptions& options) {
  constexpr uintptr_t kAlignment = 64;
  const Layout layout = LayoutOf(context, options);
  std::unique_ptr<SavedForwardImpl> saved(new SavedForwardImpl());
  saved->owner_ = &context;
  saved->num_bytes_ = layout.num_bytes;
  saved->is_filled = options.is_filled;
  auto* data = static_cast<char*>(options.memory);
  if (reinterpret_cast<uintptr_t>(data) % kAlignment != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("memory: must be aligned to ", kAlignment, " bytes, ends in ",
                     absl::Hex(reinterpret_cast<uintptr_t>(data) % kAlignment)));
  }
  if (data == nullptr) {
    if (options.is_filled) {
      return absl::InvalidArgumentError("is_filled = true: must be false without `memory`");
    }
    absl::StatusOr<std::unique_ptr<kernels::Memory>> memory =
        context.kernels->Allocate(layout.num_bytes);
    if (!memory.ok()) return memory.status();
    saved->memory_ = *std::move(memory);
    data = static_cast<char*>(saved->memory_->data());
  }
  const kernels::AttentionDims& dims = context.dims;
  const std::vector<int64_t> shape = {context.rank_plan.num_tokens, dims.num_q_heads,
                                      dims.head_dim_v};
  for (int branch = 0; branch < 3; ++branch) {
    saved->branch_outputs_[branch] = Tensor(data + layout.outputs[branch], dims.dtype, shape);
    saved->lse_[branch] = reinterpret_cast<float*>(data + layout.lse[branch]);
  }
  saved->block_indices_ = reinterpret_cast<int32_t*>(data + layout.block_indices);
  if (options.keep_summaries) saved->summaries_ = data + layout.summaries;
  if (options.keep_blocks) {
    saved->slots_ = data + layout.slots;
    saved->locations_ = reinterpret_cast<int32_t*>(data + layout.locations);
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
