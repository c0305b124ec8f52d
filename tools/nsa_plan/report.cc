#include "tools/nsa_plan/report.h"

#include <algorithm>
#include <functional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nsa/plan/cost.h"
#include "nsa/plan/rank_plan.h"
#include "nsa/plan/workspace.h"
#include "nsa/stats.h"
#include "nsa/stats.pb.h"
#include "tools/svg/drawings.h"

namespace nsa::tools {
namespace {

// Chunks of a rank that are written out; further ones are counted.
constexpr size_t kMaxChunksShown = 4;

struct RankCost {
  int rank;
  int64_t num_tokens;
  int64_t caller_bytes;
  WorkspaceLayout layout;
  ForwardBytes bytes;
  ForwardFlops flops;
  double dense_flops;

  int64_t memory_bytes() const { return caller_bytes + layout.total_bytes() + layout.window_bytes; }
  int64_t received_bytes() const {
    return bytes.halo_received + bytes.summaries_received + bytes.blocks_received_at_most;
  }
};

absl::StatusOr<RankCost> CostOfRank(const PlanQuestion& question, const kernels::Kernels& kernels,
                                    const BlockMap& blocks, int rank) {
  const kernels::AttentionDims dims = MakeDims(question.config, question.dtype);
  const int64_t record_bytes = kernels.RecordBytes(dims);
  const RankPlan rank_plan = MakeRankPlan(question.config, question.plan, blocks, rank);
  const int64_t table_bytes = static_cast<int64_t>(MakePlanTables(rank_plan, blocks).bytes.size());
  absl::StatusOr<WorkspaceLayout> layout = MakeWorkspaceLayout(
      dims, rank_plan, blocks, table_bytes,
      {record_bytes, kernels.ScoreScratchBytes(dims, ScoreLimitsOf(rank_plan, blocks))},
      question.fetch_budget_bytes);
  if (!layout.ok()) return layout.status();
  ForwardFlops flops = AttentionFlopsOfRank(question.config, rank_plan);
  flops.compress =
      CompressFlopsOfRank(question.config, rank_plan, question.hidden_width, question.hidden_width);
  return RankCost{
      .rank = rank,
      .num_tokens = rank_plan.num_tokens,
      .caller_bytes = CallerTensorBytes(dims, rank_plan.num_tokens, question.shared_kv),
      .layout = *layout,
      .bytes = BytesOfRank(dims, blocks, rank_plan, record_bytes, question.plan.num_tokens(),
                           question.plan.num_ranks(), question.shared_kv),
      .flops = flops,
      .dense_flops = DenseFlopsOfRank(question.config, rank_plan),
  };
}

using Row = std::vector<std::string>;

struct Column {
  const char* title;
  std::function<double(const RankCost&)> value;
};

// One row a rank and one of the sum over ranks. `ratios` are columns after those that are summed,
// made from a row's values; of the sums, too.
struct Ratio {
  const char* title;
  // The row's values, and the mean over ranks of each.
  std::function<double(const std::vector<double>& row, const std::vector<double>& mean)> value;
};

std::string Table(const std::vector<RankCost>& costs, const std::vector<Column>& columns,
                  const std::vector<Ratio>& ratios, std::string (*format)(double)) {
  std::vector<double> sums(columns.size());
  for (const RankCost& cost : costs) {
    for (size_t i = 0; i < columns.size(); ++i) sums[i] += columns[i].value(cost);
  }
  std::vector<double> mean = sums;
  for (double& value : mean) value /= static_cast<double>(costs.size());

  std::vector<Row> rows(1, {"rank"});
  for (const Column& column : columns) rows[0].push_back(column.title);
  for (const Ratio& ratio : ratios) rows[0].push_back(ratio.title);
  auto add_row = [&](std::string name, const std::vector<double>& values,
                     const std::vector<double>& reference) {
    Row row = {std::move(name)};
    for (double value : values) row.push_back(format(value));
    for (const Ratio& ratio : ratios) {
      row.push_back(absl::StrFormat("%.2f", ratio.value(values, reference)));
    }
    rows.push_back(std::move(row));
  };
  for (const RankCost& cost : costs) {
    std::vector<double> values;
    for (const Column& column : columns) values.push_back(column.value(cost));
    add_row(absl::StrCat(cost.rank), values, mean);
  }
  add_row("all", sums, sums);
  return FormatRows(rows);
}

double Quotient(double a, double b) { return b == 0 ? 0 : a / b; }

std::string ConfigSection(const PlanQuestion& question) {
  std::string text = "Config\n";
  for (const auto& [name, value] : Fields(question.config)) {
    absl::StrAppendFormat(&text, "  %-24s %s\n", name, value);
  }
  absl::StrAppendFormat(&text, "  %-24s %s\n", "dtype", NameOf(question.dtype));
  absl::StrAppendFormat(&text, "  %-24s %s\n", "branches share k and v",
                        question.shared_kv ? "yes" : "no");
  return text;
}

std::string Count(int64_t count, absl::string_view thing) {
  return absl::StrCat(count, " ", thing, count == 1 ? "" : "s");
}

std::string ShardingSection(const PlanQuestion& question, const BlockMap& blocks) {
  const ShardPlan& plan = question.plan;
  std::string text = absl::StrCat("Sharding\n  ", Count(plan.num_tokens(), "token"), " in ",
                                  Count(static_cast<int64_t>(blocks.documents.size()), "document"),
                                  ", ", Count(static_cast<int64_t>(plan.chunks().size()), "chunk"),
                                  " on ", Count(plan.num_ranks(), "rank"), "; ",
                                  Count(blocks.num_cmp_blocks, "compression block"), ", ",
                                  Count(blocks.num_slc_blocks, "select block"), "\n");
  absl::StrAppendFormat(&text, "  rank  %10s  chunks\n", "tokens");
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    const std::vector<Chunk>& chunks = plan.ChunksOfRank(rank);
    std::string list;
    for (size_t i = 0; i < std::min(chunks.size(), kMaxChunksShown); ++i) {
      absl::StrAppend(&list, i == 0 ? "" : " ", "[", chunks[i].begin, ", ", chunks[i].end(), ")");
    }
    if (chunks.size() > kMaxChunksShown) {
      absl::StrAppend(&list, " and ", chunks.size() - kMaxChunksShown, " more");
    }
    absl::StrAppendFormat(&text, "  %4d  %10d  %s\n", rank, plan.TokensOfRank(rank), list);
  }
  return text;
}

std::string MemorySection(const std::vector<RankCost>& costs) {
  auto buffers = [](const RankCost& cost, std::initializer_list<WorkspaceBuffer> of) {
    double bytes = 0;
    for (WorkspaceBuffer buffer : of) bytes += static_cast<double>(cost.layout.num_bytes[buffer]);
    return bytes;
  };
  std::string text = "Memory\n";
  text += Table(
      costs,
      {
          {"caller's tensors", [](const RankCost& c) -> double { return c.caller_bytes; }},
          {"summaries", [&](const RankCost& c) { return buffers(c, {kSummariesBuffer}); }},
          {"halo",
           [&](const RankCost& c) {
             return buffers(c, {kHaloReceivedBuffer, kHaloToSendBuffer});
           }},
          {"fetch slots", [&](const RankCost& c) { return buffers(c, {kSlotsBuffer}); }},
          {"workspace in all", [](const RankCost& c) -> double { return c.layout.total_bytes(); }},
          {"records window", [](const RankCost& c) -> double { return c.layout.window_bytes; }},
          {"together", [](const RankCost& c) -> double { return c.memory_bytes(); }},
      },
      {}, FormatBytes);
  const RankCost& largest =
      *std::max_element(costs.begin(), costs.end(), [](const RankCost& a, const RankCost& b) {
        return a.layout.total_bytes() < b.layout.total_bytes();
      });
  absl::StrAppend(&text, "  workspace of rank ", largest.rank, ":\n");
  for (int i = 0; i < kNumWorkspaceBuffers; ++i) {
    absl::StrAppendFormat(&text, "    %-22s %12s\n", NameOf(static_cast<WorkspaceBuffer>(i)),
                          FormatBytes(static_cast<double>(largest.layout.num_bytes[i])));
  }
  int32_t kv_heads_a_piece = std::numeric_limits<int32_t>::max();  // of the rank with the fewest
  for (const RankCost& cost : costs) {
    kv_heads_a_piece = std::min(kv_heads_a_piece, cost.layout.kv_heads_a_piece);
  }
  absl::StrAppend(&text, "  a record (one select block, one kv head) has ",
                  FormatBytes(static_cast<double>(costs[0].layout.record_bytes)), "; ",
                  kv_heads_a_piece == 0
                      ? "queries may be processed in pieces to stay inside the fetch budget"
                      : absl::StrCat("the blocks that ", kv_heads_a_piece,
                                     " kv heads can select fit the fetch budget at a time"),
                  "\n");
  return text;
}

std::string BytesSection(const std::vector<RankCost>& costs) {
  std::string text = "Bytes between ranks, one forward\n";
  text += Table(
      costs,
      {
          {"halo out", [](const RankCost& c) -> double { return c.bytes.halo_sent; }},
          {"halo in", [](const RankCost& c) -> double { return c.bytes.halo_received; }},
          {"summaries in", [](const RankCost& c) -> double { return c.bytes.summaries_received; }},
          {"blocks in, at most",
           [](const RankCost& c) -> double { return c.bytes.blocks_received_at_most; }},
          {"in, at most", [](const RankCost& c) -> double { return c.received_bytes(); }},
          {"dense all-gather in",
           [](const RankCost& c) -> double { return c.bytes.dense_all_gather_received; }},
      },
      {{"in / dense", [](const auto& row, const auto&) { return Quotient(row[4], row[5]); }}},
      FormatBytes);
  text +=
      "  Blocks: as if every visible block of another rank were selected by some query; each is\n"
      "  fetched once. Dense all-gather: k and v of all other ranks' tokens, for every branch.\n";
  return text;
}

std::string FormatGflop(double flops) { return absl::StrFormat("%.3f", flops * 1e-9); }

std::string FlopsSection(const std::vector<RankCost>& costs) {
  std::string text = "Arithmetic in GFLOP, one forward\n";
  text += Table(
      costs,
      {
          {"compress", [](const RankCost& c) { return c.flops.compress; }},
          {"compressed", [](const RankCost& c) { return c.flops.compressed_attention; }},
          {"selected", [](const RankCost& c) { return c.flops.selected_attention; }},
          {"window", [](const RankCost& c) { return c.flops.window_attention; }},
          {"together", [](const RankCost& c) { return c.flops.total(); }},
          {"dense", [](const RankCost& c) { return c.dense_flops; }},
      },
      {{"load", [](const auto& row, const auto& mean) { return Quotient(row[4], mean[4]); }},
       {"dense load", [](const auto& row, const auto& mean) { return Quotient(row[5], mean[5]); }},
       {"dense / NSA", [](const auto& row, const auto&) { return Quotient(row[5], row[4]); }}},
      FormatGflop);
  text += "  Load: a rank's arithmetic against the mean of all ranks. Dense: causal attention.\n";
  return text;
}

// n forced blocks at most of each query, as DrawSelectionMap takes them.
std::vector<int32_t> ForcedBlocks(const NsaConfig& config, const BlockMap& blocks) {
  std::vector<int32_t> indices;
  for (const kernels::Document& document : blocks.documents) {
    for (int64_t position = 0; position < document.num_tokens; ++position) {
      const int32_t own = static_cast<int32_t>(position / config.select_block_tokens);
      const size_t end = indices.size() + config.num_selected_blocks;
      for (int32_t block = 0; block <= std::min(own, config.num_initial_blocks - 1); ++block) {
        indices.push_back(block);
      }
      const int32_t first_local =
          std::max(own - config.num_local_blocks + 1, config.num_initial_blocks);
      for (int32_t block = first_local; block <= own; ++block) indices.push_back(block);
      indices.resize(end, -1);
    }
  }
  return indices;
}

}  // namespace

