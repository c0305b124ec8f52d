#include "nsa/plan/workspace.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace nsa {
namespace {

constexpr int64_t kFloat = sizeof(float);

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
  std::vector<kernels::Segment> summaries;
  for (const kernels::BlockRun& run : rank_plan.cmp_runs) {
    summaries.push_back({.row = blocks.documents[run.document].cmp_block_begin + run.first_block,
                         .num_tokens = run.num_blocks,
                         .position = 0,
                         .document = 0,
                         .is_halo = 0});
  }
  std::sort(summaries.begin(), summaries.end(),
            [](const auto& a, const auto& b) { return a.row < b.row; });
  tables.summary_segments = Append(summaries, bytes);
  return tables;
}

kernels::ScoreLimits ScoreLimitsOf(const RankPlan& rank_plan, const BlockMap& blocks) {
  return {.num_tokens = rank_plan.num_tokens,
          .num_segments = static_cast<int32_t>(rank_plan.query_segments.size()),
          .num_cmp_blocks = blocks.num_cmp_blocks,
          .num_documents = static_cast<int32_t>(blocks.documents.size())};
}

kernels::BackwardLimits BackwardLimitsOf(const kernels::AttentionDims& dims,
                                         const RankPlan& rank_plan, const BlockMap& blocks,
                                         int32_t kv_heads_a_piece) {
  return {.num_tokens = rank_plan.num_tokens,
          .num_segments = static_cast<int32_t>(rank_plan.query_segments.size()),
          .num_kv_heads = kv_heads_a_piece,
          .num_cmp_blocks = blocks.num_cmp_blocks,
          .num_slc_blocks = blocks.num_slc_blocks,
          .num_records = rank_plan.num_own_slc_blocks * dims.num_kv_heads +
                         rank_plan.num_remote_slc_blocks * kv_heads_a_piece,
          .num_documents = static_cast<int32_t>(blocks.documents.size())};
}

int64_t RecordGradientBytes(const kernels::AttentionDims& dims) {
  return int64_t{dims.select_block_tokens} * (dims.head_dim_qk + dims.head_dim_v) * kFloat;
}

int32_t BackwardHeadsAPiece(const kernels::AttentionDims& dims, const RankPlan& rank_plan,
                            int64_t record_bytes, int64_t fetch_budget_bytes) {
  constexpr int64_t kMostQueryGradientBytes = int64_t{2} << 30;
  const int64_t remote_bytes = rank_plan.num_remote_slc_blocks * record_bytes;
  const int64_t heads_fetched =
      remote_bytes == 0 ? dims.num_kv_heads : fetch_budget_bytes / remote_bytes;
  const int64_t head_bytes = rank_plan.num_tokens * dims.group_size() * dims.head_dim_qk * kFloat;
  const int64_t heads_held =
      std::max<int64_t>(1, kMostQueryGradientBytes / std::max<int64_t>(1, head_bytes));
  return static_cast<int32_t>(std::min<int64_t>({dims.num_kv_heads, heads_fetched, heads_held}));
}

int64_t MaxCompressorWeights(const kernels::AttentionDims& dims, Compressor compressor,
                             int64_t hidden_width) {
  const int64_t l = dims.compress_block_tokens;
  const int64_t d = std::max(dims.head_dim_qk, dims.head_dim_v);
  const int64_t slack = 7 * kWeightsAlignment;
  switch (compressor) {
    case Compressor::kMean:
      return 0;
    case Compressor::kWeighted:
      return dims.num_kv_heads * (l + l * d) + slack;
    case Compressor::kLinear:
      return dims.num_kv_heads * (d * l * d + l * d) + slack;
    case Compressor::kMlp:
      return dims.num_kv_heads * (hidden_width * (l * d + 1 + d) + d + l * d) + slack;
  }
  return 0;
}

