#include "nsa/stats.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace nsa {
namespace {

using ::testing::HasSubstr;

TEST(StatsTest, BytesCarryAUnit) {
  EXPECT_EQ(FormatBytes(0), "0 B");
  EXPECT_EQ(FormatBytes(1023), "1023 B");
  EXPECT_EQ(FormatBytes(1536), "1.50 KiB");
  EXPECT_EQ(FormatBytes(3.0 * (1 << 30)), "3.00 GiB");
}

void AddSpan(RankStats* stats, const char* stage, const char* track, double begin, double end) {
  StageSpan* span = stats->add_stages();
  span->set_stage(stage);
  span->set_track(track);
  span->set_begin_seconds(begin);
  span->set_end_seconds(end);
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
    AddSpan(s, "halo", "main", 0, 0.5);
  }
  AddSpan(stats.mutable_ranks(1), "fetch", "beside", 0.5, 0.625);
  AddSpan(stats.mutable_ranks(1), "fetch", "beside", 0.75, 0.875);
  const std::string table = FormatTable(stats);
  EXPECT_THAT(table, HasSubstr("2.00 MiB"));  // the total
  EXPECT_THAT(table, HasSubstr("halo ms"));
  EXPECT_THAT(table, HasSubstr("fetch ms"));
  EXPECT_THAT(table, HasSubstr("1.50"));     // rank 1's load against the mean
  EXPECT_THAT(table, HasSubstr("250.000"));  // both fetches
  EXPECT_THAT(table, HasSubstr("875.000"));  // the end of the last stage
}

TEST(StatsTest, ATraceIsJsonWithASpanForEachRunOfAStage) {
  ForwardStats stats;
  stats.add_ranks()->set_rank(0);
  stats.add_ranks()->set_rank(1);
  AddSpan(stats.mutable_ranks(1), "fetch", "beside", 0.5, 0.625);
  const nlohmann::json trace = nlohmann::json::parse(FormatChromeTrace(stats));
  std::vector<nlohmann::json> spans;
  for (const nlohmann::json& event : trace["traceEvents"]) {
    if (event["ph"] == "X") spans.push_back(event);
  }
  ASSERT_EQ(spans.size(), 1);
  EXPECT_EQ(spans[0]["name"], "fetch");
  EXPECT_EQ(spans[0]["pid"], 1);
  EXPECT_EQ(spans[0]["tid"], 2);
  EXPECT_EQ(spans[0]["ts"], 500000);
  EXPECT_EQ(spans[0]["dur"], 125000);
}

}  // namespace
}  // namespace nsa
