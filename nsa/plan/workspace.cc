#include "nsa/plan/workspace.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"

namespace nsa {
namespace {

// Appends a list and returns its offset.
template <typename T>
int64_t Append(const std::vector<T>& list, std::string& bytes) {
  bytes.resize(AlignUp(static_cast<int64_t>(bytes.size())));
  const int64_t offset = static_cast<int64_t>(bytes.size());
  bytes.append(reinterpret_cast<const char*>(list.data()), list.size() * sizeof(T));
  return offset;
}

}  // namespace

PlanTables MakePlanTables(const RankPlan& rank_plan, const BlockMap& blocks) {
  PlanTables tables;
  std::string& bytes = tables.bytes;
  tables.documents = Append(blocks.documents, bytes);
  tables.query_segments = Append(rank_plan.query_segments, bytes);
  tables.cmp_runs = Append(rank_plan.cmp_runs, bytes);
  tables.slc_runs = Append(rank_plan.slc_runs, bytes);
  tables.slc_owner = Append(blocks.slc_owner, bytes);
  tables.slc_ordinal = Append(blocks.slc_ordinal, bytes);
  tables.slc_blocks_of_rank = Append(blocks.slc_blocks_of_rank, bytes);
  for (int branches = 1; branches < kNumBranchSets; ++branches) {
    const BranchKv& kv = rank_plan.kv[branches];
    tables.kv_segments[branches] = Append(kv.segments, bytes);
    std::vector<kernels::Segment> sends;
    for (const HaloSend& send : kv.sends) {
      sends.push_back({.row = send.row,
                       .num_tokens = send.num_tokens,
                       .position = 0,
                       .document = 0,
                       .is_halo = 0});
    }
    tables.send_segments[branches] = Append(sends, bytes);
  }
  return tables;
}

kernels::ScoreLimits ScoreLimitsOf(const RankPlan& rank_plan, const BlockMap& blocks) {
  return {.num_tokens = rank_plan.num_tokens,
          .num_segments = static_cast<int32_t>(rank_plan.query_segments.size()),
          .num_cmp_blocks = blocks.num_cmp_blocks,
          .num_documents = static_cast<int32_t>(blocks.documents.size())};
}

const char* NameOf(WorkspaceBuffer buffer) {
  switch (buffer) {
    case kTablesBuffer:
      return "plan tables";
    case kSummariesBuffer:
      return "summaries";
    case kHaloReceivedBuffer:
      return "halo received";
    case kHaloToSendBuffer:
      return "halo to send";
    case kWindowOutputBuffer:
      return "window output";
    case kBlockIndicesBuffer:
      return "block indices";
    case kScoreScratchBuffer:
      return "scoring scratch";
    case kLocationsBuffer:
      return "block locations";
    case kSlotPeersBuffer:
      return "fetch list: peers";
    case kSlotOffsetsBuffer:
      return "fetch list: offsets";
    case kFetchCountersBuffer:
      return "fetch counters";
    case kSlotsBuffer:
      return "fetch slots";
    case kNumWorkspaceBuffers:
      break;
  }
  return "";
}

int64_t SummaryRowBytes(const kernels::AttentionDims& dims) {
  return int64_t{dims.num_kv_heads} * (dims.head_dim_qk + dims.head_dim_v) * SizeOf(dims.dtype);
}

absl::StatusOr<WorkspaceLayout> MakeWorkspaceLayout(const kernels::AttentionDims& dims,
                                                    const RankPlan& rank_plan,
                                                    const BlockMap& blocks, int64_t table_bytes,
                                                    const KernelBytes& kernel_bytes,
                                                    int64_t fetch_budget_bytes) {
  WorkspaceLayout layout;
  const int64_t record_bytes = kernel_bytes.record;
  layout.record_bytes = record_bytes;
  const int64_t kv_heads = dims.num_kv_heads;
  const int64_t remote_records = rank_plan.num_remote_slc_blocks * kv_heads;
  const int64_t query_records = std::min(remote_records, kv_heads * dims.num_selected_blocks);
  if (fetch_budget_bytes < query_records * record_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("fetch_budget_bytes = ", fetch_budget_bytes, ": must be at least ",
                     query_records * record_bytes, ", the ", query_records, " records of ",
                     record_bytes, " bytes that one query may select"));
  }
  layout.fetch_capacity = std::min(remote_records, fetch_budget_bytes / record_bytes);
  const int64_t own_records = rank_plan.num_own_slc_blocks * kv_heads;
  if (own_records + layout.fetch_capacity > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard plan: rank ", rank_plan.rank, " would hold ", own_records,
                     " records of its own and ", layout.fetch_capacity,
                     " fetched: must be at most 2^31 - 1 together"));
  }
  layout.kv_heads_a_piece = static_cast<int32_t>(
      remote_records == 0 ? kv_heads : layout.fetch_capacity / rank_plan.num_remote_slc_blocks);
  layout.window_bytes = own_records * record_bytes;

  // One row of k and v of all heads is as large as a row of summaries. Sets of branches that share
  // tensors need no more rows than the branches alone. Each set's k and v parts start aligned.
  int64_t halo_rows = 0;
  int64_t send_rows = 0;
  for (int branch : {kCmpBit, kSlcBit, kWinBit}) {
    halo_rows += rank_plan.kv[branch].halo_rows;
    send_rows += rank_plan.kv[branch].send_rows;
  }
  const int64_t row_bytes = SummaryRowBytes(dims);
  const int64_t alignment_slack = 6 * AlignUp(1);

  std::array<int64_t, kNumWorkspaceBuffers>& bytes = layout.num_bytes;
  bytes[kTablesBuffer] = table_bytes;
  bytes[kSummariesBuffer] = blocks.num_cmp_blocks * row_bytes;
  bytes[kHaloReceivedBuffer] = halo_rows == 0 ? 0 : halo_rows * row_bytes + alignment_slack;
  bytes[kHaloToSendBuffer] = send_rows == 0 ? 0 : send_rows * row_bytes + alignment_slack;
  bytes[kWindowOutputBuffer] =
      rank_plan.num_tokens * dims.num_q_heads * dims.head_dim_v * SizeOf(dims.dtype);
  bytes[kBlockIndicesBuffer] =
      rank_plan.num_tokens * kv_heads * dims.num_selected_blocks * int64_t{sizeof(int32_t)};
  bytes[kScoreScratchBuffer] = kernel_bytes.score_scratch;
  bytes[kLocationsBuffer] = kv_heads * blocks.num_slc_blocks * int64_t{sizeof(int32_t)};
  bytes[kSlotPeersBuffer] = layout.fetch_capacity * int64_t{sizeof(int32_t)};
  bytes[kSlotOffsetsBuffer] = layout.fetch_capacity * int64_t{sizeof(int64_t)};
  const int64_t num_pieces =
      layout.kv_heads_a_piece == 0
          ? 1
          : (kv_heads + layout.kv_heads_a_piece - 1) / layout.kv_heads_a_piece;
  bytes[kFetchCountersBuffer] =
      num_pieces * FetchCounterBytes(static_cast<int>(blocks.slc_blocks_of_rank.size()));
  bytes[kSlotsBuffer] = layout.fetch_capacity * record_bytes;
  for (int i = 0; i < kNumWorkspaceBuffers; ++i) {
    layout.offset[i] = layout.total_bytes;
    layout.total_bytes += AlignUp(bytes[i]);
  }
  return layout;
}

}  // namespace nsa
