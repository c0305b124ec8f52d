#include "tests/testing/compare.h"

#include <cmath>
#include <limits>
#include <vector>

#include "gtest/gtest.h"

namespace nsa::test {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const double kNan = std::nan("");

TEST(RelativeL2Test, Values) {
  EXPECT_EQ(RelativeL2({3, 4}, {3, 4}), 0.0);
  EXPECT_DOUBLE_EQ(RelativeL2({3, 4}, {3, 4.5}), 0.1);
  EXPECT_EQ(RelativeL2({0, 0}, {0, 0}), 0.0);
  EXPECT_EQ(RelativeL2({1}, {1, 2}), kInfinity);
  EXPECT_EQ(RelativeL2({1, 2}, {1, kNan}), kInfinity);
  EXPECT_EQ(RelativeL2({1, -kInfinity}, {1, -kInfinity}), 0.0);
}

TEST(CloseTest, OneWrongRowAmongManyFails) {
  std::vector<double> expected(20000, 1.0), actual = expected;
  EXPECT_TRUE(Close("o", expected, actual, 2, 1e-2));
  actual[7] = 1.5;  // 0.35 % of the whole, 35 % of its row
  const auto result = Close("o", expected, actual, 2, 1e-2);
  EXPECT_FALSE(result);
  EXPECT_NE(std::string(result.message()).find("worst row 3"), std::string::npos)
      << result.message();
  EXPECT_NE(std::string(result.message()).find("element 1: expected 1, actual 1.5"),
            std::string::npos)
      << result.message();
}

TEST(CloseTest, NanFailsAndSmallRowsAreMeasuredByTheUsualNorm) {
  EXPECT_FALSE(Close("o", {1, 1, kNan, 1}, {1, 1, kNan, 1}, 2, 1.0));
  EXPECT_FALSE(Close("o", {1, 1, 0, 0}, {1, 1, kNan, 0}, 2, 1.0));
  EXPECT_TRUE(Close("o", {1, 1, 0, 1e-9}, {1, 1, 0, -1e-9}, 2, 1e-6));
  EXPECT_FALSE(Close("o", {1, 1}, {1, 1, 1}, 1, 1.0));
}

TEST(CloseElementsTest, InfinitiesMustBeEqual) {
  EXPECT_TRUE(CloseElements("lse", {-kInfinity, 2}, {-kInfinity, 2.001}, 1e-2, 0));
  EXPECT_FALSE(CloseElements("lse", {-kInfinity, 2}, {-1e30, 2}, 1e-2, 1e-2));
  EXPECT_FALSE(CloseElements("lse", {1}, {-kInfinity}, 1e-2, 1e-2));
  EXPECT_FALSE(CloseElements("lse", {1}, {kNan}, 1e-2, 1e-2));
  EXPECT_FALSE(CloseElements("lse", {100}, {101}, 1e-2, 1e-3));
}

TEST(SameBitsTest, NamesTheFirstDifference) {
  const Bytes a = Encode(DType::kBF16, {1, 2, 3, 4, 5, 6});
  const Bytes b = Encode(DType::kBF16, {1, 2, 3, 4, 8, 9});
  EXPECT_TRUE(SameBits("o", DType::kBF16, {2, 3}, a.data(), a.data()));
  const auto result = SameBits("o", DType::kBF16, {2, 3}, a.data(), b.data());
  EXPECT_STREQ(
      result.message(),
      "o: 2 of 6 bf16 values differ in bits; first at [1, 1]: expected 5 (0x40a0), actual 8 "
      "(0x4100)");
  // Zeros of two signs are equal in value only.
  const float plus = 0.0f, minus = -0.0f;
  EXPECT_FALSE(SameBits("o", DType::kF32, {1}, &plus, &minus));
}

TEST(SameIndicesTest, NamesTheFirstDifference) {
  EXPECT_TRUE(SameIndices("idx", {1, 2}, {3, -1}, {3, -1}));
  EXPECT_STREQ(SameIndices("idx", {1, 2}, {3, -1}, {3, 4}).message(),
               "idx: 1 of 2 indices differ; first at [0, 1]: expected -1, actual 4");
  EXPECT_FALSE(SameIndices("idx", {1, 2}, {3, -1}, {3}));
}

// One document of 24 tokens in blocks of 4, a query in block 5; block 0 and 5 forced, 4 places.
class SelectionTest : public ::testing::Test {
 protected:
  SelectionTest() {
    config_.select_block_tokens = 4;
    config_.num_selected_blocks = 4;
    config_.num_initial_blocks = 1;
    config_.num_local_blocks = 1;
    expected_.max_blocks = 6;
    expected_.block_indices.assign(24 * 4, -1);
    expected_.scores.assign(24 * 6, 0.0);
    const double scores[] = {0.0, 0.5, 0.2, 0.19999, 0.4, 0.0};
    std::copy(scores, scores + 6, expected_.scores.begin() + 23 * 6);
    const int32_t blocks[] = {0, 1, 4, 5};
    std::copy(blocks, blocks + 4, expected_.block_indices.begin() + 23 * 4);
  }

