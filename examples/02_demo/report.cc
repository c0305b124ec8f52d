#include "examples/02_demo/report.h"

#include <cstddef>
#include <cstring>

#include "absl/strings/str_format.h"
#include "examples/text/device_tensors.h"
#include "examples/text/text_tensors.h"
#include "nsa/plan/cost.h"
#include "nsa/plan/rank_plan.h"
#include "nsa/stats.h"
#include "tools/files/files.h"
#include "tools/nsa_run/gather_rows.h"
#include "tools/svg/drawings.h"

namespace nsa::examples {

absl::Status GatherOnRank0(const tools::RankContext& context, const ShardPlan& plan,
                           const ForwardOutputs& mine, Result* result) {
  // Puts rows behind those that came before.
  auto append_to = [](auto& values) {
    return [&values](absl::Span<const std::byte> rows) {
      const size_t size = values.size();
      values.resize(size + rows.size() / sizeof(values[0]));
      std::memcpy(&values[size], rows.data(), rows.size());
      return absl::OkStatus();
    };
  };
  absl::Status status = tools::GatherRows(context, plan, mine.o.data, ORowBytes(result->config),
                                          append_to(result->o));
  if (!status.ok()) return status;
  return tools::GatherRows(context, plan, mine.block_indices, IndicesRowBytes(result->config),
                           append_to(result->block_indices));
}

bool SameBits(const Result& a, const Result& b) {
  return a.o == b.o && a.block_indices == b.block_indices;
}

std::string FetchedAgainstAllGather(const NsaConfig& config, const ShardPlan& plan,
                                    const ForwardStats& stats) {
  const BlockMap blocks = MakeBlockMap(config, plan);
  double all_gather = 0;
  double fetched = 0;
  double others = 0;
  for (const RankStats& rank : stats.ranks()) {
    all_gather += static_cast<double>(BytesOfRank(MakeDims(config, DType::kBF16), blocks,
                                                  MakeRankPlan(config, plan, blocks, rank.rank()),
                                                  /*record_bytes=*/0, plan.num_tokens(),
                                                  plan.num_ranks(), /*branches_share_kv=*/true)
                                          .dense_all_gather_received);
    fetched += static_cast<double>(rank.block_bytes_received());
    others += static_cast<double>(rank.halo_bytes_received() + rank.summary_bytes_received());
  }
  return absl::StrFormat(
      "blocks fetched: %s, against %s in an all-gather of k_slc and v_slc%s; "
      "halos and summaries: %s\n",
      FormatBytes(fetched), FormatBytes(all_gather),
      all_gather > 0 ? absl::StrFormat(" (%.0f%%)", 100 * fetched / all_gather) : "",
      FormatBytes(others));
}

std::string LastQueryReport(const Haystack& haystack, const ShardPlan& plan, const Result& whole) {
  const NsaConfig& config = whole.config;
  const BlockMap blocks = MakeBlockMap(config, plan);
  const int64_t needle = haystack.answer_begin / config.select_block_tokens;
  std::string text = absl::StrFormat(
      "the last query, on rank %d, selected (block@rank; the answer lies in block %d):\n",
      plan.Locate(plan.num_tokens() - 1).rank, needle);
  for (int head = 0; head < config.num_kv_heads; ++head) {
    absl::StrAppendFormat(&text, "  kv head %d:", head);
    for (int i = 0; i < config.num_selected_blocks; ++i) {
      const int64_t row = (plan.num_tokens() - 1) * config.num_kv_heads + head;
      const int32_t block = whole.block_indices[row * config.num_selected_blocks + i];
      if (block < 0) continue;
      absl::StrAppendFormat(&text, block == needle ? " [%d@%d]" : " %d@%d", block,
                            blocks.slc_owner[block]);
    }
    text += "\n";
  }
  absl::StrAppendFormat(&text, "needle: \"%s\"\nretrieved: \"%s\"\n", haystack.answer,
                        Retrieved(haystack, whole));
  return text;
}

std::string Retrieved(const Haystack& haystack, const Result& whole) {
  std::string text;
  for (size_t i = haystack.answer.size(); i > 0; --i) {
    text += RetrievedByte(whole.config, whole.o.data(), whole.num_tokens - static_cast<int64_t>(i));
  }
  return text;
}

absl::Status CheckRetrieved(const Haystack& haystack, const Result& whole) {
  const std::string retrieved = Retrieved(haystack, whole);
  if (retrieved == haystack.answer) return absl::OkStatus();
  return absl::NotFoundError(
      absl::StrFormat("retrieved \"%s\", the needle says \"%s\"", retrieved, haystack.answer));
}

absl::Status Draw(const std::string& folder, const ShardPlan& plan, const Result& whole) {
  const NsaConfig& config = whole.config;
  const int64_t n = config.num_selected_blocks;
  std::vector<int32_t> indices;  // of kv head 0
  for (int64_t t = 0; t < whole.num_tokens; ++t) {
    const auto row = whole.block_indices.begin() + t * config.num_kv_heads * n;
    indices.insert(indices.end(), row, row + n);
  }
  const BlockMap blocks = MakeBlockMap(config, plan);
  auto fetch = tools::DrawFetchMatrix(whole.stats);
  if (!fetch.ok()) return fetch.status();
  auto selection = tools::DrawSelectionMap(
      {.config = config, .plan = plan, .blocks = blocks, .block_indices = indices});
  if (!selection.ok()) return selection.status();
  absl::Status status = tools::MakeFolder(folder);
  status.Update(tools::WriteFile(folder + "/sharding.svg", tools::DrawSharding(plan)));
  status.Update(tools::WriteFile(folder + "/fetch_matrix.svg", *fetch));
  status.Update(tools::WriteFile(folder + "/selection_map.svg", *selection));
  return status;
}

}  // namespace nsa::examples
