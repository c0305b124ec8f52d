// The number of ranks, the sharding and the fetch budget must not show in a single bit.
#include "gtest/gtest.h"
#include "tests/forward/backend.h"
#include "tests/testing/sharded.h"

namespace nsa::test {
namespace {

using reference::CompressorKind;
using reference::ReferenceConfig;

ReferenceConfig TestConfig() {
  return {.num_q_heads = 8,
          .num_kv_heads = 2,
          .head_dim_qk = 64,
          .head_dim_v = 128,
          .num_selected_blocks = 6,
          .window_tokens = 100,
          .compressor = CompressorKind::kWeighted};
}

std::string UnevenLengths(int64_t num_tokens, int num_ranks) {
  std::string lengths;
  int64_t left = num_tokens;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const int64_t length = rank + 1 == num_ranks ? left : left * (rank % 3) / 3;
    lengths += (rank == 0 ? "" : ",") + std::to_string(length);
    left -= length;
  }
  return lengths;
}

class ShardingInvarianceTest : public BackendTest, public ::testing::WithParamInterface<DType> {
 protected:
  void SetUp() override {
    BackendTest::SetUp();
    if (IsSkipped()) return;
    InputOptions options;
    options.dtype = GetParam();
    problem_ = RandomProblem(TestConfig(), cu_seqlens_, options, 7);
    one_ = std::make_unique<GlobalOutputs>(problem_);
    const absl::Status status = RunRanks(problem_, Plan("contiguous", 1), {}, one_.get());
    ASSERT_TRUE(status.ok()) << status;
  }

  ShardPlan Plan(const std::string& sharding, int num_ranks) {
    return *ShardPlan::Parse(sharding, cu_seqlens_.back(), num_ranks, cu_seqlens_);
  }

  // Runs and compares with one rank.
  void ExpectSame(const std::string& sharding, int num_ranks, const RunOptions& options = {}) {
    SCOPED_TRACE(testing::Message() << sharding << " on " << num_ranks << " ranks");
    GlobalOutputs outputs(problem_);
    const absl::Status status =
        RunRanks(problem_, Plan(sharding, num_ranks), options, &outputs, &stats_);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(SameOutputs(problem_, *one_, outputs));
  }

