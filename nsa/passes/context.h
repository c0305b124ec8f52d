// What the steps of a pass share: the plan, the memory, the two backends and this call's
// statistics.
#ifndef NSA_PASSES_CONTEXT_H_
#define NSA_PASSES_CONTEXT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/engine.h"
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
              std::shared_ptr<kernels::Kernels> kernels)
      : options(std::move(options)),
        plan(std::move(plan)),
        communicator(std::move(communicator)),
        kernels(std::move(kernels)) {}

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
  std::unique_ptr<kernels::Memory> workspace;
  std::unique_ptr<comm::Window> records;  // [Hkv, own select blocks] records, readable by peers
  RankStats stats;

  template <typename T = void>
  T* Buffer(WorkspaceBuffer buffer, int64_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(workspace->data()) + layout.offset[buffer] +
                                offset_bytes);
  }
  // A list of the plan, where kernels read it.
  template <typename T>
  const T* Table(int64_t offset_bytes) const {
    return Buffer<const T>(kTablesBuffer, offset_bytes);
  }
  const kernels::Document* Documents() const { return Table<kernels::Document>(tables.documents); }
};

// Announces a stage and adds the time until its end to the statistics. Host time: with kernels that
// only enqueue, it is the time to enqueue.
class StageScope {
 public:
  StageScope(PassContext& context, absl::string_view stage)
      : stats_(context.stats), stage_(stage), begin_(absl::Now()) {
    if (context.options.on_stage) context.options.on_stage(stage);
  }
  ~StageScope() {
    const double seconds = absl::ToDoubleSeconds(absl::Now() - begin_);
    for (StageTime& time : *stats_.mutable_stages()) {
      if (time.stage() == stage_) {  // a stage that runs once for each piece of the queries
        time.set_seconds(time.seconds() + seconds);
        return;
      }
    }
    StageTime* time = stats_.add_stages();
    time->set_stage(std::string(stage_));
    time->set_seconds(seconds);
  }
  StageScope(const StageScope&) = delete;
  StageScope& operator=(const StageScope&) = delete;

 private:
  RankStats& stats_;
  absl::string_view stage_;
  absl::Time begin_;
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
