#include "nsa/engine.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "nsa/passes/agreement.h"
#include "nsa/passes/backward.h"
#include "nsa/passes/block_fetch.h"
#include "nsa/passes/context.h"
#include "nsa/passes/engine_memory.h"
#include "nsa/passes/forward.h"
#include "nsa/passes/inputs.h"
#include "nsa/passes/saved_forward.h"
#include "nsa/passes/summaries.h"

namespace nsa {
namespace {

constexpr int64_t kMaxHiddenWidth = int64_t{1} << 20;

class EngineImpl final : public Engine {
 public:
  explicit EngineImpl(std::unique_ptr<PassContext> context) : context_(std::move(context)) {
    // A rank without tokens does not see whether branches share k and v, and so not that the other
    // ranks' arguments differ from the last ones.
    agrees_in_every_call_ = context_->options.agree_in_every_call;
    for (int rank = 0; rank < context_->plan.num_ranks(); ++rank) {
      agrees_in_every_call_ |= context_->plan.TokensOfRank(rank) == 0;
    }
  }

  absl::Status Forward(const ForwardInputs& inputs, const ForwardOutputs& outputs, void* stream,
                       SavedForward* saved) override {
    PassContext& context = *context_;
    auto* const kept = static_cast<SavedForwardImpl*>(saved);
    absl::Status mine = CheckForward(context.options, context.rank_plan.num_tokens,
                                     context.kernels->RowAlignment(), inputs, outputs);
    if (mine.ok() && kept != nullptr) mine = CheckSaved(*kept, outputs);
    FieldList fields = FieldsOfCall(inputs);
    fields.emplace_back("saved", SavedField(kept));
    NSA_RETURN_IF_ERROR(AgreeOnCall(mine, std::move(fields), agreed_forward_, stream));
    was_backward_ = false;
    Begin(inputs, context.attention_flops.total(), kept);
    if (kept != nullptr) kept->is_filled = false;
    // A failure of this rank alone would leave the others waiting for it.
    NSA_RETURN_IF_ERROR(AbortOnError(RunInOrder(stream, [&] {
      return RunForward(context, inputs, kept == nullptr ? outputs : kept->outputs(outputs.o),
                        stream);
    })));
    if (kept != nullptr) kept->is_filled = true;
    return absl::OkStatus();
  }

  int64_t SavedForwardBytes(const SaveOptions& options) const override {
    return context_->options.has_backward ? SavedForwardImpl::NumBytes(*context_, options) : 0;
  }

  absl::StatusOr<std::unique_ptr<SavedForward>> CreateSavedForward(
      const SaveOptions& options) override {
    PassContext& context = *context_;
    absl::StatusOr<std::unique_ptr<SavedForwardImpl>> saved =
        absl::FailedPreconditionError("CreateSavedForward: the engine has no backward");
    if (context.options.has_backward) saved = SavedForwardImpl::Create(context, options);
    if (options.memory != nullptr) {
      if (!saved.ok()) return saved.status();
      return std::unique_ptr<SavedForward>(*std::move(saved));
    }
    NSA_RETURN_IF_ERROR(Agree(*context.communicator, saved.status(),
                              {{"keep_summaries", options.keep_summaries ? "true" : "false"},
                               {"keep_blocks", options.keep_blocks ? "true" : "false"}}));
    return std::unique_ptr<SavedForward>(*std::move(saved));
  }

  absl::Status Backward(const ForwardInputs& inputs, const ConstTensor& d_o, SavedForward& saved,
                        const Gradients& gradients, void* stream) override {
    PassContext& context = *context_;
    const auto& kept = static_cast<const SavedForwardImpl&>(saved);
    absl::Status mine = CheckBackward(context.options, context.rank_plan.num_tokens,
                                      context.kernels->RowAlignment(), inputs, d_o, gradients);
    if (kept.owner() != &context || !kept.is_filled) {
      mine = absl::InvalidArgumentError("saved: must hold a forward of this engine");
    }
    FieldList fields = FieldsOfBackward(inputs, gradients);
    fields.emplace_back("saved", SavedField(&kept));
    NSA_RETURN_IF_ERROR(AgreeOnCall(mine, std::move(fields), agreed_backward_, stream));
    was_backward_ = true;
    Begin(inputs, BackwardFlops(context.options.config, context.attention_flops), &kept);
    return AbortOnError(RunInOrder(
        stream, [&] { return RunBackward(context, inputs, d_o, kept, gradients, stream); }));
  }

