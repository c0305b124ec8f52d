// What the demo keeps of a run, brings together on rank 0, and tells.
#ifndef EXAMPLES_02_DEMO_REPORT_H_
#define EXAMPLES_02_DEMO_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "examples/02_demo/haystack.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/plan/sharding.h"
#include "nsa/stats.pb.h"

namespace nsa::demo {

// Results of `num_tokens` tokens, of one rank or of the whole text.
struct RankResult {
  RankResult(const NsaConfig& config, int64_t num_tokens);
  ForwardOutputs outputs();

  NsaConfig config;
  int64_t num_tokens;
  std::vector<uint16_t> o;             // [T,Hq,Dv] bf16
  std::vector<int32_t> block_indices;  // [T,Hkv,n]
  double seconds = 0;
  ForwardStats stats;
};

// Collective. On rank 0 the results of all ranks in global token order; elsewhere an empty one.
absl::StatusOr<RankResult> GatherOnRank0(comm::Communicator& communicator, const ShardPlan& plan,
                                         const RankResult& mine);

bool SameBits(const RankResult& a, const RankResult& b);

// Bytes of blocks that all ranks fetched, beside those of an all-gather of k_slc and v_slc.
std::string FetchedAgainstAllGather(const NsaConfig& config, const ShardPlan& plan,
                                    const ForwardStats& stats);

// Which blocks the last query selected, whose they are, and what was retrieved.
std::string LastQueryReport(const Haystack& haystack, const ShardPlan& plan,
                            const RankResult& whole);

// The bytes that the last queries retrieved; NotFound when they are not the needle's answer.
std::string Retrieved(const Haystack& haystack, const RankResult& whole);
absl::Status CheckRetrieved(const Haystack& haystack, const RankResult& whole);

// sharding.svg, fetch_matrix.svg and selection_map.svg in `folder`.
absl::Status Draw(const std::string& folder, const ShardPlan& plan, const ForwardStats& stats,
                  const RankResult& whole);

}  // namespace nsa::demo

#endif  // EXAMPLES_02_DEMO_REPORT_H_
