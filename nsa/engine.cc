#include "nsa/engine.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nsa/passes/agreement.h"
#include "nsa/passes/block_fetch.h"
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
    NSA_RETURN_IF_ERROR(AgreeOnCall(inputs, outputs, stream));
    // A failure of this rank alone would leave the others waiting for it.
    return AbortOnError(RunInOrder(inputs, outputs, stream));
  }

  absl::StatusOr<RankStats> LastStats() override {
    PassContext& context = *context_;
    RankStats stats = context.stats;
    void* const beside = context.beside->get();
    NSA_RETURN_IF_ERROR(context.kernels->WaitFor(*context.done, beside));
    NSA_RETURN_IF_ERROR(context.kernels->Synchronize(beside));
    NSA_RETURN_IF_ERROR(context.stages.Read(stats));
    const bool has_counters =
        context.rank_plan.num_remote_slc_blocks > 0 && context.layout.kv_heads_a_piece > 0;
    for (int piece = 0; has_counters && piece < stats.query_pieces(); ++piece) {
      absl::StatusOr<int64_t> end = ReadFetchCounters(context, piece, beside, stats);
      if (!end.ok()) return end.status();
    }
    return stats;
  }

  absl::StatusOr<ForwardStats> GatherStats() override {
    const absl::StatusOr<RankStats> mine = LastStats();
    NSA_RETURN_IF_ERROR(Agree(*context_->communicator, mine.status(), {}));
    absl::StatusOr<std::vector<std::string>> all =
        context_->communicator->HostAllGather(mine->SerializeAsString());
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
  // When the communicator is what failed, the others learn of it by themselves.
  absl::Status AbortOnError(absl::Status status) {
    comm::Communicator& communicator = *context_->communicator;
    if (!status.ok() && communicator.HealthCheck().ok()) communicator.Abort(status.ToString());
    return status;
  }

  // Calls share the workspace. A graph's owner keeps it in order with other calls.
  absl::Status RunInOrder(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                          void* stream) {
    PassContext& context = *context_;
    const absl::StatusOr<bool> capturing = context.kernels->IsCapturing(stream);
    if (!capturing.ok()) return capturing.status();
    if (*capturing) return RunForward(context, inputs, outputs, stream);
    NSA_RETURN_IF_ERROR(context.kernels->WaitFor(*context.done, stream));
    NSA_RETURN_IF_ERROR(RunForward(context, inputs, outputs, stream));
    return context.kernels->Record(*context.done, stream);
  }

  absl::Status AgreeOnCall(const ForwardInputs& inputs, const ForwardOutputs& outputs,
                           void* stream) {
    PassContext& context = *context_;
    NSA_RETURN_IF_ERROR(AbortOnError(context.stages.Start(stream)));
    const absl::Status mine = CheckForward(context.options, context.rank_plan.num_tokens,
                                           context.kernels->RowAlignment(), inputs, outputs);
    FieldList fields = FieldsOfCall(inputs);
    if (!context.options.agree_in_every_call && fields == agreed_fields_) {
      NSA_RETURN_IF_ERROR(context.communicator->HealthCheck());
      return AbortOnError(mine);
    }
    const StageScope scope(context.stages, "agree");
    NSA_RETURN_IF_ERROR(Agree(*context.communicator, mine, fields));
    agreed_fields_ = std::move(fields);
    return absl::OkStatus();
  }

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
  FieldList agreed_fields_;  // of the last call whose arguments were compared
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

// Where the blocks that this rank owns lie; -1 for others. [Hkv,B]
std::vector<int32_t> OwnLocations(const PassContext& context) {
  const BlockMap& blocks = context.blocks;
  std::vector<int32_t> locations;
  for (int32_t head = 0; head < context.dims.num_kv_heads; ++head) {
    for (int64_t block = 0; block < blocks.num_slc_blocks; ++block) {
      const int64_t record =
          head * context.rank_plan.num_own_slc_blocks + blocks.slc_ordinal[block];
      const bool is_own = blocks.slc_owner[block] == context.rank_plan.rank;
      locations.push_back(is_own ? static_cast<int32_t>(record) : -1);
    }
  }
  return locations;
}

absl::Status PrepareStreams(PassContext& context) {
  absl::StatusOr<std::unique_ptr<kernels::Stream>> beside = context.kernels->CreateStream();
  if (!beside.ok()) return beside.status();
  context.beside = *std::move(beside);
  for (std::unique_ptr<kernels::Event>* event : {&context.forked, &context.joined, &context.done}) {
    absl::StatusOr<std::unique_ptr<kernels::Event>> made =
        context.kernels->CreateEvent(kernels::EventUse::kOrder);
    if (!made.ok()) return made.status();
    *event = *std::move(made);
  }
  return absl::OkStatus();
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
  absl::StatusOr<WorkspaceLayout> layout =
      MakeWorkspaceLayout(context.dims, context.rank_plan, context.blocks,
                          static_cast<int64_t>(context.tables.bytes.size()),
                          {context.kernels->RecordBytes(context.dims),
                           context.kernels->ScoreScratchBytes(
                               context.dims, ScoreLimitsOf(context.rank_plan, context.blocks))},
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
  // A rank that nothing remote is visible to never plans a fetch.
  const std::vector<int32_t> locations = OwnLocations(context);
  NSA_RETURN_IF_ERROR(context.kernels->CopyFromHost(
      context.Buffer(kLocationsBuffer), locations.data(),
      static_cast<int64_t>(locations.size() * sizeof(int32_t)), /*stream=*/nullptr));
  NSA_RETURN_IF_ERROR(context.kernels->Synchronize(/*stream=*/nullptr));
  return PrepareStreams(context);
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
