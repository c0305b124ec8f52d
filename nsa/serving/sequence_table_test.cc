#include "nsa/serving/sequence_table.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nsa::serving {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

SequenceTableOptions Options() {
  SequenceTableOptions options;
  options.config.select_block_tokens = 64;
  options.config.window_tokens = 100;
  options.pages_of_rank = {4, 6};
  options.num_summary_pages = 3;
  options.max_sequences = 3;
  options.max_tokens = 2000;
  return options;
}

absl::StatusOr<std::vector<PageChange>> Extend(SequenceTable& table, SequenceId id, int32_t count) {
  const StepSequence step = {id, count};
  return table.Extend({&step, 1});
}

std::vector<int> RanksOf(const SequenceTable& table, SequenceId id, int list = 0) {
  std::vector<int> ranks;
  for (PageId page : (*table.Find(id))->lists[list]) {
    ranks.push_back(page == kNoPage ? -1 : table.pages().RankOf(page));
  }
  return ranks;
}

TEST(SequenceTableTest, PagesComeFromHomeThenFromWhereMostAreFree) {
  SequenceTable table(Options());
  const SequenceId id = *table.Open();
  ASSERT_TRUE(Extend(table, id, 64 * 4).ok());
  ASSERT_TRUE(Extend(table, id, 1).ok());
  EXPECT_THAT(RanksOf(table, id), ElementsAre(0, 0, 0, 0, 1));
  EXPECT_EQ((*table.Find(id))->num_tokens, 257);
}

TEST(SequenceTableTest, OnlyAtHome) {
  SequenceTableOptions options = Options();
  options.only_at_home = true;
  SequenceTable table(options);
  const SequenceId id = *table.Open();
  const absl::Status full = Extend(table, id, 64 * 4 + 1).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_THAT(std::string(full.message()), HasSubstr("pages: 5 asked, 4 free of the 4 of home 0"));
  EXPECT_EQ((*table.Find(id))->num_tokens, 0);
  EXPECT_TRUE(Extend(table, id, 64 * 4).ok());
}

TEST(SequenceTableTest, ABatchGetsAllOfItsPagesOrNone) {
  SequenceTable table(Options());
  const SequenceId a = *table.Open(), b = *table.Open();
  const std::vector<StepSequence> batch = {{a, 64 * 6}, {b, 64 * 5}};
  const absl::Status full = table.Extend(batch).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_EQ(table.pages().num_used(0) + table.pages().num_used(1), 0);
  EXPECT_EQ((*table.Find(a))->num_tokens, 0);
  const std::vector<StepSequence> twice = {{a, 1}, {a, 1}};
  EXPECT_TRUE(absl::IsInvalidArgument(table.Extend(twice).status()));
}

TEST(SequenceTableTest, SummaryPagesRunOutAsWell) {
  SequenceTableOptions options = Options();
  options.pages_of_rank = {100, 0};
  options.num_summary_pages = 1;
  SequenceTable table(options);
  const SequenceId id = *table.Open();
  // 64 blocks of 32 tokens, 16 apart.
  ASSERT_TRUE(Extend(table, id, 63 * 16 + 32).ok());
  EXPECT_TRUE(Extend(table, id, 15).ok());
  const absl::Status full = Extend(table, id, 1).status();
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_THAT(std::string(full.message()), HasSubstr("summary pages: 1 asked, 0 free of the 1"));
}

TEST(SequenceTableTest, ForksShareUntilOneWrites) {
  SequenceTable table(Options());
  const SequenceId a = *table.Open();
  ASSERT_TRUE(Extend(table, a, 100).ok());
  std::vector<PageChange> changes;
  const SequenceId b = *table.Fork(a, &changes);
  EXPECT_EQ(changes.size(), 3);  // two pages and one of summaries
  EXPECT_EQ(table.pages().num_used(0), 2);

  // The second page and the page of summaries (block 5 ends with token 111) become b's own.
  const auto written = Extend(table, b, 12);
  ASSERT_TRUE(written.ok());
  ASSERT_EQ(written->size(), 2);
  EXPECT_EQ((*written)[0].index, 1);
  EXPECT_EQ((*written)[0].before, (*table.Find(a))->lists[0][1]);
  EXPECT_EQ((*written)[1].list, 1);
  EXPECT_EQ(table.pages().num_used(0), 3);
  EXPECT_TRUE(Extend(table, a, 1)->empty()) << "nobody shares its page any more";

  EXPECT_TRUE(table.Close(a).ok());
  EXPECT_EQ(table.pages().num_used(0), 2);
  EXPECT_TRUE(table.Close(b).ok());
  EXPECT_EQ(table.pages().num_used(0), 0);
  EXPECT_EQ(table.summary_pages().num_used(0), 0);
  EXPECT_TRUE(absl::IsNotFound(table.Close(b)));
}

