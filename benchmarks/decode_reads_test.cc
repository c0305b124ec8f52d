#include "benchmarks/decode_reads.h"

#include <cstdint>
#include <utility>

#include "gtest/gtest.h"

namespace nsa::benchmarks {
namespace {

TEST(DecodeReadsTest, IsNotMoreThanInTheTableOfNsa) {
  const std::pair<int64_t, int64_t> table[] = {
      {8192, 2048}, {16384, 2560}, {32768, 3584}, {65536, 5632}};
  for (const auto& [tokens, rows] : table) {
    // The last stride has no block of its own: the table counts it.
    EXPECT_EQ(DecodeReadsOf({}, tokens).rows(), rows - 1) << tokens;
  }
}

TEST(DecodeReadsTest, ShortSequencesAreReadWhole) {
  for (int64_t tokens : {1, 31, 64, 500}) {
    const DecodeReads reads = DecodeReadsOf({}, tokens);
    EXPECT_EQ(reads.selected, tokens);
    EXPECT_EQ(reads.window, tokens);
  }
  EXPECT_EQ(DecodeReadsOf({}, 31).summaries, 0);
  EXPECT_EQ(DecodeReadsOf({}, 48).summaries, 2);
}

TEST(DecodeReadsTest, TheLastBlockEndsWithTheSequence) {
  EXPECT_EQ(DecodeReadsOf({}, 64 * 100 + 1).selected, 64 * 15 + 1);
  EXPECT_EQ(DecodeReadsOf({}, 64 * 100 + 63).selected, 64 * 15 + 63);
}

TEST(DecodeReadsTest, RowsHaveTheBytesOfAllHeads) {
  EXPECT_EQ(KvRowBytes({.num_kv_heads = 2, .head_dim_qk = 192, .head_dim_v = 128}), 1280);
}

}  // namespace
}  // namespace nsa::benchmarks
