#include "nsa/plan/workspace.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nsa/plan/cost.h"

namespace nsa {
namespace {

using ::testing::HasSubstr;

struct Planned {
  NsaConfig config;
  ShardPlan plan;
  BlockMap blocks;
  RankPlan rank_plan;
};

Planned Plan(int rank, int64_t num_tokens, int num_ranks) {
  NsaConfig config;
  ShardPlan plan = *ShardPlan::Parse("contiguous", num_tokens, num_ranks);
  BlockMap blocks = MakeBlockMap(config, plan);
  RankPlan rank_plan = MakeRankPlan(config, plan, blocks, rank);
  return {config, plan, blocks, rank_plan};
}

TEST(WorkspaceTest, BuffersFollowOneAnotherAlignedAndDisjoint) {
  const Planned p = Plan(2, 4096, 4);
  const auto dims = MakeDims(p.config, DType::kBF16);
  const PlanTables tables = MakePlanTables(p.rank_plan, p.blocks);
  const auto layout =
      MakeWorkspaceLayout(dims, p.rank_plan, p.blocks, static_cast<int64_t>(tables.bytes.size()),
                          {32768, 1000}, 1 << 30);
  ASSERT_TRUE(layout.ok()) << layout.status();
  int64_t end = 0;
  for (int i = 0; i < kFirstBackwardBuffer; ++i) {
    if (i == kFirstCallBuffer) {
      EXPECT_GE(layout->plan_bytes, end);
      end = 0;
    }
    EXPECT_EQ(layout->offset[i] % 256, 0);
    EXPECT_GE(layout->offset[i], end);
    end = layout->offset[i] + layout->num_bytes[i];
    EXPECT_STRNE(NameOf(static_cast<WorkspaceBuffer>(i)), "");
  }
  EXPECT_GE(layout->call_bytes, end);
  // Tokens [2048, 3072) see the 32 blocks of ranks 0 and 1, for 4 kv heads.
  EXPECT_EQ(layout->fetch_capacity, 32 * 4);
  EXPECT_EQ(layout->kv_heads_a_piece, 4);
  EXPECT_EQ(layout->num_bytes[kScoreScratchBuffer], 1000);
  EXPECT_EQ(layout->window_bytes, 16 * 4 * 32768);
}

TEST(WorkspaceTest, BackwardTakesThePlaceOfTheForward) {
  const Planned p = Plan(2, 4096, 4);
  const auto dims = MakeDims(p.config, DType::kBF16);
  const int32_t heads = BackwardHeadsAPiece(dims, p.rank_plan, 32768, 70 * 32768);
  EXPECT_EQ(heads, 2) << "of 32 remote blocks each";
  EXPECT_EQ(BackwardHeadsAPiece(dims, p.rank_plan, 32768, 31 * 32768), 0);
  EXPECT_EQ(BackwardHeadsAPiece(dims, Plan(0, 4096, 1).rank_plan, 32768, 0), 4)
      << "nothing is remote";
  const auto layout = MakeWorkspaceLayout(dims, p.rank_plan, p.blocks, 0, {32768, 1000, 2000},
                                          70 * 32768, {.kv_heads_a_piece = heads});
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(layout->offset[kFirstBackwardBuffer], layout->offset[kFirstForwardBuffer]);
  int64_t end = layout->offset[kFirstBackwardBuffer];
  for (int i = kFirstBackwardBuffer; i < kNumWorkspaceBuffers; ++i) {
    EXPECT_EQ(layout->offset[i] % 256, 0);
    EXPECT_GE(layout->offset[i], end);
    end = layout->offset[i] + layout->num_bytes[i];
    EXPECT_STRNE(NameOf(static_cast<WorkspaceBuffer>(i)), "");
  }
  EXPECT_GE(layout->call_bytes, end);
  const int64_t gradient_bytes = RecordGradientBytes(dims);
  EXPECT_EQ(gradient_bytes, 64 * (128 + 128) * 4);
  EXPECT_EQ(layout->slot_gradients_bytes, 2 * 32 * gradient_bytes);
  EXPECT_EQ(layout->num_bytes[kRecordGradientsBuffer], 4 * 16 * gradient_bytes);
  EXPECT_EQ(layout->num_bytes[kReturnedBuffer], 2 * 16 * gradient_bytes);
  EXPECT_EQ(layout->num_bytes[kQueryGradientsBuffer], 1024 * 2 * 16 * 128 * 4);
  EXPECT_EQ(layout->num_bytes[kBackwardScratchBuffer], 2000);
}

TEST(WorkspaceTest, SumsOfWeightsTakeNoMoreThanTheWeights) {
  const Planned p = Plan(2, 4096, 4);
  const auto dims = MakeDims(p.config, DType::kBF16);
  for (const int64_t num_weights : {int64_t{1000}, 3 * kWeightsAtATime}) {
    const auto layout = MakeWorkspaceLayout(dims, p.rank_plan, p.blocks, 0, {32768, 0, 0}, 1 << 30,
                                            {.kv_heads_a_piece = 4, .num_weights = num_weights});
    ASSERT_TRUE(layout.ok()) << layout.status();
    EXPECT_EQ(layout->num_bytes[kWeightGradientsBuffer],
              4 * (2 * num_weights + 4 * std::min(num_weights, kWeightsAtATime)));
  }
}

TEST(WorkspaceTest, FetchBudgetBoundsTheSlots) {
  const Planned p = Plan(3, 65536, 4);
  const auto dims = MakeDims(p.config, DType::kBF16);
  const int64_t record = 32768;
  const auto layout =
      MakeWorkspaceLayout(dims, p.rank_plan, p.blocks, 0, {record, 0}, 100 * record + 5);
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(layout->fetch_capacity, 100);
  EXPECT_EQ(layout->kv_heads_a_piece, 0);
  // 768 blocks of ranks 0 to 2 a kv head.
  const auto heads =
      MakeWorkspaceLayout(dims, p.rank_plan, p.blocks, 0, {record, 0}, 1600 * record);
  ASSERT_TRUE(heads.ok()) << heads.status();
  EXPECT_EQ(heads->kv_heads_a_piece, 2);
  const auto too_small =
      MakeWorkspaceLayout(dims, p.rank_plan, p.blocks, 0, {record, 0}, 63 * record);
  EXPECT_THAT(std::string(too_small.status().message()),
              HasSubstr("fetch_budget_bytes = 2064384: must be at least 2097152"));
  // A rank that sees nothing remote needs no slots at all.
  const Planned first = Plan(0, 65536, 4);
  const auto none = MakeWorkspaceLayout(dims, first.rank_plan, first.blocks, 0, {record, 0}, 0);
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(none->fetch_capacity, 0);
}

TEST(WorkspaceTest, ListsTakeNoMemoryOfCalls) {
  const Planned p = Plan(2, 4096, 4);
  const auto dims = MakeDims(p.config, DType::kBF16);
  const auto few = MakeWorkspaceLayout(dims, p.rank_plan, p.blocks, 0, {32768, 0}, 1 << 30);
  const auto many = MakeWorkspaceLayout(dims, p.rank_plan, p.blocks, 1 << 30, {32768, 0}, 1 << 30);
  ASSERT_TRUE(few.ok() && many.ok());
  EXPECT_EQ(many->plan_bytes - few->plan_bytes, 1 << 30);
  EXPECT_EQ(many->call_bytes, few->call_bytes);
}

TEST(WorkspaceTest, TablesHoldTheLists) {
  const Planned p = Plan(1, 1000, 3);
  const PlanTables tables = MakePlanTables(p.rank_plan, p.blocks);
  kernels::Document document;
  std::memcpy(&document, tables.bytes.data() + tables.documents, sizeof(document));
  EXPECT_EQ(document.num_tokens, 1000);
  kernels::Segment segment;
  std::memcpy(&segment, tables.bytes.data() + tables.query_segments, sizeof(segment));
  EXPECT_EQ(segment.position, 334);
  EXPECT_EQ(segment.num_tokens, 333);
}

TEST(CostTest, CountsEqualThoseOfANaiveLoop) {
  const Planned whole = Plan(0, 3000, 1);
  double cmp = 0, slc = 0, win = 0;
  for (int64_t t = 0; t < 3000; ++t) {
    for (int64_t i = 0; i * 16 + 31 <= t; ++i) cmp += 1;
    const int64_t blocks = std::min<int64_t>(16, t / 64 + 1);
    slc += static_cast<double>((blocks - 1) * 64 + t % 64 + 1);
    win += static_cast<double>(std::min<int64_t>(512, t + 1));
  }
  const double per_key = 2.0 * 64 * 256;
  const ForwardFlops flops = AttentionFlopsOfRank(whole.config, whole.rank_plan);
  EXPECT_DOUBLE_EQ(flops.compressed_attention, cmp * per_key);
  EXPECT_DOUBLE_EQ(flops.selected_attention, slc * per_key);
  EXPECT_DOUBLE_EQ(flops.window_attention, win * per_key);
  EXPECT_DOUBLE_EQ(DenseFlopsOfRank(whole.config, whole.rank_plan), 3000.0 * 3001 / 2 * per_key);
}

TEST(CostTest, RanksAddUpToTheWhole) {
  const Planned whole = Plan(0, 3000, 1);
  const double expected = AttentionFlopsOfRank(whole.config, whole.rank_plan).total();
  double sum = 0;
  int64_t sent = 0, received = 0;
  for (int rank = 0; rank < 4; ++rank) {
    const Planned p = Plan(rank, 3000, 4);
    sum += AttentionFlopsOfRank(p.config, p.rank_plan).total();
    const ForwardBytes bytes = BytesOfRank(MakeDims(p.config, DType::kBF16), p.blocks, p.rank_plan,
                                           32768, 3000, 4, /*branches_share_kv=*/rank >= 0);
    sent += bytes.halo_sent + bytes.summaries_sent;
    const std::vector<int64_t> by_owner =
        BlockBytesAtMost(MakeDims(p.config, DType::kBF16), p.blocks, p.rank_plan, 32768);
    EXPECT_EQ(std::accumulate(by_owner.begin(), by_owner.end(), int64_t{0}),
              bytes.blocks_received_at_most);
    EXPECT_EQ(by_owner[rank], 0);
    received += bytes.halo_received + bytes.summaries_received;
  }
  EXPECT_DOUBLE_EQ(sum, expected);
  EXPECT_EQ(sent, received);
}

}  // namespace
}  // namespace nsa