absl::StatusOr<PlanDrawings> DrawPlan(const PlanQuestion& question,
                                      const kernels::Kernels& kernels) {
  const kernels::AttentionDims dims = MakeDims(question.config, question.dtype);
  const BlockMap blocks = MakeBlockMap(question.config, question.plan);
  ForwardStats stats;
  for (int rank = 0; rank < question.plan.num_ranks(); ++rank) {
    RankStats* of_rank = stats.add_ranks();
    of_rank->set_rank(rank);
    const RankPlan rank_plan = MakeRankPlan(question.config, question.plan, blocks, rank);
    for (int64_t bytes : BlockBytesAtMost(dims, blocks, rank_plan, kernels.RecordBytes(dims))) {
      of_rank->add_block_bytes_from_rank(bytes);
    }
  }
  absl::StatusOr<std::string> fetch_matrix =
      DrawFetchMatrix(stats, "Blocks fetched between ranks, at most");
  if (!fetch_matrix.ok()) return fetch_matrix.status();
  const std::vector<int32_t> forced = ForcedBlocks(question.config, blocks);
  absl::StatusOr<std::string> selection_map =
      DrawSelectionMap({.config = question.config,
                        .plan = question.plan,
                        .blocks = blocks,
                        .block_indices = forced,
                        .title = "Blocks that queries may select, and the forced ones"});
  if (!selection_map.ok()) return selection_map.status();
  return PlanDrawings{DrawSharding(question.plan), *std::move(fetch_matrix),
                      *std::move(selection_map)};
}

