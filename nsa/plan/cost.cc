#include "nsa/plan/cost.h"

#include <algorithm>

#include "nsa/plan/workspace.h"

namespace nsa {
namespace {

double FlopsPerKey(const NsaConfig& config) {
  return 2.0 * config.num_q_heads * (config.head_dim_qk + config.head_dim_v);
}

// 1 + 2 + ... + count.
double SumTo(int64_t count) {
  return static_cast<double>(count) * (static_cast<double>(count) + 1) / 2;
}

// Keys that the queries at positions [0, end) of a document see, added up: a query sees one more
// compression block every d tokens from position l-1 on.
double CompressedKeysBefore(const NsaConfig& config, int64_t end) {
  const int64_t seeing = std::max<int64_t>(0, end - (config.compress_block_tokens - 1));
  const int64_t steps = seeing / config.compress_stride_tokens;
  return static_cast<double>(config.compress_stride_tokens) * SumTo(steps) +
         static_cast<double>(seeing % config.compress_stride_tokens) *
             static_cast<double>(steps + 1);
}

// All tokens up to the query's own in the first n blocks; later on n-1 whole blocks and its own
// block, which is always selected, up to its own token.
double SelectedKeysBefore(const NsaConfig& config, int64_t end) {
  const int64_t block = config.select_block_tokens;
  const int64_t dense = std::min(end, config.num_selected_blocks * block);
  const int64_t later = end - dense;  // starts at a block's first token
  return SumTo(dense) +
         static_cast<double>(later) *
             static_cast<double>((config.num_selected_blocks - 1) * block) +
         static_cast<double>(later / block) * SumTo(block) + SumTo(later % block);
}

double WindowKeysBefore(const NsaConfig& config, int64_t end) {
  const int64_t dense = std::min<int64_t>(end, config.window_tokens);
  return SumTo(dense) +
         static_cast<double>(end - dense) * static_cast<double>(config.window_tokens);
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

double BackwardFlops(const NsaConfig& config, const ForwardFlops& forward) {
  const double dk = config.head_dim_qk, dv = config.head_dim_v;
  return forward.total() * (3 * dk + 2 * dv) / (dk + dv);
}

double CompressFlopsOfRank(const NsaConfig& config, const RankPlan& rank_plan,
                           int64_t hidden_width_k, int64_t hidden_width_v) {
  return static_cast<double>(NumBlocks(rank_plan.cmp_runs)) * config.num_kv_heads *
         (CompressFlopsPerHead(config, config.head_dim_qk, static_cast<double>(hidden_width_k)) +
          CompressFlopsPerHead(config, config.head_dim_v, static_cast<double>(hidden_width_v)));
}

ForwardFlops AttentionFlopsOfRank(const NsaConfig& config, const RankPlan& rank_plan) {
  double cmp_keys = 0;
  double slc_keys = 0;
  double win_keys = 0;
  for (const kernels::Segment& segment : rank_plan.query_segments) {
    const int64_t begin = segment.position;
    const int64_t end = begin + segment.num_tokens;
    cmp_keys += CompressedKeysBefore(config, end) - CompressedKeysBefore(config, begin);
    slc_keys += SelectedKeysBefore(config, end) - SelectedKeysBefore(config, begin);
    win_keys += WindowKeysBefore(config, end) - WindowKeysBefore(config, begin);
  }
  ForwardFlops flops;
  flops.compressed_attention = cmp_keys * FlopsPerKey(config);
  flops.selected_attention = slc_keys * FlopsPerKey(config);
  flops.window_attention = win_keys * FlopsPerKey(config);
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

std::vector<int64_t> BlockBytesAtMost(const kernels::AttentionDims& dims, const BlockMap& blocks,
                                      const RankPlan& rank_plan, int64_t record_bytes) {
  std::vector<int64_t> bytes(blocks.slc_blocks_of_rank.size());
  const std::vector<kernels::Segment>& segments = rank_plan.query_segments;
  for (size_t i = 0; i < segments.size(); ++i) {
    // The last query of a document sees what the others of the rank see there.
    if (i + 1 < segments.size() && segments[i + 1].document == segments[i].document) continue;
    const int64_t last_position = segments[i].position + segments[i].num_tokens - 1;
    const int64_t begin = blocks.documents[segments[i].document].slc_block_begin;
    for (int64_t b = begin; b <= begin + last_position / dims.select_block_tokens; ++b) {
      if (blocks.slc_owner[b] == rank_plan.rank) continue;
      bytes[blocks.slc_owner[b]] += dims.num_kv_heads * record_bytes;
    }
  }
  return bytes;
}

int64_t CallerTensorBytes(const kernels::AttentionDims& dims, int64_t num_tokens,
                          bool branches_share_kv) {
  const int64_t kv_row_bytes = SummaryRowBytes(dims);  // one row of k and one of v
  const int64_t q_and_o_row_bytes =
      int64_t{dims.num_q_heads} * (dims.head_dim_qk + dims.head_dim_v) * SizeOf(dims.dtype);
  const int64_t gate_row_bytes = int64_t{dims.num_q_heads} * 3 * SizeOf(DType::kF32);
  return num_tokens *
         (q_and_o_row_bytes + gate_row_bytes + kv_row_bytes * (branches_share_kv ? 1 : 3));
}

}  // namespace nsa
