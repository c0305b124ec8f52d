// Pictures of how a sequence is dealt, what was fetched and what was selected: pure functions from
// plans and statistics to SVG documents.
#ifndef TOOLS_SVG_DRAWINGS_H_
#define TOOLS_SVG_DRAWINGS_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "nsa/config.h"
#include "nsa/plan/rank_plan.h"
#include "nsa/plan/sharding.h"
#include "nsa/stats.pb.h"

namespace nsa::tools {

// The global sequence as a bar with its documents above, and a lane for each rank below.
std::string DrawSharding(const ShardPlan& plan);

// Bytes of selected blocks, from the rank that owns them to the rank that fetched them.
// InvalidArgument unless every rank names its bytes from every rank.
absl::StatusOr<std::string> DrawFetchMatrix(
    const ForwardStats& stats, absl::string_view title = "Selected blocks fetched between ranks");

// Which blocks the queries of one kv head selected, queries downwards and blocks to the right, both
// in global order and at most 512 cells each way; forced blocks in a colour of their own.
struct SelectionMapInput {
  const NsaConfig& config;
  const ShardPlan& plan;
  const BlockMap& blocks;
  absl::Span<const int32_t> block_indices;  // [S,n] in global order, in the query's document, or -1
  int kv_head = 0;                          // for the title
  std::string title = "";                   // empty: names the kv head
};

// InvalidArgument when block_indices has the wrong size or an index no block has.
absl::StatusOr<std::string> DrawSelectionMap(const SelectionMapInput& input);

}  // namespace nsa::tools

#endif  // TOOLS_SVG_DRAWINGS_H_