  std::vector<int64_t> cu_seqlens_ = {0, 700, 701, 2003};
  Problem problem_;
  std::unique_ptr<GlobalOutputs> one_;
  ForwardStats stats_;
};

TEST_P(ShardingInvarianceTest, AnyNumberOfRanksAndAnySharding) {
  for (int num_ranks : {1, 2, 3, 4, 8}) {
    ExpectSame("contiguous", num_ranks);
    ExpectSame("zigzag", num_ranks);
    ExpectSame("zigzag-per-document", num_ranks);
    ExpectSame(UnevenLengths(cu_seqlens_.back(), num_ranks), num_ranks);
  }
}

TEST_P(ShardingInvarianceTest, FetchBudgetCutsTheWorkIntoPieces) {
  const int64_t record = 64 * (64 + 128) * SizeOf(GetParam());
  RunOptions options;
  options.fetch_budget_bytes = 2 * 6 * record;  // one query's worth
  // Rank 2 sees 10 remote blocks of its document: those of one kv head fit.
  ExpectSame("contiguous", 3, options);
  if (HasFatalFailure()) return;
  EXPECT_EQ(stats_.ranks(2).query_pieces(), 2);
  EXPECT_LE(stats_.ranks(2).fetch_slot_bytes(), options.fetch_budget_bytes);
  // The last of four ranks sees more than 12, so that its queries are cut.
  ExpectSame("contiguous", 4, options);
  if (HasFatalFailure()) return;
  EXPECT_GT(stats_.ranks(3).query_pieces(), 3);
  options.fetch_budget_bytes = 20 * record;
  ExpectSame("zigzag", 4, options);
}

TEST_P(ShardingInvarianceTest, RepeatedForwardsAndStridedTensors) {
  RunOptions options;
  options.num_forwards = 3;
  options.row_padding = 5 * TheBackend().alignment;
  options.head_padding = 3 * TheBackend().alignment;
  ExpectSame("zigzag", 3, options);
}

INSTANTIATE_TEST_SUITE_P(DTypes, ShardingInvarianceTest, ::testing::ValuesIn(TheBackend().dtypes),
                         [](const auto& info) { return NameOf(info.param); });

using MoreRanksThanTokens = BackendTest;

TEST_F(MoreRanksThanTokens, AllButAFewAreEmpty) {
  const std::vector<int64_t> cu_seqlens = {0, 5};
  const Problem problem =
      RandomProblem(TestConfig(), cu_seqlens, {.dtype = TheBackend().dtypes[0]}, 3);
  GlobalOutputs one(problem), many(problem);
  ASSERT_TRUE(RunRanks(problem, *ShardPlan::Parse("contiguous", 5, 1), {}, &one).ok());
  const absl::Status status = RunRanks(problem, *ShardPlan::Parse("zigzag", 5, 9), {}, &many);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(SameOutputs(problem, one, many));
}

using StatisticsTest = BackendTest;

// What the statistics say must be what the plan and the selection imply.
TEST_F(StatisticsTest, BytesFollowFromPlanAndSelection) {
  const DType dtype = TheBackend().dtypes[0];
  const std::vector<int64_t> cu_seqlens = {0, 2048};
  const ReferenceConfig config = TestConfig();
  const Problem problem = RandomProblem(config, cu_seqlens, {.dtype = dtype}, 5);
  const ShardPlan plan = *ShardPlan::Parse("contiguous", 2048, 4);
  GlobalOutputs outputs(problem);
  ForwardStats separate, shared;
  ASSERT_TRUE(RunRanks(problem, plan, {}, &outputs, &separate).ok());
  const std::vector<int32_t> indices = outputs.block_indices();

  const int64_t record = 64 * (64 + 128) * SizeOf(dtype);
  const int64_t row = 2 * (64 + 128) * SizeOf(dtype);
  for (int rank = 0; rank < 4; ++rank) {
    const RankStats& stats = separate.ranks(rank);
    // 512 tokens a rank: block 8 r begins rank r.
    int64_t picks = 0;
    std::vector<bool> fetched(2 * 32);
    for (int64_t t = 512 * rank; t < 512 * (rank + 1); ++t) {
      for (int g = 0; g < 2; ++g) {
        for (int i = 0; i < 6; ++i) {
          const int32_t block = indices[(t * 2 + g) * 6 + i];
          if (block < 0 || block / 8 == rank) continue;
          ++picks;
          fetched[g * 32 + block] = true;
        }
      }
    }
    const int64_t records = std::count(fetched.begin(), fetched.end(), true);
    EXPECT_EQ(stats.remote_picks(), picks);
    EXPECT_EQ(stats.records_fetched(), records);
    EXPECT_EQ(stats.block_bytes_received(), records * record);
    // Windows of 100 tokens reach back 99; compression blocks reach 16 tokens ahead.
    EXPECT_EQ(stats.halo_bytes_received(), ((rank > 0 ? 99 : 0) + (rank < 3 ? 16 : 0)) * row);
    EXPECT_EQ(stats.halo_bytes_sent(), ((rank < 3 ? 99 : 0) + (rank > 0 ? 16 : 0)) * row);
    const int64_t own_rows = rank < 3 ? 32 : 31;
    EXPECT_EQ(stats.summary_bytes_received(), (127 - own_rows) * row);
    EXPECT_EQ(stats.summary_bytes_sent(), 3 * own_rows * row);
    EXPECT_GT(stats.flops(), 0);
  }
  int64_t sent = 0, received = 0;
  for (const RankStats& stats : separate.ranks()) {
    sent += stats.block_bytes_sent();
    received += stats.block_bytes_received();
  }
  EXPECT_EQ(sent, received);
  EXPECT_GT(received, 0);

  // Shared k and v: the union of the halos crosses once, so no more than the separate ones did.
  RunOptions share;
  share.share_kv = true;
  ASSERT_TRUE(RunRanks(problem, plan, share, &outputs, &shared).ok());
  EXPECT_EQ(shared.ranks(1).halo_bytes_received(), separate.ranks(1).halo_bytes_received());
}

}  // namespace
}  // namespace nsa::test
