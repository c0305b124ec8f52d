#include "benchmarks/drawn_blocks.h"

#include <algorithm>
#include <functional>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace nsa::benchmarks {
namespace {

constexpr int64_t kTokens = 4096;
constexpr int32_t kHeads = 2, kPicks = 16, kBlockTokens = 64;

kernels::AttentionDims Dims() {
  kernels::AttentionDims dims{};
  dims.num_kv_heads = kHeads;
  dims.num_selected_blocks = kPicks;
  dims.select_block_tokens = kBlockTokens;
  return dims;
}

class DrawnBlocksTest : public testing::TestWithParam<int64_t> {};

TEST_P(DrawnBlocksTest, EveryQuerySeesTheFirstTheLastTwoAndNothingTwice) {
  const std::vector<int32_t> indices = DrawBlocks(Dims(), kTokens, GetParam());
  ASSERT_EQ(indices.size(), kTokens * kHeads * kPicks);
  for (int64_t row = 0; row < kTokens * kHeads; ++row) {
    const int32_t own = static_cast<int32_t>(row / kHeads / kBlockTokens);
    std::vector<int32_t> picks(&indices[row * kPicks], &indices[row * kPicks] + kPicks);
    const auto end = std::find(picks.begin(), picks.end(), -1);
    ASSERT_EQ(std::count(end, picks.end(), -1), picks.end() - end) << row;
    picks.erase(end, picks.end());
    ASSERT_TRUE(std::is_sorted(picks.begin(), picks.end(), std::less_equal<int32_t>())) << row;
    ASSERT_EQ(picks.front(), 0) << row;
    ASSERT_EQ(picks.back(), own) << row;
    ASSERT_EQ(picks.size(), std::min(own + 1, kPicks)) << row;
    ASSERT_TRUE(own == 0 || picks[picks.size() - 2] == own - 1) << row;
  }
}

INSTANTIATE_TEST_SUITE_P(PoolBlocks, DrawnBlocksTest, testing::Values(0, 20));

TEST(DrawBlocksTest, NeighboursShareAPool) {
  const auto distinct_of_last_neighbours = [](int64_t pool_blocks) {
    const std::vector<int32_t> indices = DrawBlocks(Dims(), kTokens, pool_blocks);
    std::set<int32_t> distinct;
    for (int64_t t = kTokens - 32; t < kTokens; ++t) {
      const int32_t* const row = &indices[t * kHeads * kPicks];
      distinct.insert(row, row + kPicks);
    }
    return distinct.size();
  };
  EXPECT_EQ(distinct_of_last_neighbours(20), 23u);  // and the first, and the last two
  EXPECT_GT(distinct_of_last_neighbours(0), 50u);
}

TEST(DrawBlocksTest, CountsPairsUpToTheQuery) {
  // As many blocks as a query can have: causal attention.
  constexpr double kCausal = kPicks * kBlockTokens;
  EXPECT_EQ(CountSelectedPairs(Dims(), DrawBlocks(Dims(), kPicks * kBlockTokens, 0)),
            kCausal * (kCausal + 1) / 2);
}

}  // namespace
}  // namespace nsa::benchmarks
