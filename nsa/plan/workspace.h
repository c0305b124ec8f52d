// The memory of one rank's engine, computed once here: for taking it, for printing it, for
// planning.
#ifndef NSA_PLAN_WORKSPACE_H_
#define NSA_PLAN_WORKSPACE_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backward_params.h"
#include "kernels/params.h"
#include "kernels/types.h"
#include "nsa/plan/rank_plan.h"

namespace nsa {

// The plan's lists as one piece of memory, to be copied to where kernels read them.
struct PlanTables {
  std::string bytes;
  int64_t documents = 0;                                   // offsets into bytes, of
  int64_t query_segments = 0;                              // kernels::Segment[]
  int64_t cmp_runs = 0;                                    // kernels::BlockRun[]
  int64_t slc_runs = 0;                                    // kernels::BlockRun[]
  int64_t slc_owner = 0;                                   // int32_t[B]
  int64_t slc_ordinal = 0;                                 // int32_t[B]
  int64_t slc_blocks_of_rank = 0;                          // int64_t[P]
  std::array<int64_t, kNumBranchSets> kv_segments = {};    // kernels::Segment[], by set of branches
  std::array<int64_t, kNumBranchSets> send_segments = {};  // kernels::Segment[], rows to send
  int64_t summary_segments = 0;  // kernels::Segment[], own rows of summaries
};

PlanTables MakePlanTables(const RankPlan& rank_plan, const BlockMap& blocks);

enum WorkspaceBuffer : int {
  // What an engine keeps between its calls.
  kTablesBuffer,     // PlanTables::bytes
  kLocationsBuffer,  // [Hkv,B] int32; with a backward [P,Hkv,B], this rank's in its place

  // Of a call.
  kSummariesBuffer,      // [N, Hkv*Dk + Hkv*Dv] activations' dtype: kc then vc in each row
  kHaloReceivedBuffer,   // halo rows of k and v, for every set of branches in use
  kHaloToSendBuffer,     // rows that other ranks need, packed
  kSlotPeersBuffer,      // [capacity] int32
  kSlotOffsetsBuffer,    // [capacity] int64
  kFetchCountersBuffer,  // [pieces] FetchCounters, each followed by int64 slots_of_rank[P]
  kSlotsBuffer,          // [capacity] records

  // Of the forward alone.
  kWindowOutputBuffer,  // o_win [T,Hq,Dv] activations' dtype
  kBlockIndicesBuffer,  // [T,Hkv,n] int32
  kScoreScratchBuffer,  // of ScoreAndSelect

