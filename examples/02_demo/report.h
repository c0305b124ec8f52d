// What the demo keeps of a run, brings together on rank 0, and tells.
#ifndef EXAMPLES_02_DEMO_REPORT_H_
#define EXAMPLES_02_DEMO_REPORT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "examples/02_demo/haystack.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/plan/sharding.h"
#include "nsa/stats.pb.h"
#include "tools/launch/launch.h"

namespace nsa::examples {

// What a forward over the whole text gave.
struct Result {
  NsaConfig config;
  int64_t num_tokens = 0;
  std::vector<uint16_t> o;             // [S,Hq,Dv] bf16
  std::vector<int32_t> block_indices;  // [S,Hkv,n]
  double seconds = 0;
  ForwardStats stats;
};

// Collective. The outputs of all ranks, in global token order, in `result` of rank 0.
absl::Status GatherOnRank0(const tools::RankContext& context, const ShardPlan& plan,
                           const ForwardOutputs& mine, Result* result);

bool SameBits(const Result& a, const Result& b);

// Bytes of blocks that all ranks fetched, beside those of an all-gather of k_slc and v_slc.
std::string FetchedAgainstAllGather(const NsaConfig& config, const ShardPlan& plan,
                                    const ForwardStats& stats);

// Which blocks the last query selected, whose they are, and what was retrieved.
std::string LastQueryReport(const Haystack& haystack, const ShardPlan& plan, const Result& whole);

// The bytes that the last queries retrieved; NotFound when they are not the needle's answer.
std::string Retrieved(const Haystack& haystack, const Result& whole);
absl::Status CheckRetrieved(const Haystack& haystack, const Result& whole);

// sharding.svg, fetch_matrix.svg and selection_map.svg in `folder`.
absl::Status Draw(const std::string& folder, const ShardPlan& plan, const Result& whole);

}  // namespace nsa::examples

#endif  // EXAMPLES_02_DEMO_REPORT_H_
