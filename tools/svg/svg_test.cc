#include <cctype>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tools/svg/canvas.h"
#include "tools/svg/drawings.h"

namespace nsa::tools {
namespace {

int CountOf(const std::string& text, const std::string& part) {
  int count = 0;
  for (size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

// What is not well-formed about the part of XML that drawings use; empty when nothing is.
std::string XmlError(const std::string& xml) {
  std::vector<std::string> open;
  int roots = 0;
  size_t at = xml.find("?>");
  if (xml.rfind("<?xml", 0) != 0 || at == std::string::npos) return "no declaration";
  at += 2;
  while (at < xml.size()) {
    const size_t tag = xml.find('<', at);
    const std::string text = xml.substr(at, tag == std::string::npos ? tag : tag - at);
    if (open.empty() && text.find_first_not_of(" \n") != std::string::npos) return "text outside";
    for (size_t i = text.find('&'); i != std::string::npos; i = text.find('&', i + 1)) {
      bool known = false;
      for (const char* entity : {"&amp;", "&lt;", "&gt;", "&quot;"}) {
        known = known || text.compare(i, std::string(entity).size(), entity) == 0;
      }
      if (!known) return absl::StrCat("bare & in ", text);
    }
    if (tag == std::string::npos) break;
    const size_t end = xml.find('>', tag);
    if (end == std::string::npos) return "unclosed tag";
    std::string inside = xml.substr(tag + 1, end - tag - 1);
    at = end + 1;
    if (inside.find('<') != std::string::npos) return absl::StrCat("< in tag ", inside);
    if (CountOf(inside, "\"") % 2 != 0) return absl::StrCat("odd quotes in ", inside);
    const std::string name = inside.substr(0, inside.find_first_of(" /\n", 1));
    if (inside[0] == '/') {
      if (open.empty() || "/" + open.back() != inside) return absl::StrCat("stray ", inside);
      open.pop_back();
    } else {
      if (open.empty()) ++roots;
      if (inside.back() != '/') open.push_back(name);
    }
  }
  if (!open.empty()) return absl::StrCat(open.back(), " is never closed");
  return roots == 1 ? "" : absl::StrCat(roots, " roots");
}

ShardPlan MakePlan(const std::string& sharding, int64_t num_tokens, int num_ranks,
                   std::vector<int64_t> cu_seqlens = {}) {
  return *ShardPlan::Parse(sharding, num_tokens, num_ranks, std::move(cu_seqlens));
}

TEST(SvgCanvasTest, EscapesWhatXmlCannotHold) {
  SvgCanvas canvas(100, 50);
  canvas.Text(1, 2, "a < b & \"c\" > d\x01");
  canvas.Rect(0, 0, 1.005, -0.001, "red", "", "<tooltip>");
  const std::string svg = canvas.Finish();
  EXPECT_EQ(XmlError(svg), "");
  EXPECT_NE(svg.find("a &lt; b &amp; &quot;c&quot; &gt; d "), std::string::npos);
  EXPECT_NE(svg.find("<title>&lt;tooltip&gt;</title>"), std::string::npos);
  EXPECT_EQ(svg.find("-0\""), std::string::npos);
}

TEST(SvgCanvasTest, GroupsDigits) {
  EXPECT_EQ(GroupDigits(0), "0");
  EXPECT_EQ(GroupDigits(999), "999");
  EXPECT_EQ(GroupDigits(1000), "1,000");
  EXPECT_EQ(GroupDigits(-1048576), "-1,048,576");
}

TEST(SvgCanvasTest, TicksAreRoundAndStayInRange) {
  EXPECT_EQ(RoundTicks(65536, 8),
            (std::vector<int64_t>{0, 8192, 16384, 24576, 32768, 40960, 49152, 57344, 65536}));
  EXPECT_EQ(RoundTicks(1000, 5), (std::vector<int64_t>{0, 200, 400, 600, 800, 1000}));
  EXPECT_EQ(RoundTicks(3, 10), (std::vector<int64_t>{0, 1, 2, 3}));
  EXPECT_EQ(RoundTicks(0, 10), (std::vector<int64_t>{0}));
}

TEST(SvgCanvasTest, RanksHaveDifferentColors) {
  for (int num_ranks : {2, 8, 9, 64}) {
    std::vector<std::string> colors;
    for (int rank = 0; rank < num_ranks; ++rank) {
      colors.push_back(HexColor(RankColor(rank, num_ranks)));
    }
    std::sort(colors.begin(), colors.end());
    EXPECT_EQ(std::unique(colors.begin(), colors.end()), colors.end()) << num_ranks;
  }
}

TEST(DrawShardingTest, DrawsEachChunkTwice) {
  const std::string svg = DrawSharding(MakePlan("zigzag", 1000, 4, {0, 300, 1000}));
  EXPECT_EQ(XmlError(svg), "");
  // Seven chunks: the last rank's two are neighbours, hence one. Once in the bar, once in a lane.
  EXPECT_EQ(CountOf(svg, "<title>rank "), 2 * 7);
  EXPECT_EQ(CountOf(svg, "<title>rank 3: tokens 375 to 624 (250)"), 2);
  EXPECT_NE(svg.find("document 1: 700"), std::string::npos);
  EXPECT_NE(svg.find("Sharding of 1,000 tokens over 4 ranks"), std::string::npos);
}

TEST(DrawShardingTest, ManyChunksStaySmall) {
  std::vector<int64_t> ends;
  for (int64_t end = 0; end <= 100000; end += 50) ends.push_back(end);
  const std::string svg = DrawSharding(MakePlan("zigzag-per-document", 100000, 16, ends));
  EXPECT_EQ(XmlError(svg), "");
  EXPECT_LT(svg.size(), 4u << 20);
}

TEST(DrawShardingTest, AnySize) {
  for (int num_ranks : {1, 2, 64, 300}) {
    for (int64_t num_tokens : {1, 2, 63, 1 << 20}) {
      EXPECT_EQ(XmlError(DrawSharding(MakePlan("zigzag", num_tokens, num_ranks))), "");
    }
  }
  EXPECT_EQ(XmlError(DrawSharding(MakePlan("0,5,0", 5, 3))), "");
}

ForwardStats MakeStats(int num_ranks) {
  ForwardStats stats;
  for (int to = 0; to < num_ranks; ++to) {
    RankStats* rank = stats.add_ranks();
    rank->set_rank(to);
    for (int from = 0; from < num_ranks; ++from) {
      rank->add_block_bytes_from_rank(from == to ? 0 : (from + 1) * 1024 * 1024);
    }
  }
  return stats;
}

TEST(DrawFetchMatrixTest, HasACellForEachPair) {
  for (int num_ranks : {1, 2, 4, 64}) {
    const absl::StatusOr<std::string> svg = DrawFetchMatrix(MakeStats(num_ranks));
    ASSERT_TRUE(svg.ok()) << svg.status();
    EXPECT_EQ(XmlError(*svg), "");
    EXPECT_EQ(CountOf(*svg, "<title>from rank "), num_ranks * (num_ranks - 1));
    EXPECT_EQ(CountOf(*svg, "reads its own blocks in place"), num_ranks);
  }
  const std::string svg = *DrawFetchMatrix(MakeStats(4));
  EXPECT_NE(svg.find("from rank 2 to rank 0: 3.00 MiB"), std::string::npos);
  EXPECT_NE(svg.find("numbers in MiB, 30.00 MiB in all"), std::string::npos);
}

TEST(DrawFetchMatrixTest, RejectsIncompleteStatistics) {
  EXPECT_EQ(DrawFetchMatrix({}).status().code(), absl::StatusCode::kInvalidArgument);
  ForwardStats stats = MakeStats(2);
  stats.mutable_ranks(1)->add_block_bytes_from_rank(5);
  EXPECT_EQ(DrawFetchMatrix(stats).status().message(),
            "ranks[1].block_bytes_from_rank: has 3 entries, must have one for each of 2 ranks");
}

class DrawSelectionMapTest : public ::testing::Test {
 protected:
  DrawSelectionMapTest() {
    config_.num_selected_blocks = 3;
    config_.num_local_blocks = 1;
    config_.select_block_tokens = 16;
  }

  // The first block, the query's own, and the one in the middle between them.
  std::vector<int32_t> Indices(const ShardPlan& plan) const {
    std::vector<int32_t> indices;
    for (size_t i = 0; i + 1 < plan.cu_seqlens().size(); ++i) {
      for (int64_t t = 0; t < plan.cu_seqlens()[i + 1] - plan.cu_seqlens()[i]; ++t) {
        const int32_t own = static_cast<int32_t>(t / config_.select_block_tokens);
        indices.push_back(0);
        indices.push_back(own >= 2 ? own / 2 : own >= 1 ? own : -1);
        indices.push_back(own >= 2 ? own : -1);
      }
    }
    return indices;
  }

  absl::StatusOr<std::string> Draw(const ShardPlan& plan, const std::vector<int32_t>& indices) {
    const BlockMap blocks = MakeBlockMap(config_, plan);
    return DrawSelectionMap({.config = config_,
                             .plan = plan,
                             .blocks = blocks,
                             .block_indices = indices,
                             .kv_head = 1});
  }

  NsaConfig config_;
};

TEST_F(DrawSelectionMapTest, PaintsForcedAndChosenBlocks) {
  const ShardPlan plan = MakePlan("contiguous", 64, 2);
  const absl::StatusOr<std::string> svg = Draw(plan, Indices(plan));
  ASSERT_TRUE(svg.ok()) << svg.status();
  EXPECT_EQ(XmlError(*svg), "");
  // 64 rows. Of them, the 16 of block 0 and all others see block 0: one path for the forced cells;
  // rows of blocks 2 and 3 (32) have one chosen cell each; and one path is what is visible.
  EXPECT_EQ(CountOf(*svg, "<path "), 3);
  const size_t chosen = svg->rfind("<path ", svg->find("fill=\"#1952a8\""));
  ASSERT_NE(chosen, std::string::npos);
  EXPECT_EQ(CountOf(svg->substr(chosen, svg->find("/>", chosen) - chosen), "M"), 32);
  EXPECT_EQ(CountOf(*svg, "<title>queries of rank "), 2);
  EXPECT_EQ(CountOf(*svg, "<title>blocks owned by rank "), 2);
}

TEST_F(DrawSelectionMapTest, LongSequencesAreDownsampled) {
  const ShardPlan plan = MakePlan("zigzag", 40000, 4, {0, 5, 17000, 17001, 40000});
  const absl::StatusOr<std::string> svg = Draw(plan, Indices(plan));
  ASSERT_TRUE(svg.ok()) << svg.status();
  EXPECT_EQ(XmlError(*svg), "");
  EXPECT_LT(svg->size(), 1u << 20);
}

TEST_F(DrawSelectionMapTest, RejectsWrongIndices) {
  const ShardPlan plan = MakePlan("contiguous", 64, 2);
  std::vector<int32_t> indices = Indices(plan);
  indices.pop_back();
  EXPECT_EQ(Draw(plan, indices).status().message(),
            "block_indices: has 191 entries, must have 64 x 3");
  indices.push_back(4);
  EXPECT_EQ(Draw(plan, indices).status().message(),
            "block_indices of token 63: 4: must be -1 or a block up to the query's own, 3");
}

}  // namespace
}  // namespace nsa::tools