  // Of the backward alone, in the place of those of the forward; f32 unless said. h: the kv heads
  // of a piece.
  kGatesBuffer,             // [3,T,Hq] gates, then [3,T,Hq] deltas
  kQueryGradientsBuffer,    // [T,G*h,Dk]; before that dgate [T,Hq,3]
  kTokenGradientsBuffer,    // of one set of branches: dk and dv of own tokens, then of its halo
  kHaloGradientsBuffer,     // of tokens that others used, [send rows,Hkv*Dk], then [.., Hkv*Dv]
  kSummaryGradientsBuffer,  // [N,Hkv*(Dk+Dv)], then of each other rank [own blocks,Hkv*(Dk+Dv)]
  kRecordGradientsBuffer,   // [Hkv,own blocks] gradient records, own and others' sum
  kReturnedBuffer,          // [h,own blocks] gradient records of one other rank
  kReturnListBuffer,        // int64 offsets, int32 peers, int32 records, [h,own blocks] each
  kReturnCountersBuffer,    // [pieces,P] int32 gradient records received
  kWeightGradientsBuffer,   // of compressors of k and v; then [P, kWeightsAtATime or all] for sums
  kBackwardScratchBuffer,   // of the stage in progress
  kNumWorkspaceBuffers,
};
constexpr WorkspaceBuffer kFirstCallBuffer = kSummariesBuffer;
constexpr WorkspaceBuffer kFirstForwardBuffer = kWindowOutputBuffer;
constexpr WorkspaceBuffer kFirstBackwardBuffer = kGatesBuffer;
constexpr int64_t kWeightsAtATime = 1 << 20;  // gradients that are summed over ranks in one step

// What PlanFetch writes of a piece, before the slots that each rank's records fill.
struct FetchCounters {
  int64_t query_end;
  int64_t num_remote_picks;
  int32_t num_slots;
};
constexpr int64_t FetchCounterBytes(int num_ranks) {
  return sizeof(FetchCounters) + num_ranks * int64_t{sizeof(int64_t)};
}

// What a device's kernels say of their memory; see kernels/kernels.h.
struct KernelBytes {
  int64_t record;                // of one (select block, kv head)
  int64_t score_scratch;         // within ScoreLimitsOf
  int64_t backward_scratch = 0;  // of the stage that needs most, within BackwardLimitsOf
};
kernels::ScoreLimits ScoreLimitsOf(const RankPlan& rank_plan, const BlockMap& blocks);
kernels::BackwardLimits BackwardLimitsOf(const kernels::AttentionDims& dims,
                                         const RankPlan& rank_plan, const BlockMap& blocks,
                                         int32_t kv_heads_a_piece);

// Bytes of the gradient of one record: K's [l',Dk], V's [l',Dv], f32.
int64_t RecordGradientBytes(const kernels::AttentionDims& dims);

// Of how many kv heads this rank could do the backward at a time: their remote blocks fit into the
// fetch budget, and their dq takes no more than 2 GiB, unless one head's does. 0: the budget cannot
// hold one head's blocks.
int32_t BackwardHeadsAPiece(const kernels::AttentionDims& dims, const RankPlan& rank_plan,
                            int64_t record_bytes, int64_t fetch_budget_bytes);

// What the workspace has room for beside the forward.
struct BackwardRoom {
  int32_t kv_heads_a_piece = 0;  // the same on all ranks; 0: no backward
  int64_t num_weights = 0;       // of one compressor, at most
};
// Numbers in the learned tensors of a compressor, each begun at a multiple of kWeightsAlignment.
constexpr int64_t kWeightsAlignment = 64;
int64_t MaxCompressorWeights(const kernels::AttentionDims& dims, Compressor compressor,
                             int64_t hidden_width);

const char* NameOf(WorkspaceBuffer buffer);

struct WorkspaceLayout {
  std::array<int64_t, kNumWorkspaceBuffers> offset = {};  // multiples of 256; anew in each memory
  std::array<int64_t, kNumWorkspaceBuffers> num_bytes = {};
  int64_t plan_bytes = 0;  // of the buffers before kFirstCallBuffer
  int64_t call_bytes = 0;  // of those from there on
  int64_t total_bytes() const { return plan_bytes + call_bytes; }
  int64_t record_bytes = 0;    // of one (select block, kv head)
  int64_t fetch_capacity = 0;  // slots
  // Of so many kv heads all remote blocks fit at a time. 0: not even of one; the queries are cut
  // into pieces, and the host waits to learn where.
  int32_t kv_heads_a_piece = 0;
  int64_t window_bytes = 0;  // records of own blocks; a communicator window beside the workspace
  BackwardRoom backward;
  int64_t slot_gradients_bytes = 0;  // gradient records of slots; a second window
};

// InvalidArgument when the fetch budget can't hold one query's blocks.
absl::StatusOr<WorkspaceLayout> MakeWorkspaceLayout(const kernels::AttentionDims& dims,
                                                    const RankPlan& rank_plan,
                                                    const BlockMap& blocks, int64_t table_bytes,
                                                    const KernelBytes& kernel_bytes,
                                                    int64_t fetch_budget_bytes,
                                                    const BackwardRoom& backward = {});

// Bytes of one row of the summaries: kc and vc of one compression block, all kv heads.
int64_t SummaryRowBytes(const kernels::AttentionDims& dims);

inline int64_t AlignUp(int64_t num_bytes) { return (num_bytes + 255) / 256 * 256; }

}  // namespace nsa

#endif  // NSA_PLAN_WORKSPACE_H_
