// Arithmetic and bytes of one forward, per rank, from the plan alone.
#ifndef NSA_PLAN_COST_H_
#define NSA_PLAN_COST_H_

#include <cstdint>
#include <vector>

#include "kernels/types.h"
#include "nsa/config.h"
#include "nsa/plan/rank_plan.h"

namespace nsa {

// Floating-point operations, a multiply-add counting two. Attention over a key costs 2 Dk for the
// score and 2 Dv for the value, per query head; masked keys are not counted.
struct ForwardFlops {
  double compress = 0;
  double compressed_attention = 0;
  double selected_attention = 0;
  double window_attention = 0;

  double total() const {
    return compress + compressed_attention + selected_attention + window_attention;
  }
};

// All but `compress`.
ForwardFlops AttentionFlopsOfRank(const NsaConfig& config, const RankPlan& rank_plan);

// Of the backward of this attention: per key the score again, dO.v, and what goes to dq, dk and dv.
double BackwardFlops(const NsaConfig& config, const ForwardFlops& forward);

// Of making the rank's own summaries. `hidden_width_k` and `_v` (F) count for the MLP only.
double CompressFlopsOfRank(const NsaConfig& config, const RankPlan& rank_plan,
                           int64_t hidden_width_k, int64_t hidden_width_v);

// Dense causal attention over the same documents and queries, for comparison.
double DenseFlopsOfRank(const NsaConfig& config, const RankPlan& rank_plan);

// Bytes that a rank sends and receives; `branches_share_kv`: all branches are given the same k, v.
struct ForwardBytes {
  int64_t halo_sent = 0;
  int64_t halo_received = 0;
  int64_t summaries_sent = 0;
  int64_t summaries_received = 0;
  int64_t blocks_received_at_most = 0;    // every remote block that is visible, once
  int64_t dense_all_gather_received = 0;  // all k and v of the other ranks, for comparison
};

ForwardBytes BytesOfRank(const kernels::AttentionDims& dims, const BlockMap& blocks,
                         const RankPlan& rank_plan, int64_t record_bytes, int64_t num_tokens,
                         int num_ranks, bool branches_share_kv);

// What of blocks_received_at_most comes from each rank: every remote block that a query of the rank
// may see, all kv heads, once. [P]
std::vector<int64_t> BlockBytesAtMost(const kernels::AttentionDims& dims, const BlockMap& blocks,
                                      const RankPlan& rank_plan, int64_t record_bytes);

// q, k, v, gate (in f32) and o of `num_tokens` tokens, as the engine's caller holds them.
int64_t CallerTensorBytes(const kernels::AttentionDims& dims, int64_t num_tokens,
                          bool branches_share_kv);

}  // namespace nsa

#endif  // NSA_PLAN_COST_H_
