#include "nsa/stats.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nsa {
namespace {

using ::testing::HasSubstr;

TEST(StatsTest, BytesCarryAUnit) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1536), "1.50 KiB");
  EXPECT_EQ(FormatBytes(3.0 * (1 << 30)), "3.00 GiB");
}

TEST(StatsTest, TableHasARowForEachRankAndTotals) {
  ForwardStats stats;
  for (int rank = 0; rank < 2; ++rank) {
    RankStats* s = stats.add_ranks();
    s->set_rank(rank);
    s->set_num_tokens(100);
    s->set_block_bytes_received(1 << 20);
    s->set_remote_picks(7);
    s->set_records_fetched(3);
    s->set_flops(rank == 0 ? 1e9 : 3e9);
    StageTime* time = s->add_stages();
    time->set_stage("halo");
    time->set_seconds(0.5);
  }
  StageTime* late = stats.mutable_ranks(1)->add_stages();
  late->set_stage("fetch");
  late->set_seconds(0.25);
  const std::string table = FormatTable(stats);
  EXPECT_THAT(table, HasSubstr("2.00 MiB"));  // the total
  EXPECT_THAT(table, HasSubstr("halo s"));
  EXPECT_THAT(table, HasSubstr("fetch s"));
  EXPECT_THAT(table, HasSubstr("1.50"));  // rank 1's load against the mean
  EXPECT_THAT(table, HasSubstr("0.750"));
}

}  // namespace
}  // namespace nsa