const char* NameOf(WorkspaceBuffer buffer) {
  switch (buffer) {
    case kTablesBuffer:
      return "plan tables";
    case kLocationsBuffer:
      return "block locations";
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
    case kSlotPeersBuffer:
      return "fetch list: peers";
    case kSlotOffsetsBuffer:
      return "fetch list: offsets";
    case kFetchCountersBuffer:
      return "fetch counters";
    case kSlotsBuffer:
      return "fetch slots";
    case kGatesBuffer:
      return "gates and deltas";
    case kQueryGradientsBuffer:
      return "gradients of queries";
    case kTokenGradientsBuffer:
      return "gradients of tokens";
    case kHaloGradientsBuffer:
      return "halo gradients received";
    case kSummaryGradientsBuffer:
      return "gradients of summaries";
    case kRecordGradientsBuffer:
      return "gradients of own records";
    case kReturnedBuffer:
      return "gradients of records received";
    case kReturnListBuffer:
      return "return list";
    case kReturnCountersBuffer:
      return "return counters";
    case kWeightGradientsBuffer:
      return "gradients of compressors";
    case kBackwardScratchBuffer:
      return "backward scratch";
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
                                                    int64_t fetch_budget_bytes,
                                                    const BackwardRoom& backward) {
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
  const auto num_ranks = static_cast<int64_t>(blocks.slc_blocks_of_rank.size());
  const bool has_backward = backward.kv_heads_a_piece > 0;
  bytes[kLocationsBuffer] =
      (has_backward ? num_ranks : 1) * kv_heads * blocks.num_slc_blocks * int64_t{sizeof(int32_t)};
  bytes[kSlotPeersBuffer] = layout.fetch_capacity * int64_t{sizeof(int32_t)};
  bytes[kSlotOffsetsBuffer] = layout.fetch_capacity * int64_t{sizeof(int64_t)};
  const auto num_pieces = [kv_heads](int64_t heads_a_piece) {
    return heads_a_piece == 0 ? 1 : (kv_heads + heads_a_piece - 1) / heads_a_piece;
  };
  bytes[kFetchCountersBuffer] =
      std::max(num_pieces(layout.kv_heads_a_piece), num_pieces(backward.kv_heads_a_piece)) *
      FetchCounterBytes(static_cast<int>(num_ranks));
  bytes[kSlotsBuffer] = layout.fetch_capacity * record_bytes;
  if (has_backward) {
    const int64_t heads = backward.kv_heads_a_piece;
    const int64_t rows = rank_plan.num_tokens * dims.num_q_heads;
    const int64_t dim = dims.head_dim_qk + dims.head_dim_v;
    const int64_t gradient_bytes = RecordGradientBytes(dims);
    const int64_t returned = heads * rank_plan.num_own_slc_blocks;
    const int64_t own_summaries = NumBlocks(rank_plan.cmp_runs);
    int64_t most_halo_rows = 0, most_send_rows = 0;
    for (const BranchKv& kv : rank_plan.kv) {
      most_halo_rows = std::max(most_halo_rows, kv.halo_rows);
      most_send_rows = std::max(most_send_rows, kv.send_rows);
    }
    layout.backward = backward;
    layout.slot_gradients_bytes = heads * rank_plan.num_remote_slc_blocks * gradient_bytes;
    bytes[kGatesBuffer] = 6 * rows * kFloat;
    bytes[kQueryGradientsBuffer] =
        std::max(rank_plan.num_tokens * heads * dims.group_size() * dims.head_dim_qk, 3 * rows) *
        kFloat;
    bytes[kTokenGradientsBuffer] =
        (rank_plan.num_tokens + most_halo_rows) * kv_heads * dim * kFloat;
    bytes[kHaloGradientsBuffer] = most_send_rows * kv_heads * dim * kFloat;
    bytes[kSummaryGradientsBuffer] =
        (blocks.num_cmp_blocks + (num_ranks - 1) * own_summaries) * kv_heads * dim * kFloat;
    bytes[kRecordGradientsBuffer] = own_records * gradient_bytes;
    if (num_ranks > 1) {
      bytes[kReturnedBuffer] = returned * gradient_bytes;
      bytes[kReturnListBuffer] = returned * int64_t{sizeof(int64_t) + 2 * sizeof(int32_t)};
      bytes[kReturnCountersBuffer] = num_pieces(heads) * num_ranks * int64_t{sizeof(int32_t)};
    }
    if (backward.num_weights > 0) {
      bytes[kWeightGradientsBuffer] =
          (2 * backward.num_weights + num_ranks * std::min(backward.num_weights, kWeightsAtATime)) *
          kFloat;
    }
    bytes[kBackwardScratchBuffer] = kernel_bytes.backward_scratch;
  }
  int64_t end = 0, first_of_pass = 0;
  for (int i = 0; i < kNumWorkspaceBuffers; ++i) {
    if (i == kFirstCallBuffer) layout.plan_bytes = std::exchange(end, 0);
    if (i == kFirstForwardBuffer) first_of_pass = end;
    if (i == kFirstBackwardBuffer) end = first_of_pass;
    layout.offset[i] = end;
    end += AlignUp(bytes[i]);
    if (i >= kFirstCallBuffer) layout.call_bytes = std::max(layout.call_bytes, end);
  }
  return layout;
}

}  // namespace nsa
