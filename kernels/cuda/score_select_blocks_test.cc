// The order in which the ranking kernel for Hopper sums and leaves scores, on the CPU.
#include "kernels/cuda/score_select_blocks.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gtest/gtest.h"

namespace nsa::kernels::cuda::rank {
namespace {

// NSA equations 9 and 10 over all summaries; small numbers, so that sums are exact.
std::vector<float> ExpectedScores(const std::vector<float>& p, int strides, int reach) {
  std::vector<float> scores(p.size() / strides, 0.0f);
  for (int block = 0; block < static_cast<int>(scores.size()); ++block) {
    const int begin = block * strides, end = begin + strides;
    for (int i = std::max(begin - reach, 0); i < end; ++i) {
      scores[block] += p[i] * (std::min(i + reach + 1, end) - std::max(i, begin));
    }
  }
  return scores;
}

template <int kStrides, int kReach>
void CheckSums() {
  std::vector<float> p(20 * kStrides);
  for (size_t i = 0; i < p.size(); ++i) p[i] = static_cast<float>((i * i + 7 * i + 3) % 101);
  const std::vector<float> expected = ExpectedScores(p, kStrides, kReach);
  float before = 0.0f;
  for (size_t block = 0; block < expected.size(); ++block) {
    float of_block[kStrides], own, next;
    std::copy_n(&p[block * kStrides], kStrides, of_block);
    SumBlock<kStrides, kReach>(of_block, own, next);
    EXPECT_EQ(own + before, expected[block]) << kStrides << " " << kReach << " " << block;
    before = next;
  }
}

TEST(ScoreSelectBlocksTest, SumsCountAsOftenAsStridesLieInABlock) {
  CheckSums<2, 0>();
  CheckSums<2, 1>();
  CheckSums<4, 0>();
  CheckSums<4, 1>();
  CheckSums<4, 3>();
  CheckSums<8, 0>();
  CheckSums<8, 1>();
  CheckSums<8, 3>();
}

// Block b of the thread at place c of each quad, shared out among the eight threads there by
// halves, upper halves to lanes with bit 16, 8 and 4.
template <int kStrides>
void CheckOrder() {
  using Order = ScoreOrder<kStrides>;
  constexpr int kTiles = 4;
  std::vector<int> block_at(kTiles * Order::kTileBlocks, -1);
  for (int lane = 0; lane < 32; ++lane) {
    int first = 0, count = Order::kThreadBlocks;
    for (int mask = 16; mask >= 4 && count > 1; mask /= 2) {
      count /= 2;
      if ((lane & mask) != 0) first += count;
    }
    ASSERT_EQ(count, Order::kLaneBlocks);
    if (Order::Place(lane) < 0) continue;
    for (int tile = 0; tile < kTiles; ++tile) {
      for (int i = 0; i < count; ++i) {
        int& block = block_at.at(tile * Order::kTileBlocks + Order::Place(lane) + 32 * i);
        EXPECT_EQ(block, -1) << "stored twice";
        block = tile * Order::kTileBlocks + lane % 4 * Order::kThreadBlocks + first + i;
      }
    }
  }
  for (size_t i = 0; i < block_at.size(); ++i) {
    const int row = static_cast<int>(i) / 32, lane = static_cast<int>(i) % 32;
    EXPECT_EQ(Order::FirstBlock(lane) + Order::RowBlock(row), block_at[i]) << kStrides << " " << i;
  }
}

TEST(ScoreSelectBlocksTest, WhatIsStoredIsFoundAgain) {
  CheckOrder<2>();
  CheckOrder<4>();
  CheckOrder<8>();
}

}  // namespace
}  // namespace nsa::kernels::cuda::rank
