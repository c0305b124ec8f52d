#include "nsa/engine.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "nsa/passes/agreement.h"
#include "nsa/passes/context.h"
#include "nsa/passes/forward.h"
#include "nsa/passes/inputs.h"
#include "nsa/passes/summaries.h"

namespace nsa {
namespace {

class EngineImpl final : public Engine {
 public:
  explicit EngineImpl(std::unique_ptr<PassContext> context) : context_(std::move(context)) {}

  absl::Status Forward(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                       void* stream) override {
    PassContext& context = *context_;
    context.stats = FreshStats(inputs);
    {
      const StageScope scope(context, "agree");
      NSA_RETURN_IF_ERROR(
          Agree(*context.communicator,
                CheckForward(context.options, context.rank_plan.num_tokens, inputs, outputs),
                FieldsOfCall(inputs)));
    }
    absl::Status status = RunForward(context, inputs, outputs, stream);
    // A failure of this rank alone would leave the others waiting for it. When the communicator is
    // what failed, they learn of it by themselves.
    if (!status.ok() && context.communicator->HealthCheck().ok()) {
      context.communicator->Abort(status.ToString());
    }
    return status;
  }

  const RankStats& last_stats() const override { return context_->stats; }

  absl::StatusOr<ForwardStats> GatherStats() override {
    absl::StatusOr<std::vector<std::string>> all =
        context_->communicator->HostAllGather(context_->stats.SerializeAsString());
    if (!all.ok()) return all.status();
    ForwardStats stats;
    for (size_t rank = 0; rank < all->size(); ++rank) {
      if (!stats.add_ranks()->ParseFromString((*all)[rank])) {
        return absl::InternalError(absl::StrCat("rank ", rank, " sent unreadable statistics"));
      }
    }
    // One-sided reads: what a rank sent is what the others say they read from it.
    for (RankStats& sender : *stats.mutable_ranks()) {
      int64_t sent = 0;
      for (const RankStats& reader : stats.ranks()) {
        if (sender.rank() < reader.block_bytes_from_rank_size()) {
          sent += reader.block_bytes_from_rank(sender.rank());
        }
      }
      sender.set_block_bytes_sent(sent);
    }
    return stats;
  }

  const ShardPlan& shard_plan() const override { return context_->plan; }
  const BlockMap& block_map() const override { return context_->blocks; }

 private:
  RankStats FreshStats(const ForwardInputs& inputs) const {
    RankStats stats;
    stats.set_rank(context_->rank_plan.rank);
    stats.set_num_tokens(context_->rank_plan.num_tokens);
    for (int peer = 0; peer < context_->plan.num_ranks(); ++peer) {
      stats.add_block_bytes_from_rank(0);
    }
    const WorkspaceLayout& layout = context_->layout;
    stats.set_workspace_bytes(layout.total_bytes + layout.window_bytes);
    stats.set_window_bytes(layout.window_bytes);
    stats.set_fetch_slot_bytes(layout.num_bytes[kSlotsBuffer]);
    stats.set_flops(context_->attention_flops.total() +
                    CompressFlopsOfRank(context_->options.config, context_->rank_plan,
                                        HiddenWidth(inputs.compress_k),
                                        HiddenWidth(inputs.compress_v)));
    return stats;
  }

  std::unique_ptr<PassContext> context_;
};

// What this rank can tell to be wrong without the others.
absl::Status CheckOptions(const EngineOptions& options, const ShardPlan& plan,
                          const comm::Communicator& communicator, const kernels::Kernels& kernels) {
  NSA_RETURN_IF_ERROR(Validate(options.config));
  if (options.dtype != DType::kF32 && options.dtype != DType::kBF16 &&
      options.dtype != DType::kF16) {
    return absl::InvalidArgumentError(
        absl::StrCat("dtype = ", static_cast<int>(options.dtype), ": must be f32, bf16 or f16"));
  }
  if (plan.num_ranks() != communicator.size()) {
    return absl::InvalidArgumentError(absl::StrCat("shard plan: num_ranks = ", plan.num_ranks(),
                                                   ": must be the communicator's ",
                                                   communicator.size()));
  }
  return kernels.Supports(MakeDims(options.config, options.dtype));
}

FieldList FieldsToAgreeOn(const EngineOptions& options, const ShardPlan& plan) {
  FieldList fields = Fields(options.config);
  fields.emplace_back("dtype", NameOf(options.dtype));
  FieldList plan_fields = plan.Fields();
  fields.insert(fields.end(), plan_fields.begin(), plan_fields.end());
  return fields;
}

// Fills in everything that needs no other rank.
absl::Status PrepareLocally(PassContext& context) {
  const NsaConfig& config = context.options.config;
  context.dims = MakeDims(config, context.options.dtype);
  context.blocks = MakeBlockMap(config, context.plan);
  context.rank_plan =
      MakeRankPlan(config, context.plan, context.blocks, context.communicator->rank());
  context.tables = MakePlanTables(context.rank_plan, context.blocks);
  context.summary_runs = SummaryRuns(config, context.dims, context.plan, context.blocks);
  context.attention_flops = AttentionFlopsOfRank(config, context.rank_plan);
  absl::StatusOr<WorkspaceLayout> layout = MakeWorkspaceLayout(
      context.dims, context.rank_plan, context.blocks,
      static_cast<int64_t>(context.tables.bytes.size()), context.kernels->RecordBytes(context.dims),
      context.options.fetch_budget_bytes);
  if (!layout.ok()) return layout.status();
  context.layout = *layout;
  absl::StatusOr<std::unique_ptr<kernels::Memory>> workspace =
      context.kernels->Allocate(context.layout.total_bytes);
  if (!workspace.ok()) return workspace.status();
  context.workspace = *std::move(workspace);
  NSA_RETURN_IF_ERROR(context.kernels->CopyFromHost(
      context.Buffer(kTablesBuffer), context.tables.bytes.data(),
      static_cast<int64_t>(context.tables.bytes.size()), /*stream=*/nullptr));
  return context.kernels->Synchronize(/*stream=*/nullptr);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(
    const EngineOptions& options, ShardPlan plan, std::shared_ptr<comm::Communicator> communicator,
    std::shared_ptr<kernels::Kernels> kernels) {
  NSA_RETURN_IF_ERROR(Agree(*communicator, CheckOptions(options, plan, *communicator, *kernels),
                            FieldsToAgreeOn(options, plan)));
  auto context = std::make_unique<PassContext>(options, std::move(plan), std::move(communicator),
                                               std::move(kernels));
  NSA_RETURN_IF_ERROR(Agree(*context->communicator, PrepareLocally(*context), {}));
  absl::StatusOr<std::unique_ptr<comm::Window>> records =
      context->communicator->CreateWindow(context->layout.window_bytes);
  if (!records.ok()) return records.status();
  context->records = *std::move(records);
  return std::make_unique<EngineImpl>(std::move(context));
}

}  // namespace nsa