TEST(SequenceTableTest, TruncateGivesPagesBack) {
  SequenceTable table(Options());
  const SequenceId id = *table.Open();
  ASSERT_TRUE(Extend(table, id, 300).ok());
  EXPECT_TRUE(table.Truncate(id, 128).ok());
  EXPECT_EQ((*table.Find(id))->lists[0].size(), 2);
  EXPECT_TRUE(table.Truncate(id, 31).ok());
  EXPECT_TRUE((*table.Find(id))->lists[1].empty()) << "no block of 32 tokens";
  EXPECT_TRUE(absl::IsInvalidArgument(table.Truncate(id, 32)));
  EXPECT_TRUE(absl::IsInvalidArgument(table.Truncate(id, -1)));
  EXPECT_TRUE(table.Truncate(id, 0).ok());
  EXPECT_EQ(table.pages().num_used(0), 0);
}

TEST(SequenceTableTest, OtherListsKeepTheLastPagesOnly) {
  SequenceTableOptions options = Options();
  options.pages_of_rank = {100, 0};
  options.num_lists = 2;
  options.max_rollback_tokens = 70;
  SequenceTable table(options);
  const SequenceId id = *table.Open();
  ASSERT_TRUE(Extend(table, id, 600).ok());
  // Of token 600 - 70 - 100 = 430 on: from page 6.
  EXPECT_THAT(RanksOf(table, id, 1), ElementsAre(-1, -1, -1, -1, -1, -1, 0, 0, 0, 0));
  EXPECT_EQ(table.pages().num_used(0), 14);
  EXPECT_TRUE(table.Truncate(id, 530).ok());
  const absl::Status too_far = table.Truncate(id, 400);
  EXPECT_TRUE(absl::IsFailedPrecondition(too_far)) << too_far;
  EXPECT_THAT(std::string(too_far.message()), HasSubstr("max_rollback_tokens = 70"));
  EXPECT_EQ((*table.Find(id))->num_tokens, 530);
}

TEST(SequenceTableTest, BlocksOnTheRanksTheyAreOn) {
  SequenceTable table(Options());
  const SequenceId id = *table.Open();
  ASSERT_TRUE(table.ExtendOnRanks(id, 64 * 4 + 10, {1, 1, 0, 1}).ok());
  EXPECT_THAT(RanksOf(table, id), ElementsAre(1, 1, 0, 1, 0));
  EXPECT_TRUE(absl::IsInvalidArgument(table.ExtendOnRanks(id, 10, {}).status())) << "not empty";
  const SequenceId next = *table.Open();
  ASSERT_TRUE(table.ExtendOnRanks(next, 64 * 4, {1, 1, 1, 1}).ok());
  EXPECT_THAT(RanksOf(table, next), ElementsAre(1, 1, 1, 0)) << "the last where there is room";
}

TEST(SequenceTableTest, ALostRankTakesItsSequencesAlong) {
  SequenceTable table(Options());
  const SequenceId here = *table.Open(), there = *table.Open();
  ASSERT_TRUE(Extend(table, here, 64 * 4).ok());
  ASSERT_TRUE(Extend(table, there, 10).ok());
  table.Lose(1);
  EXPECT_TRUE(absl::IsResourceExhausted(Extend(table, here, 1).status()));
  const absl::Status lost = Extend(table, there, 1).status();
  EXPECT_TRUE(absl::IsUnavailable(lost));
  EXPECT_THAT(std::string(lost.message()), HasSubstr("rank 1"));
  EXPECT_TRUE(table.Close(there).ok());
  EXPECT_EQ(table.pages().num_used(1), 0);
  EXPECT_EQ(table.pages().num_free(1), 0);
}

TEST(SequenceTableTest, SequencesAndTokensAreLimited) {
  SequenceTable table(Options());
  const SequenceId id = *table.Open();
  EXPECT_TRUE(absl::IsInvalidArgument(table.Check(id, 0)));
  EXPECT_TRUE(absl::IsInvalidArgument(table.Check(id, 2001)));
  EXPECT_TRUE(absl::IsNotFound(table.Check(id + 1, 1)));
  ASSERT_TRUE(table.Open().ok());
  ASSERT_TRUE(table.Open().ok());
  const absl::Status full = table.Open().status();
  EXPECT_TRUE(absl::IsResourceExhausted(full));
  EXPECT_THAT(std::string(full.message()), HasSubstr("max_sequences = 3"));
  EXPECT_TRUE(table.Close(id).ok());
  EXPECT_NE(*table.Open(), id) << "never used again";
}

}  // namespace
}  // namespace nsa::serving
