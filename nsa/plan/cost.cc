#include "nsa/plan/cost.h"

#include <algorithm>

#include "nsa/plan/workspace.h"

namespace nsa {
namespace {

double FlopsPerKey(const NsaConfig& config) {
  return 2.0 * config.num_q_heads * (config.head_dim_qk + config.head_dim_v);
}

int64_t NumBlocks(const std::vector<kernels::BlockRun>& runs) {
  int64_t blocks = 0;
  for (const kernels::BlockRun& run : runs) blocks += run.num_blocks;
  return blocks;
}

double CompressFlopsPerHead(const NsaConfig& config, double head_dim, double hidden_width) {
  const double block_values = config.compress_block_tokens * head_dim;
  switch (config.compressor) {
    case Compressor::kMean:
      return block_values;
    case Compressor::kWeighted:
      return 3 * block_values;
    case Compressor::kLinear:
      return (1 + 2 * head_dim) * block_values;
    case Compressor::kMlp:
      return (1 + 2 * hidden_width) * block_values + 2 * hidden_width * head_dim;
  }
  return 0;
}

}  // namespace

double CompressFlopsOfRank(const NsaConfig& config, const RankPlan& rank_plan,
                           int64_t hidden_width_k, int64_t hidden_width_v) {
  return static_cast<double>(NumBlocks(rank_plan.cmp_runs)) * config.num_kv_heads *
         (CompressFlopsPerHead(config, config.head_dim_qk, static_cast<double>(hidden_width_k)) +
          CompressFlopsPerHead(config, config.head_dim_v, static_cast<double>(hidden_width_v)));
}

ForwardFlops AttentionFlopsOfRank(const NsaConfig& config, const RankPlan& rank_plan) {
  int64_t cmp_keys = 0;
  int64_t slc_keys = 0;
  int64_t win_keys = 0;
  for (const kernels::Segment& segment : rank_plan.query_segments) {
    for (int64_t t = segment.position; t < segment.position + segment.num_tokens; ++t) {
      cmp_keys += NumCompressionBlocks(config, t + 1);
      // The block that holds t is always selected and read up to t.
      const int64_t earlier_blocks = t / config.select_block_tokens;
      slc_keys += std::min<int64_t>(earlier_blocks, config.num_selected_blocks - 1) *
                      config.select_block_tokens +
                  t % config.select_block_tokens + 1;
      win_keys += std::min<int64_t>(t + 1, config.window_tokens);
    }
  }
  ForwardFlops flops;
  flops.compressed_attention = static_cast<double>(cmp_keys) * FlopsPerKey(config);
  flops.selected_attention = static_cast<double>(slc_keys) * FlopsPerKey(config);
  flops.window_attention = static_cast<double>(win_keys) * FlopsPerKey(config);
  return flops;
}

double DenseFlopsOfRank(const NsaConfig& config, const RankPlan& rank_plan) {
  double keys = 0;
  for (const kernels::Segment& segment : rank_plan.query_segments) {
    const double first = static_cast<double>(segment.position) + 1;
    const double last = first + static_cast<double>(segment.num_tokens) - 1;
    keys += (first + last) / 2 * static_cast<double>(segment.num_tokens);
  }
  return keys * FlopsPerKey(config);
}

ForwardBytes BytesOfRank(const kernels::AttentionDims& dims, const BlockMap& blocks,
                         const RankPlan& rank_plan, int64_t record_bytes, int64_t num_tokens,
                         int num_ranks, bool branches_share_kv) {
  ForwardBytes bytes;
  const int64_t row_bytes = SummaryRowBytes(dims);
  const std::vector<int> sets = branches_share_kv ? std::vector<int>{kCmpBit | kSlcBit | kWinBit}
                                                  : std::vector<int>{kCmpBit, kSlcBit, kWinBit};
  for (int branches : sets) {
    bytes.halo_sent += rank_plan.kv[branches].send_rows * row_bytes;
    bytes.halo_received += rank_plan.kv[branches].halo_rows * row_bytes;
  }
  const int64_t own = NumBlocks(rank_plan.cmp_runs);
  bytes.summaries_sent = own * (num_ranks - 1) * row_bytes;
  bytes.summaries_received = (blocks.num_cmp_blocks - own) * row_bytes;
  bytes.blocks_received_at_most =
      rank_plan.num_remote_slc_blocks * dims.num_kv_heads * record_bytes;
  bytes.dense_all_gather_received =
      (num_tokens - rank_plan.num_tokens) * row_bytes * static_cast<int64_t>(sets.size());
  return bytes;
}

}  // namespace nsa
