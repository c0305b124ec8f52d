#include "nsa/plan/rank_plan.h"

#include <random>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nsa {
namespace {

NsaConfig SmallConfig() {
  NsaConfig config;
  config.compress_block_tokens = 32;
  config.compress_stride_tokens = 16;
  config.select_block_tokens = 64;
  config.window_tokens = 50;
  return config;
}

// Tokens that `rank` needs for one branch, found token by token.
std::set<int64_t> NeededNaively(const NsaConfig& config, const ShardPlan& plan,
                                const BlockMap& blocks, int rank, int branch) {
  std::set<int64_t> needed;
  for (int64_t token = 0; token < plan.num_tokens(); ++token) {
    if (plan.Locate(token).rank != rank) continue;
    const kernels::Document& document = blocks.documents[blocks.DocumentOf(token)];
    const int64_t position = token - document.token_begin;
    int64_t first = position;
    int64_t last = position;
    if (branch == kCmpBit && position % config.compress_stride_tokens == 0 &&
        position + config.compress_block_tokens <= document.num_tokens) {
      last = position + config.compress_block_tokens - 1;
    }
    if (branch == kSlcBit && position % config.select_block_tokens == 0) {
      last = std::min(position + config.select_block_tokens, document.num_tokens) - 1;
    }
    if (branch == kWinBit) first = std::max<int64_t>(0, position - config.window_tokens + 1);
    for (int64_t p = first; p <= last; ++p) {
      if (plan.Locate(document.token_begin + p).rank != rank)
        needed.insert(document.token_begin + p);
    }
  }
  return needed;
}

std::set<int64_t> TokensOf(const std::vector<HaloPiece>& pieces) {
  std::set<int64_t> tokens;
  int64_t row = 0;
  int32_t owner = 0;
  for (const HaloPiece& piece : pieces) {
    EXPECT_EQ(piece.halo_row, row) << "halo rows are dense";
    EXPECT_GE(piece.owner, owner) << "and by owner";
    owner = piece.owner;
    row += piece.num_tokens;
    for (int64_t i = 0; i < piece.num_tokens; ++i) tokens.insert(piece.token_begin + i);
  }
  EXPECT_EQ(static_cast<int64_t>(tokens.size()), row);
  return tokens;
}

void CheckPlan(const NsaConfig& config, const ShardPlan& plan) {
  const BlockMap blocks = MakeBlockMap(config, plan);
  std::vector<RankPlan> ranks;
  for (int rank = 0; rank < plan.num_ranks(); ++rank) {
    ranks.push_back(MakeRankPlan(config, plan, blocks, rank));
  }

  // Each block has one owner: the rank of its first token.
  int64_t cmp_blocks = 0;
  int64_t slc_blocks = 0;
  for (const RankPlan& rank : ranks) {
    int64_t ordinal = 0;
    for (const kernels::BlockRun& run : rank.slc_runs) {
      const kernels::Document& document = blocks.documents[run.document];
      for (int64_t b = run.first_block; b < run.first_block + run.num_blocks; ++b) {
        const int64_t first_token = document.token_begin + b * config.select_block_tokens;
        EXPECT_EQ(plan.Locate(first_token).rank, rank.rank);
        EXPECT_EQ(blocks.slc_owner[document.slc_block_begin + b], rank.rank);
        EXPECT_EQ(blocks.slc_ordinal[document.slc_block_begin + b], ordinal++);
      }
    }
    EXPECT_EQ(ordinal, rank.num_own_slc_blocks);
    slc_blocks += ordinal;
    for (const kernels::BlockRun& run : rank.cmp_runs) {
      const kernels::Document& document = blocks.documents[run.document];
      for (int64_t b = run.first_block; b < run.first_block + run.num_blocks; ++b) {
        const int64_t first = b * config.compress_stride_tokens;
        EXPECT_EQ(plan.Locate(document.token_begin + first).rank, rank.rank);
        EXPECT_LE(first + config.compress_block_tokens, document.num_tokens);
      }
      cmp_blocks += run.num_blocks;
    }
  }
  EXPECT_EQ(cmp_blocks, blocks.num_cmp_blocks);
  EXPECT_EQ(slc_blocks, blocks.num_slc_blocks);

  for (const RankPlan& rank : ranks) {
    // Halos hold exactly what is needed; a set of branches holds the union of its branches'.
    for (int branches = 1; branches < kNumBranchSets; ++branches) {
      std::set<int64_t> expected;
      for (int bit : {kCmpBit, kSlcBit, kWinBit}) {
        if (!(branches & bit)) continue;
        expected.merge(NeededNaively(config, plan, blocks, rank.rank, bit));
      }
      const BranchKv& kv = rank.kv[branches];
      EXPECT_EQ(TokensOf(kv.receives), expected);
      EXPECT_EQ(kv.halo_rows, static_cast<int64_t>(expected.size()));

      // Segments are ordered, inside one document, and name own and halo rows rightly.
      int64_t next_token = 0;
      std::set<int64_t> seen;
      for (const kernels::Segment& segment : kv.segments) {
        const kernels::Document& document = blocks.documents[segment.document];
        EXPECT_LE(segment.position + segment.num_tokens, document.num_tokens);
        for (int64_t i = 0; i < segment.num_tokens; ++i) {
          const int64_t token = document.token_begin + segment.position + i;
          EXPECT_GE(token, next_token);
          next_token = token + 1;
          const TokenPlace place = plan.Locate(token);
          EXPECT_EQ(segment.is_halo == 0, place.rank == rank.rank);
          if (!segment.is_halo) {
            EXPECT_EQ(segment.row + i, place.local);
          }
          seen.insert(token);
        }
      }
      EXPECT_EQ(static_cast<int64_t>(seen.size()), rank.num_tokens + kv.halo_rows);

      // What b sends to a is what a receives from b, in order.
      for (const RankPlan& other : ranks) {
        std::vector<int64_t> sent;
        for (const HaloSend& send : other.kv[branches].sends) {
          if (send.peer != rank.rank) continue;
          for (int64_t i = 0; i < send.num_tokens; ++i) {
            sent.push_back(plan.GlobalToken(other.rank, send.row + i));
          }
        }
        std::vector<int64_t> received;
        for (const HaloPiece& piece : kv.receives) {
          if (piece.owner != other.rank) continue;
          for (int64_t i = 0; i < piece.num_tokens; ++i) received.push_back(piece.token_begin + i);
        }
        EXPECT_EQ(sent, received);
      }
    }

    // Remote blocks that a query of the rank can see, counted one by one.
    std::set<int64_t> visible;
    for (const kernels::Segment& segment : rank.query_segments) {
      const kernels::Document& document = blocks.documents[segment.document];
      const int64_t last = segment.position + segment.num_tokens - 1;
      for (int64_t b = 0; b <= last / config.select_block_tokens; ++b) {
        if (blocks.slc_owner[document.slc_block_begin + b] != rank.rank) {
          visible.insert(document.slc_block_begin + b);
        }
      }
    }
    EXPECT_EQ(rank.num_remote_slc_blocks, static_cast<int64_t>(visible.size()));
  }
}

TEST(RankPlanTest, EveryShardingOfSmallSequences) {
  for (int64_t num_tokens : {1, 31, 32, 100, 257}) {
    for (int num_ranks : {1, 2, 3, 5}) {
      for (const char* sharding : {"contiguous", "zigzag"}) {
        SCOPED_TRACE(testing::Message() << sharding << " " << num_tokens << " / " << num_ranks);
        const auto plan = ShardPlan::Parse(sharding, num_tokens, num_ranks);
        ASSERT_TRUE(plan.ok());
        CheckPlan(SmallConfig(), *plan);
      }
    }
  }
}

TEST(RankPlanTest, ChunksSmallerThanBlocksAndPackedDocuments) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 25; ++trial) {
    SCOPED_TRACE(trial);
    const int num_ranks = 1 + static_cast<int>(random() % 5);
    const int64_t num_tokens = 1 + static_cast<int64_t>(random() % 300);
    std::vector<Chunk> chunks;
    for (int64_t begin = 0; begin < num_tokens;) {
      const int64_t length =
          std::min<int64_t>(num_tokens - begin, 1 + static_cast<int64_t>(random() % 40));
      chunks.push_back({static_cast<int32_t>(random() % num_ranks), begin, length});
      begin += length;
    }
    std::vector<int64_t> cu_seqlens = {0};
    while (cu_seqlens.back() < num_tokens) {
      cu_seqlens.push_back(
          std::min<int64_t>(num_tokens, cu_seqlens.back() + static_cast<int64_t>(random() % 120)));
    }
    const auto plan = ShardPlan::Create(num_tokens, num_ranks, chunks, cu_seqlens);
    ASSERT_TRUE(plan.ok()) << plan.status();
    CheckPlan(SmallConfig(), *plan);
  }
}

TEST(RankPlanTest, ZigZagHasTwoSeamsPerRank) {
  const auto plan = ShardPlan::Parse("zigzag", 1024, 4);
  ASSERT_TRUE(plan.ok());
  const NsaConfig config = SmallConfig();
  const BlockMap blocks = MakeBlockMap(config, *plan);
  // Rank 0: [0,128) and [896,1024): the first needs 16 tokens behind it, the last none.
  const RankPlan rank = MakeRankPlan(config, *plan, blocks, 0);
  EXPECT_EQ(rank.kv[kCmpBit].halo_rows, 16);
  EXPECT_EQ(rank.kv[kWinBit].halo_rows, 49);
  EXPECT_EQ(rank.kv[kSlcBit].halo_rows, 0);
  EXPECT_EQ(rank.kv[kCmpBit | kSlcBit | kWinBit].halo_rows, 65);
}

}  // namespace
}  // namespace nsa
