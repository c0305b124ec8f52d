// Rows that ranks hold, brought to rank 0 in global token order.
#ifndef TOOLS_NSA_RUN_GATHER_ROWS_H_
#define TOOLS_NSA_RUN_GATHER_ROWS_H_

#include <cstddef>
#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "nsa/plan/sharding.h"
#include "tools/launch/launch.h"

namespace nsa::tools {

// Receives consecutive rows.
using RowSink = std::function<absl::Status(absl::Span<const std::byte>)>;

// Collective. `rows` holds this rank's tokens, dense, `row_bytes` each, in memory of the kernels.
// Rank 0 gives them to `sink` piece by piece, so that no rank ever holds the whole.
absl::Status GatherRows(const RankContext& context, const ShardPlan& plan, const void* rows,
                        int64_t row_bytes, const RowSink& sink);

}  // namespace nsa::tools

#endif  // TOOLS_NSA_RUN_GATHER_ROWS_H_
