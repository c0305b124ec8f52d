// What a forward would take, from plans alone: nothing is run.
#ifndef TOOLS_NSA_PLAN_REPORT_H_
#define TOOLS_NSA_PLAN_REPORT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "kernels/types.h"
#include "nsa/config.h"
#include "nsa/plan/sharding.h"

namespace nsa::tools {

struct PlanQuestion {
  NsaConfig config;
  ShardPlan plan;
  DType dtype = DType::kBF16;
  int64_t fetch_budget_bytes = int64_t{1} << 30;
  int64_t hidden_width = 0;  // F of the MLP compressor, else not read
  bool shared_kv = false;    // the three branches are given the same k and v
};

// Config, sharding, memory, bytes and arithmetic of each rank as tables. InvalidArgument when
// `kernels` or the plan cannot serve the question.
absl::StatusOr<std::string> PlanReport(const PlanQuestion& question,
                                       const kernels::Kernels& kernels);

// SVG documents of what is known before a run.
struct PlanDrawings {
  std::string sharding;
  std::string fetch_matrix;   // as if every visible block of another rank were selected
  std::string selection_map;  // what queries may select, and the blocks that are forced
};

// For a question that PlanReport has answered.
absl::StatusOr<PlanDrawings> DrawPlan(const PlanQuestion& question,
                                      const kernels::Kernels& kernels);

}  // namespace nsa::tools

#endif  // TOOLS_NSA_PLAN_REPORT_H_
