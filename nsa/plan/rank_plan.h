// What one rank holds, owns and receives, in the form that kernels and communicators take. Pure
// host functions of the configuration and the shard plan: every rank can compute every other's.
//
// The owner of a block, compression or select, is the rank that holds its first token.
#ifndef NSA_PLAN_RANK_PLAN_H_
#define NSA_PLAN_RANK_PLAN_H_

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/types.h"
#include "nsa/config.h"
#include "nsa/plan/sharding.h"

namespace nsa {

// The documents of the packed sequence with their blocks, and who owns which block.
struct BlockMap {
  std::vector<kernels::Document> documents;
  int64_t num_cmp_blocks = 0;               // N
  int64_t num_slc_blocks = 0;               // B
  std::vector<int32_t> slc_owner;           // [B] rank
  std::vector<int32_t> slc_ordinal;         // [B] place among its owner's select blocks
  std::vector<int64_t> slc_blocks_of_rank;  // [P]

  // Document of a global token.
  int32_t DocumentOf(int64_t token) const;
};

BlockMap MakeBlockMap(const NsaConfig& config, const ShardPlan& plan);

// The branches that read keys and values, as bits; branches given the same tensors share one halo.
enum BranchBit : int { kCmpBit = 1, kSlcBit = 2, kWinBit = 4 };
inline constexpr int kNumBranchSets = 8;  // a set of branches is an index in [1, 8)

// Consecutive tokens that one rank needs and another holds.
struct HaloPiece {
  int32_t owner;
  int64_t token_begin;  // global
  int64_t num_tokens;
  int64_t halo_row;  // of the first token, in the receiver's halo buffer
};

// One send of a halo: local rows [row, row + num_tokens) go to `peer`.
struct HaloSend {
  int32_t peer;
  int64_t row;
  int64_t num_tokens;
};

// Keys and values of one set of branches, as this rank sees them.
struct BranchKv {
  std::vector<HaloPiece> receives;         // by owner, then in global order
  std::vector<HaloSend> sends;             // by peer, then in global order
  std::vector<kernels::Segment> segments;  // own and halo tokens in global order
  int64_t halo_rows = 0;                   // rows received
  int64_t send_rows = 0;                   // rows sent
};

struct RankPlan {
  int32_t rank = 0;
  int64_t num_tokens = 0;                        // T
  std::vector<kernels::Segment> query_segments;  // cover all T rows
  std::vector<kernels::BlockRun> cmp_runs;       // own compression blocks
  std::vector<kernels::BlockRun> slc_runs;       // own select blocks
  int64_t num_own_slc_blocks = 0;
  int64_t num_remote_slc_blocks = 0;        // of others, visible to a query of this rank
  std::array<BranchKv, kNumBranchSets> kv;  // by set of branches; [0] is empty
};

int64_t NumBlocks(const std::vector<kernels::BlockRun>& runs);

RankPlan MakeRankPlan(const NsaConfig& config, const ShardPlan& plan, const BlockMap& blocks,
                      int rank);

// Compression blocks that `rank` owns, as runs.
std::vector<kernels::BlockRun> OwnCompressionRuns(const NsaConfig& config, const ShardPlan& plan,
                                                  const BlockMap& blocks, int rank);

}  // namespace nsa

#endif  // NSA_PLAN_RANK_PLAN_H_
