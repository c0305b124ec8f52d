#include "nsa/plan/sharding.h"

#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nsa {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Every token is on exactly one rank, and the two numberings are inverses.
void ExpectBijection(const ShardPlan& plan) {
  int64_t tokens = 0;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    int64_t last = -1;
    for (int64_t local = 0; local < plan.TokensOfRank(rank); ++local) {
      const int64_t global = plan.GlobalToken(rank, local);
      EXPECT_GT(global, last) << "local order must be global order";
      last = global;
      const TokenPlace place = plan.Locate(global);
      EXPECT_EQ(place.rank, rank);
      EXPECT_EQ(place.local, local);
      ++tokens;
    }
  }
  EXPECT_EQ(tokens, plan.num_tokens());
}

TEST(ShardingTest, ContiguousAndZigZagCoverAnyLengthOnAnyNumberOfRanks) {
  for (int64_t num_tokens : {1, 2, 5, 63, 64, 65, 1000}) {
    for (int num_ranks : {1, 2, 3, 4, 8, 70}) {
      for (const char* sharding : {"contiguous", "zigzag"}) {
        const auto plan = ShardPlan::Parse(sharding, num_tokens, num_ranks);
        ASSERT_TRUE(plan.ok()) << plan.status();
        ExpectBijection(*plan);
      }
    }
  }
}

TEST(ShardingTest, ZigZagDealsAsMegatron) {
  const auto plan = ShardPlan::Create(16, 2, ZigZagChunks(16, 2));
  ASSERT_TRUE(plan.ok());
  // Rank r holds chunks r and 2P-1-r; chunks 1 and 2 both lie on rank 1 and join.
  EXPECT_THAT(plan->ChunksOfRank(0), ElementsAre(Chunk{0, 0, 4}, Chunk{0, 12, 4}));
  EXPECT_THAT(plan->ChunksOfRank(1), ElementsAre(Chunk{1, 4, 8}));
}

TEST(ShardingTest, ZigZagPerDocumentDealsEachDocument) {
  const auto plan = ShardPlan::Parse("zigzag-per-document", 12, 2, {0, 8, 12});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->ChunksOfRank(0), ElementsAre(Chunk{0, 0, 2}, Chunk{0, 6, 3}, Chunk{0, 11, 1}));
  ExpectBijection(*plan);
}

TEST(ShardingTest, UnevenLengthsMayBeZero) {
  const auto plan = ShardPlan::Parse("0,5,0,3", 8, 4);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->TokensOfRank(0), 0);
  EXPECT_EQ(plan->TokensOfRank(1), 5);
  EXPECT_EQ(plan->TokensOfRank(3), 3);
  ExpectBijection(*plan);
}

TEST(ShardingTest, RandomChunkListsAreBijections) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 50; ++trial) {
    const int num_ranks = 1 + static_cast<int>(random() % 9);
    std::vector<Chunk> chunks;
    int64_t begin = 0;
    for (int i = 0; i < 20; ++i) {
      const int64_t length = static_cast<int64_t>(random() % 30);
      chunks.push_back({static_cast<int32_t>(random() % num_ranks), begin, length});
      begin += length;
    }
    if (begin == 0) continue;
    const auto plan = ShardPlan::Create(begin, num_ranks, chunks);
    ASSERT_TRUE(plan.ok()) << plan.status();
    ExpectBijection(*plan);
  }
}

TEST(ShardingTest, EmptyDocumentsAreDropped) {
  const auto plan = ShardPlan::Parse("contiguous", 10, 2, {0, 0, 4, 4, 10, 10});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->cu_seqlens(), ElementsAre(0, 4, 10));
}

TEST(ShardingTest, BadPlansNameFieldValueAndRule) {
  auto message = [](const absl::StatusOr<ShardPlan>& plan) {
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(plan.status().message());
  };
  EXPECT_THAT(message(ShardPlan::Parse("contiguous", 0, 2)), HasSubstr("num_tokens = 0"));
  EXPECT_THAT(message(ShardPlan::Parse("contiguous", 4, 0)), HasSubstr("num_ranks = 0"));
  EXPECT_THAT(message(ShardPlan::Parse("diagonal", 4, 2)), HasSubstr("sharding = \"diagonal\""));
  EXPECT_THAT(message(ShardPlan::Parse("1,2,1", 4, 2)), HasSubstr("has 3 lengths"));
  EXPECT_THAT(message(ShardPlan::Parse("1,2", 4, 2)),
              HasSubstr("cover 3 tokens: must cover num_tokens = 4"));
  EXPECT_THAT(message(ShardPlan::Parse("1,99999999999999999", 4, 2)), HasSubstr("sharding"));
  EXPECT_THAT(message(ShardPlan::Parse("contiguous", 4, 2, {1, 4})),
              HasSubstr("cu_seqlens[0] = 1: must be 0"));
  EXPECT_THAT(message(ShardPlan::Parse("zigzag-per-document", 4, 2, {0, 3, 2, 4})),
              HasSubstr("cu_seqlens[2] = 2: must be at least cu_seqlens[1] = 3"));
  EXPECT_THAT(message(ShardPlan::Parse("contiguous", 4, 2, {0, 5})),
              HasSubstr("cu_seqlens[1] = 5: must be num_tokens = 4"));
  EXPECT_THAT(message(ShardPlan::Create(4, 2, {{0, 0, 2}, {2, 2, 2}})),
              HasSubstr("chunks[1].rank = 2: must lie in [0, 1]"));
  EXPECT_THAT(message(ShardPlan::Create(4, 2, {{0, 0, 2}, {1, 3, 1}})),
              HasSubstr("chunks[1].begin = 3: must be 2"));
}

}  // namespace
}  // namespace nsa
