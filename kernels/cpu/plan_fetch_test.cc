#include <algorithm>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/stages.h"
#include "tests/testing/random.h"

namespace nsa::kernels::cpu {
namespace {

constexpr int64_t kRecordBytes = 128;

// Two documents of blocks on three ranks; queries in two segments whose rows lie the other way
// round.
class PlanFetchTest : public ::testing::Test {
 protected:
  struct Plan {
    std::vector<int32_t> locations, peers;
    std::vector<int64_t> offsets;
    int32_t num_slots = -1;
    int64_t query_end = -1, num_remote_picks = -1;
    std::vector<int64_t> slots_of_rank;
  };

  PlanFetchTest() {
    dims_.num_kv_heads = 2;
    dims_.num_selected_blocks = 3;
    test::Random random(4);
    std::vector<int32_t> next(3, 0);
    for (int64_t b = 0; b < kBlocks; ++b) {
      rank_.push_back(static_cast<int32_t>(random.Int(0, 2)));
      ordinal_.push_back(next[rank_.back()]++);
    }
    blocks_of_rank_.assign(next.begin(), next.end());
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int32_t g = 0; g < 2; ++g) {
        std::set<int32_t> picks;
        for (int64_t i = random.Int(1, 3); i > 0; --i) {
          picks.insert(static_cast<int32_t>(random.Int(0, 9)));
        }
        std::vector<int32_t> row(picks.begin(), picks.end());
        row.resize(3, -1);
        indices_.insert(indices_.end(), row.begin(), row.end());
      }
    }
  }

  Plan Run(int64_t query_begin, int64_t capacity, HeadRange heads = {0, 2}) {
    Plan plan;
    plan.slots_of_rank.assign(3, -9);
    plan.locations.assign(2 * kBlocks, -9);
    plan.peers.assign(capacity, -9);
    plan.offsets.assign(capacity, -9);
    PlanFetch({.dims = dims_,
               .queries = {.q = {},
                           .segments = segments_,
                           .num_segments = 2,
                           .documents = documents_,
                           .num_tokens = kTokens,
                           .kv_heads = heads},
               .block_indices = indices_.data(),
               .owners = {.rank = rank_.data(),
                          .ordinal = ordinal_.data(),
                          .blocks_of_rank = blocks_of_rank_.data(),
                          .num_blocks = kBlocks,
                          .num_ranks = 3,
                          .this_rank = 1},
               .record_bytes = kRecordBytes,
               .query_begin = query_begin,
               .capacity = capacity,
               .locations = plan.locations.data(),
               .peers = plan.peers.data(),
               .offsets = plan.offsets.data(),
               .num_slots = &plan.num_slots,
               .query_end = &plan.query_end,
               .num_remote_picks = &plan.num_remote_picks,
               .slots_of_rank = plan.slots_of_rank.data()});
    return plan;
  }

  // Global blocks that a query picks for a kv head.
  std::vector<int64_t> Picks(int64_t query, int32_t head) const {
    const int64_t first = query < 12 ? documents_[1].slc_block_begin : 0;
    std::vector<int64_t> picks;
    for (int32_t i = 0; i < 3; ++i) {
      const int32_t pick = indices_[(query * 2 + head) * 3 + i];
      if (pick >= 0) picks.push_back(first + pick);
    }
    return picks;
  }

  static constexpr int64_t kBlocks = 20, kTokens = 30;
  AttentionDims dims_{};
  const Document documents_[2] = {{0, 640, 0, 0, 0, 10}, {640, 640, 0, 0, 10, 10}};
  const Segment segments_[2] = {{12, 18, 100, 0, 0}, {0, 12, 50, 1, 0}};
  std::vector<int32_t> rank_, ordinal_, indices_;
  std::vector<int64_t> blocks_of_rank_;
};

TEST_F(PlanFetchTest, TakesQueriesWhileTheyFitAndNamesEveryBlock) {
  for (int64_t capacity : {6, 9, 14, 40}) {
    int64_t pieces = 0;
    for (int64_t begin = 0; begin < kTokens; ++pieces) {
      const Plan plan = Run(begin, capacity);
      ASSERT_GT(plan.query_end, begin);
      ASSERT_LE(plan.query_end, kTokens);
      std::set<std::pair<int32_t, int64_t>> wanted, remote;
      int64_t num_remote_picks = 0;
      const auto add = [&](int64_t query) {
        for (int32_t head = 0; head < 2; ++head) {
          for (int64_t block : Picks(query, head)) {
            wanted.insert({head, block});
            if (rank_[block] == 1) continue;
            remote.insert({head, block});
            ++num_remote_picks;
          }
        }
      };
      for (int64_t query = begin; query < plan.query_end; ++query) add(query);
      EXPECT_EQ(plan.num_slots, remote.size());
      EXPECT_LE(plan.num_slots, capacity);
      EXPECT_EQ(plan.num_remote_picks, num_remote_picks);
      for (int32_t r = 0; r < 3; ++r) {
        EXPECT_EQ(plan.slots_of_rank[r],
                  std::count(plan.peers.begin(), plan.peers.begin() + plan.num_slots, r));
      }
      for (int32_t head = 0; head < 2; ++head) {
        for (int64_t block = 0; block < kBlocks; ++block) {
          const int32_t location = plan.locations[head * kBlocks + block];
          const int64_t record = head * blocks_of_rank_[rank_[block]] + ordinal_[block];
          if (wanted.count({head, block}) == 0) {
            EXPECT_EQ(location, -1);
          } else if (rank_[block] == 1) {
            EXPECT_EQ(location, record);
          } else {
            const int64_t slot = location - 2 * blocks_of_rank_[1];
            ASSERT_GE(slot, 0);
            ASSERT_LT(slot, plan.num_slots);
            EXPECT_EQ(plan.peers[slot], rank_[block]);
            EXPECT_EQ(plan.offsets[slot], record * kRecordBytes);
          }
        }
      }
      // The next query would not have fitted.
      if (plan.query_end < kTokens) {
        add(plan.query_end);
        EXPECT_GT(static_cast<int64_t>(remote.size()), capacity);
      }
      begin = plan.query_end;
    }
    EXPECT_EQ(pieces == 1, capacity == 40);
  }
}

// The kv heads of a call have the places that they have in a call of all, and no others are
// touched.
TEST_F(PlanFetchTest, HeadsInCallsOfTheirOwn) {
  const Plan all = Run(0, 1000), second = Run(0, 1000, {1, 2});
  const int64_t num_own_records = 2 * blocks_of_rank_[1];
  for (int64_t block = 0; block < kBlocks; ++block) {
    EXPECT_EQ(second.locations[block], -9);
    const int32_t expected = all.locations[kBlocks + block];
    const int32_t actual = second.locations[kBlocks + block];
    if (expected < num_own_records) {
      EXPECT_EQ(actual, expected);
    } else {
      ASSERT_GE(actual, num_own_records);
      EXPECT_EQ(second.offsets[actual - num_own_records], all.offsets[expected - num_own_records]);
    }
  }
}

TEST_F(PlanFetchTest, IsTheSameEveryTime) {
  const Plan a = Run(3, 9), b = Run(3, 9);
  EXPECT_EQ(a.locations, b.locations);
  EXPECT_EQ(a.peers, b.peers);
  EXPECT_EQ(a.offsets, b.offsets);
}

}  // namespace
}  // namespace nsa::kernels::cpu