  ::testing::AssertionResult Agrees(const std::vector<int32_t>& row, double tolerance = 1e-3) {
    std::vector<int32_t> actual = expected_.block_indices;
    std::copy(row.begin(), row.end(), actual.begin() + 23 * 4);
    return SelectionAgrees(config_, {0, 24}, expected_, actual,
                           {.absolute = tolerance, .relative = 0.0}, &num_flipped_);
  }

  reference::ReferenceConfig config_;
  reference::ReferenceOutputs expected_;
  int64_t num_flipped_ = 0;
};

TEST_F(SelectionTest, NearTiesMayFlip) {
  EXPECT_TRUE(Agrees({0, 1, 4, 5}));
  EXPECT_EQ(num_flipped_, 0);
  EXPECT_FALSE(Agrees({0, 1, 2, 5}));
  EXPECT_TRUE(Agrees({0, 1, 2, 5}, 0.21));
  EXPECT_EQ(num_flipped_, 2);
}

TEST_F(SelectionTest, RulesHoldWhateverTheScores) {
  const double any = 100.0;
  EXPECT_FALSE(Agrees({1, 2, 4, 5}, any)) << "forced first block";
  EXPECT_FALSE(Agrees({0, 1, 2, 4}, any)) << "forced own block";
  EXPECT_FALSE(Agrees({0, 4, 1, 5}, any)) << "order";
  EXPECT_FALSE(Agrees({0, 1, 1, 5}, any)) << "twice";
  EXPECT_FALSE(Agrees({0, 1, 5, 6}, any)) << "past the query";
  EXPECT_FALSE(Agrees({0, 1, 5, -1}, any)) << "too few";
  EXPECT_FALSE(Agrees({0, 1, -1, 5}, any)) << "padding inside";
  EXPECT_FALSE(Agrees({-2, 1, 4, 5}, any)) << "negative";
  EXPECT_STREQ(
      Agrees({0, 1, 2, 5}).message(),
      "block_indices: 1 of 24 rows are no right choice; first token 23 (23 of its document), "
      "kv head 0: a block of score 0.4 left out for one of 0.2; expected {0 1 4 5}, actual "
      "{0 1 2 5}");
}

TEST_F(SelectionTest, OnlyTheAskedTokens) {
  std::vector<int32_t> actual(24 * 4, -1);
  const std::vector<int64_t> tokens = {3};
  EXPECT_FALSE(SelectionAgrees(config_, {0, 24}, expected_, actual));
  EXPECT_TRUE(SelectionAgrees(config_, {0, 24}, expected_, actual, {.query_tokens = &tokens}));
}

}  // namespace
}  // namespace nsa::test