  absl::StatusOr<RankStats> LastStats() override {
    PassContext& context = *context_;
    RankStats stats = context.stats;
    if (!HasLastCall()) {
      return absl::FailedPreconditionError(
          "LastStats: needs a call of this engine that no call of another in its memory followed");
    }
    void* const beside = context.beside();
    NSA_RETURN_IF_ERROR(context.kernels->WaitFor(*context.plan_memory.done, beside));
    NSA_RETURN_IF_ERROR(context.kernels->Synchronize(beside));
    NSA_RETURN_IF_ERROR(context.stages.Read(stats));
    const bool has_counters = context.rank_plan.num_remote_slc_blocks > 0 &&
                              context.layout.kv_heads_a_piece > 0 &&
                              !(was_backward_ && context.kept_slots != nullptr);
    for (int piece = 0; has_counters && piece < stats.query_pieces(); ++piece) {
      absl::StatusOr<int64_t> end = ReadFetchCounters(context, piece, beside, stats);
      if (!end.ok()) return end.status();
    }
    if (was_backward_ && context.slot_gradients != nullptr) {
      NSA_RETURN_IF_ERROR(ReadReturnCounters(context, stats.query_pieces(), beside, stats));
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

  ForwardBlocks LastBlocks() const override {
    if (!HasLastCall()) return {};
    return {
        .is_there = true, .summaries = context_->summaries, .records = context_->records->data()};
  }

  absl::Status WaitForLastCall(void* stream) override {
    return context_->kernels->WaitFor(*context_->plan_memory.done, stream);
  }

  std::shared_ptr<EngineMemory> memory() const { return context_->memory; }

  const ShardPlan& shard_plan() const override { return context_->plan; }
  const BlockMap& block_map() const override { return context_->blocks; }

 private:
  absl::Status AbortOnError(absl::Status status) {
    return nsa::AbortOnError(*context_->communicator, std::move(status));
  }

  // Whether the memory of calls still holds what the last one left there.
  bool HasLastCall() const {
    const CallMemory* const used = context_->call_memory;
    return used != nullptr && (context_->memory->last_caller == this ||
                               (!captured_.empty() && captured_.back().get() == used));
  }

  // Calls share their memory. A graph's owner keeps it in order with other calls.
  template <typename Run>
  absl::Status RunInOrder(void* stream, Run run) {
    PassContext& context = *context_;
    const absl::StatusOr<bool> capturing = context.kernels->IsCapturing(stream);
    if (!capturing.ok()) return capturing.status();
    EngineMemory& memory = *context.memory;
    if (*capturing) {
      if (captured_.empty() || captured_.back() != memory.call_memory()) {
        captured_.push_back(memory.call_memory());
      }
      return run();
    }
    NSA_RETURN_IF_ERROR(context.kernels->WaitFor(*memory.done, stream));
    NSA_RETURN_IF_ERROR(run());
    NSA_RETURN_IF_ERROR(context.kernels->Record(*context.plan_memory.done, stream));
    return context.kernels->Record(*memory.done, stream);
  }

  // `agreed`: the fields of the last call of this kind whose arguments were compared.
  absl::Status AgreeOnCall(const absl::Status& mine, FieldList fields, FieldList& agreed,
                           void* stream) {
    PassContext& context = *context_;
    NSA_RETURN_IF_ERROR(AbortOnError(context.stages.Start(stream)));
    if (!agrees_in_every_call_ && fields == agreed) {
      NSA_RETURN_IF_ERROR(context.communicator->HealthCheck());
      return AbortOnError(mine);
    }
    const StageScope scope(context.stages, "agree");
    NSA_RETURN_IF_ERROR(Agree(*context.communicator, mine, fields));
    agreed = std::move(fields);
    return absl::OkStatus();
  }

  absl::Status CheckSaved(const SavedForwardImpl& saved, const ForwardOutputs& outputs) const {
    if (saved.owner() != context_.get()) {
      return absl::InvalidArgumentError("saved: must be made by this engine");
    }
    if (outputs.o_cmp.is_set() || outputs.o_slc.is_set() || outputs.o_win.is_set() ||
        outputs.lse_cmp != nullptr || outputs.lse_slc != nullptr || outputs.lse_win != nullptr ||
        outputs.block_indices != nullptr) {
      return absl::InvalidArgumentError("outputs: all but o must be unset with `saved`");
    }
    return absl::OkStatus();
  }

  static std::string SavedField(const SavedForwardImpl* saved) {
    if (saved == nullptr) return "none";
    return absl::StrCat(saved->summaries() == nullptr ? "without" : "with", " summaries, ",
                        saved->slots() == nullptr ? "without" : "with", " blocks");
  }

  void Begin(const ForwardInputs& inputs, double attention_flops, const SavedForwardImpl* saved) {
    PassContext& context = *context_;
    // Which another engine may have made larger since the last call.
    context.call_memory = context.memory->call_memory().get();
    context.records = context.call_memory->records.get();
    context.slot_gradients =
        context.HasSlotGradients() ? context.call_memory->slot_gradients.get() : nullptr;
    context.memory->last_caller = this;
    context.summaries = saved != nullptr && saved->summaries() != nullptr
                            ? saved->summaries()
                            : context.Buffer<char>(kSummariesBuffer);
    const bool keeps_blocks = saved != nullptr && saved->slots() != nullptr;
    context.locations = keeps_blocks && context.rank_plan.num_remote_slc_blocks > 0
                            ? saved->locations()
                            : context.Buffer<int32_t>(kLocationsBuffer);
    context.kept_slots = keeps_blocks ? saved->slots() : nullptr;
    RankStats& stats = context.stats;
    stats.Clear();
    stats.set_rank(context.rank_plan.rank);
    stats.set_num_tokens(context.rank_plan.num_tokens);
    for (int peer = 0; peer < context.plan.num_ranks(); ++peer) {
      stats.add_block_bytes_from_rank(0);
    }
    const WorkspaceLayout& layout = context.layout;
    stats.set_workspace_bytes(layout.total_bytes() + layout.window_bytes +
                              layout.slot_gradients_bytes);
    stats.set_window_bytes(layout.window_bytes);
    stats.set_fetch_slot_bytes(layout.num_bytes[kSlotsBuffer]);
    if (saved != nullptr) stats.set_saved_bytes(saved->num_bytes());
    stats.set_flops(attention_flops + CompressFlopsOfRank(context.options.config, context.rank_plan,
                                                          HiddenWidth(inputs.compress_k),
                                                          HiddenWidth(inputs.compress_v)));
  }

  std::unique_ptr<PassContext> context_;
  std::vector<std::shared_ptr<CallMemory>> captured_;  // what graphs of this engine's calls use
  bool agrees_in_every_call_;
  FieldList agreed_forward_, agreed_backward_;
  bool was_backward_ = false;  // the last call
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
  if (options.max_hidden_width < 0 || options.max_hidden_width > kMaxHiddenWidth) {
    return absl::InvalidArgumentError(absl::StrCat("max_hidden_width = ", options.max_hidden_width,
                                                   ": must lie in [0, ", kMaxHiddenWidth, "]"));
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
  fields.emplace_back("agree_in_every_call", options.agree_in_every_call ? "true" : "false");
  fields.emplace_back("has_backward", options.has_backward ? "true" : "false");
  fields.emplace_back("max_hidden_width", absl::StrCat(options.max_hidden_width));
  FieldList plan_fields = plan.Fields();
  fields.insert(fields.end(), plan_fields.begin(), plan_fields.end());
  return fields;
}

void PlanLocally(PassContext& context) {
  const NsaConfig& config = context.options.config;
  context.dims = MakeDims(config, context.options.dtype);
  context.blocks = MakeBlockMap(config, context.plan);
  context.rank_plan =
      MakeRankPlan(config, context.plan, context.blocks, context.communicator->rank());
  context.tables = MakePlanTables(context.rank_plan, context.blocks);
  context.summary_runs = SummaryRuns(config, context.dims, context.plan, context.blocks);
  context.attention_flops = AttentionFlopsOfRank(config, context.rank_plan);
}

// Collective. How the backward is cut into pieces is the same on all ranks, as each piece ends with
// gradients that go from rank to rank: the fewest kv heads that a rank can do at a time.
absl::StatusOr<BackwardRoom> AgreeOnBackward(const PassContext& context) {
  if (!context.options.has_backward) return BackwardRoom();
  const EngineOptions& options = context.options;
  const int64_t record_bytes = context.kernels->RecordBytes(context.dims);
  const int32_t mine = BackwardHeadsAPiece(context.dims, context.rank_plan, record_bytes,
                                           options.fetch_budget_bytes);
  absl::Status status;
  if (mine == 0) {
    status = absl::InvalidArgumentError(
        absl::StrCat("fetch_budget_bytes = ", options.fetch_budget_bytes, ": must be at least ",
                     context.rank_plan.num_remote_slc_blocks * record_bytes,
                     ", the remote blocks of one kv head, for a backward"));
  }
  NSA_RETURN_IF_ERROR(Agree(*context.communicator, status, {}));
  absl::StatusOr<std::vector<std::string>> all =
      context.communicator->HostAllGather(absl::StrCat(mine));
  if (!all.ok()) return all.status();
  BackwardRoom room = {.kv_heads_a_piece = mine,
                       .num_weights = MaxCompressorWeights(context.dims, options.config.compressor,
                                                           options.max_hidden_width)};
  for (const std::string& theirs : *all) {
    int32_t heads = 0;
    if (!absl::SimpleAtoi(theirs, &heads)) return absl::InternalError("unreadable: " + theirs);
    room.kv_heads_a_piece = std::min(room.kv_heads_a_piece, heads);
  }
  return room;
}

KernelBytes KernelBytesOf(const PassContext& context, const BackwardRoom& backward) {
  const kernels::Kernels& kernels = *context.kernels;
  const kernels::AttentionDims& dims = context.dims;
  KernelBytes bytes = {.record = kernels.RecordBytes(dims),
                       .score_scratch = kernels.ScoreScratchBytes(
                           dims, ScoreLimitsOf(context.rank_plan, context.blocks))};
  if (backward.kv_heads_a_piece > 0) {
    const kernels::BackwardLimits limits =
        BackwardLimitsOf(dims, context.rank_plan, context.blocks, backward.kv_heads_a_piece);
    bytes.backward_scratch = std::max({kernels.WindowBackwardScratchBytes(dims, limits),
                                       kernels.SelectedBackwardScratchBytes(dims, limits),
                                       kernels.SummariesBackwardScratchBytes(dims, limits),
                                       kernels.CompressBackwardScratchBytes(
                                           dims, context.options.config.compressor,
                                           static_cast<int32_t>(context.options.max_hidden_width),
                                           NumBlocks(context.rank_plan.cmp_runs))});
  }
  return bytes;
}

// Takes the plan's memory and fills it; needs no other rank.
absl::Status PrepareLocally(PassContext& context, const BackwardRoom& backward) {
  absl::StatusOr<WorkspaceLayout> layout = MakeWorkspaceLayout(
      context.dims, context.rank_plan, context.blocks,
      static_cast<int64_t>(context.tables.bytes.size()), KernelBytesOf(context, backward),
      context.options.fetch_budget_bytes, backward);
  if (!layout.ok()) return layout.status();
  context.layout = *layout;
  EngineMemory& memory = *context.memory;
  NSA_RETURN_IF_ERROR(memory.PrepareStreams());
  absl::StatusOr<PlanMemory> taken = memory.TakePlanMemory(context.layout.plan_bytes);
  if (!taken.ok()) return taken.status();
  context.plan_memory = *std::move(taken);
  void* const stream = memory.uploads->get();
  NSA_RETURN_IF_ERROR(context.kernels->WaitFor(*context.plan_memory.done, stream));
  NSA_RETURN_IF_ERROR(
      context.kernels->CopyFromHost(context.Buffer(kTablesBuffer), context.tables.bytes.data(),
                                    static_cast<int64_t>(context.tables.bytes.size()), stream));
  return WriteOwnLocations(context, context.Buffer<int32_t>(kLocationsBuffer), stream);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(
    const EngineOptions& options, ShardPlan plan, std::shared_ptr<comm::Communicator> communicator,
    std::shared_ptr<kernels::Kernels> kernels, const Engine* memory_of) {
  std::shared_ptr<EngineMemory> memory;
  if (memory_of != nullptr) memory = static_cast<const EngineImpl*>(memory_of)->memory();
  absl::Status mine = CheckOptions(options, plan, *communicator, *kernels);
  if (mine.ok() && memory != nullptr &&
      (memory->communicator() != communicator.get() || memory->kernels() != kernels.get())) {
    mine = absl::InvalidArgumentError(
        "memory_of: must be an engine of the same communicator and kernels");
  }
  FieldList fields = FieldsToAgreeOn(options, plan);
  fields.emplace_back("memory_of", absl::StrCat(memory == nullptr ? 0 : memory->id()));
  NSA_RETURN_IF_ERROR(Agree(*communicator, mine, fields));
  if (memory == nullptr) memory = std::make_shared<EngineMemory>(communicator, kernels);
  auto context = std::make_unique<PassContext>(options, std::move(plan), std::move(communicator),
                                               std::move(kernels), std::move(memory));
  PlanLocally(*context);
  const absl::StatusOr<BackwardRoom> backward = AgreeOnBackward(*context);
  NSA_RETURN_IF_ERROR(backward.status());
  NSA_RETURN_IF_ERROR(Agree(*context->communicator, PrepareLocally(*context, *backward), {}));
  const WorkspaceLayout& layout = context->layout;
  NSA_RETURN_IF_ERROR(context->memory->Reserve(
      {.workspace = layout.call_bytes,
       .records = layout.window_bytes,
       .slot_gradients = context->HasSlotGradients() ? layout.slot_gradients_bytes : -1}));
  return std::make_unique<EngineImpl>(std::move(context));
}

}  // namespace nsa