absl::StatusOr<std::string> PlanReport(const PlanQuestion& question,
                                       const kernels::Kernels& kernels) {
  if (absl::Status status = Validate(question.config); !status.ok()) return status;
  if (absl::Status status = kernels.Supports(MakeDims(question.config, question.dtype));
      !status.ok()) {
    return status;
  }
  if (question.config.compressor == Compressor::kMlp && question.hidden_width < 1) {
    return absl::InvalidArgumentError(absl::StrCat("hidden_width = ", question.hidden_width,
                                                   ": must be >= 1 for the MLP compressor"));
  }
  const BlockMap blocks = MakeBlockMap(question.config, question.plan);
  std::vector<RankCost> costs;
  for (int rank = 0; rank < question.plan.num_ranks(); ++rank) {
    absl::StatusOr<RankCost> cost = CostOfRank(question, kernels, blocks, rank);
    if (!cost.ok()) {
      return absl::Status(cost.status().code(),
                          absl::StrCat("rank ", rank, ": ", cost.status().message()));
    }
    costs.push_back(*std::move(cost));
  }
  return absl::StrCat(ConfigSection(question), "\n", ShardingSection(question, blocks), "\n",
                      MemorySection(costs), "\n", BytesSection(costs), "\n", FlopsSection(costs));
}

}  // namespace nsa::tools
