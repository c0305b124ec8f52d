// What the steps of a pass share: the plan, the memory, the two backends and this call's
// statistics.
#ifndef NSA_PASSES_CONTEXT_H_
#define NSA_PASSES_CONTEXT_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/engine.h"
#include "nsa/passes/engine_memory.h"
#include "nsa/passes/stages.h"
#include "nsa/plan/cost.h"
#include "nsa/plan/rank_plan.h"
#include "nsa/plan/sharding.h"
#include "nsa/plan/workspace.h"
#include "nsa/stats.pb.h"

namespace nsa {

// Lives as long as the engine; `stats` is of the call in progress.
struct PassContext {
  PassContext(EngineOptions options, ShardPlan plan,
              std::shared_ptr<comm::Communicator> communicator,
              std::shared_ptr<kernels::Kernels> kernels, std::shared_ptr<EngineMemory> memory)
      : options(std::move(options)),
        plan(std::move(plan)),
        communicator(std::move(communicator)),
        kernels(std::move(kernels)),
        memory(std::move(memory)),
        stages(*this->kernels, this->options.on_stage, this->options.time_stages) {}
  ~PassContext() {
    if (plan_memory.memory != nullptr) memory->ReturnPlanMemory(std::move(plan_memory));
  }

  EngineOptions options;
  ShardPlan plan;
  std::shared_ptr<comm::Communicator> communicator;
  std::shared_ptr<kernels::Kernels> kernels;

  kernels::AttentionDims dims;
  BlockMap blocks;
  RankPlan rank_plan;
  PlanTables tables;
  std::vector<comm::GatherRun> summary_runs;  // who provides which rows of the summaries
  WorkspaceLayout layout;
  ForwardFlops attention_flops;
  std::shared_ptr<EngineMemory> memory;
  PlanMemory plan_memory;  // the first buffers of the layout
  Stages stages;
  RankStats stats;  // but for what the device knows: see Engine::LastStats

  // Of the call in progress.
  CallMemory* call_memory = nullptr;  // the other buffers of the layout
  comm::Window* records = nullptr;
  comm::Window* slot_gradients = nullptr;  // null without a backward, or on one rank
  // In these memories, or kept in a SavedForward.
  char* summaries = nullptr;
  int32_t* locations = nullptr;  // [Hkv,B]; with a backward [P,Hkv,B]
  char* kept_slots = nullptr;    // [Hkv,remote blocks] records; null: not kept

  // The same on all ranks.
  bool HasSlotGradients() const { return options.has_backward && plan.num_ranks() > 1; }

  // The stream of work beside that of the caller's, from Fork to Join.
  void* beside() const { return memory->beside->get(); }
  // What is enqueued on `beside` from now on begins after what `stream` has by now.
  absl::Status Fork(void* stream) { return Order(*memory->forked, stream, beside()); }
  // What is enqueued on `stream` from now on begins after what `beside` has by now.
  absl::Status Join(void* stream) { return Order(*memory->joined, beside(), stream); }

  template <typename T = void>
  T* Buffer(WorkspaceBuffer buffer, int64_t offset_bytes = 0) const {
    kernels::Memory& of = buffer < kFirstCallBuffer ? *plan_memory.memory : *call_memory->workspace;
    return reinterpret_cast<T*>(static_cast<char*>(of.data()) + layout.offset[buffer] +
                                offset_bytes);
  }
  // This rank's part of a table of locations, [Hkv,B].
  int32_t* LocationsIn(int32_t* table) const {
    const int64_t place = layout.backward.kv_heads_a_piece > 0 ? rank_plan.rank : 0;
    return table + place * dims.num_kv_heads * blocks.num_slc_blocks;
  }
  int32_t* Locations() const { return LocationsIn(locations); }
  // Of a piece of the call that begins with this kv head.
  void* Slots(int32_t first_kv_head) const {
    if (kept_slots == nullptr) return Buffer(kSlotsBuffer);
    return kept_slots + first_kv_head * rank_plan.num_remote_slc_blocks * layout.record_bytes;
  }
  // A list of the plan, where kernels read it.
  template <typename T>
  const T* Table(int64_t offset_bytes) const {
    return Buffer<const T>(kTablesBuffer, offset_bytes);
  }
  const kernels::Document* Documents() const { return Table<kernels::Document>(tables.documents); }

 private:
  absl::Status Order(kernels::Event& event, void* first, void* second) {
    absl::Status status = kernels->Record(event, first);
    return status.ok() ? kernels->WaitFor(event, second) : status;
  }
};

inline kernels::ConstTensor3 View(const ConstTensor& tensor) {
  if (!tensor.is_set()) return {};
  return {.data = tensor.data, .row_stride = tensor.strides[0], .head_stride = tensor.strides[1]};
}

inline kernels::Tensor3 View(const Tensor& tensor) {
  if (!tensor.is_set()) return {};
  return {.data = tensor.data, .row_stride = tensor.strides[0], .head_stride = tensor.strides[1]};
}

inline kernels::ConstTensor3 ReadOnly(const kernels::Tensor3& tensor) {
  return {.data = tensor.data, .row_stride = tensor.row_stride, .head_stride = tensor.head_stride};
}

inline kernels::Queries QueriesOf(const PassContext& context, const ForwardInputs& inputs) {
  return {.q = View(inputs.q),
          .segments = context.Table<kernels::Segment>(context.tables.query_segments),
          .num_segments = static_cast<int32_t>(context.rank_plan.query_segments.size()),
          .documents = context.Documents(),
          .num_tokens = context.rank_plan.num_tokens,
          .kv_heads = context.dims.all_kv_heads()};
}

}  // namespace nsa

#define NSA_RETURN_IF_ERROR(expression)                                     \
  do {                                                                      \
    if (absl::Status _status = (expression); !_status.ok()) return _status; \
  } while (false)

#endif  // NSA_PASSES_CONTEXT_H_
