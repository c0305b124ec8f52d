#include "comm/checks.h"

#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

TEST(MergeRunsTest, JoinsNeighboursOfOneRankInOrder) {
  const auto merged = MergeRuns(
      {{{0, 0, 10}, {0, 10, 5}, {1, 15, 5}, {1, 20, 0}, {1, 20, 1}, {0, 30, 5}, {0, 25, 5}}});
  ASSERT_EQ(merged.size(), 4u);
  EXPECT_EQ(merged[0].num_bytes, 15);
  EXPECT_EQ(merged[1].num_bytes, 6);
  EXPECT_EQ(merged[2].offset_bytes, 30);
  EXPECT_EQ(merged[3].offset_bytes, 25);
}

TEST(MergeRecordsTest, JoinsRecordsContiguousAtBothEnds) {
  const int32_t peers[] = {1, 1, 1, 2, 2};
  const int64_t offsets[] = {0, 8, 24, 32, 24};
  const int32_t count = 5;
  const auto reads = MergeRecords({peers, offsets, &count, 5}, 8);
  ASSERT_EQ(reads.size(), 4u);
  EXPECT_EQ(reads[0].num_bytes, 16);
  EXPECT_EQ(reads[1].dst_offset, 16);
  EXPECT_EQ(reads[2].peer, 2);
  EXPECT_EQ(reads[3].window_offset, 24);
}

TEST(CheckAllGatherTest, TouchingRunsDoNotOverlap) {
  const char buffer[8] = {};
  EXPECT_TRUE(CheckAllGather(buffer, {{{1, 4, 4}, {0, 0, 4}, {0, 2, 0}}}, 2).ok());
  EXPECT_EQ(CheckAllGather(buffer, {{{1, 4, 4}, {0, 0, 5}}}, 2).message(),
            "AllGather: runs[0].offset_bytes: 4; must not overlap runs[1], which ends at 5");
  EXPECT_FALSE(CheckAllGather(buffer, {{{0, INT64_MAX, 1}}}, 2).ok());
}

TEST(WindowOrderTest, PublishedEpochTrailsWhileWriting) {
  WindowOrder order;
  EXPECT_EQ(order.published_epoch(), 0);
  EXPECT_TRUE(order.BeginWrite().ok());
  EXPECT_EQ(order.epoch(), 1);
  EXPECT_EQ(order.published_epoch(), 0);
  EXPECT_TRUE(order.Publish().ok());
  EXPECT_EQ(order.published_epoch(), 1);
  EXPECT_TRUE(order.Release().ok());
  EXPECT_EQ(order.published_epoch(), 1);
  EXPECT_EQ(order.Release().message(),
            "Release: the window is released (epoch 1); the order of an epoch is BeginWrite, "
            "Publish, any Gathers, Release");
}

}  // namespace
}  // namespace nsa::comm
