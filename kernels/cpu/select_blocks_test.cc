#include "kernels/cpu/select_blocks.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "tests/testing/random.h"

namespace nsa::kernels::cpu {
namespace {

AttentionDims Dims(int32_t n, int32_t initial, int32_t local) {
  AttentionDims dims{};
  dims.num_selected_blocks = n;
  dims.num_initial_blocks = initial;
  dims.num_local_blocks = local;
  return dims;
}

std::vector<int32_t> Select(const AttentionDims& dims, const std::vector<float>& scores) {
  std::vector<ScoredBlock> heap;
  std::vector<int32_t> selected(dims.num_selected_blocks, -7);
  SelectBlocks(dims, scores.data(), static_cast<int64_t>(scores.size()), heap, selected.data());
  return selected;
}

// The rule as it stands: all blocks sorted, the forced ones first.
std::vector<int32_t> SortAndTake(const AttentionDims& dims, const std::vector<float>& scores) {
  const int32_t count = static_cast<int32_t>(scores.size());
  const auto is_forced = [&](int32_t j) {
    return j < dims.num_initial_blocks || j >= count - dims.num_local_blocks;
  };
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (is_forced(a) != is_forced(b)) return is_forced(a);
    return !is_forced(a) && scores[a] > scores[b];
  });
  order.resize(std::min(count, dims.num_selected_blocks));
  std::sort(order.begin(), order.end());
  order.resize(dims.num_selected_blocks, -1);
  return order;
}

TEST(SelectBlocksTest, FewerCandidatesThanBlocks) {
  EXPECT_EQ(Select(Dims(4, 1, 2), {0.5f}), (std::vector<int32_t>{0, -1, -1, -1}));
  EXPECT_EQ(Select(Dims(4, 1, 2), {0, 0, 0, 0}), (std::vector<int32_t>{0, 1, 2, 3}));
}

TEST(SelectBlocksTest, ForcedBlocksNeedNoScore) {
  EXPECT_EQ(Select(Dims(3, 1, 1), {0, 1, 5, 2, 0}), (std::vector<int32_t>{0, 2, 4}));
  EXPECT_EQ(Select(Dims(2, 0, 2), {9, 9, 9, 0, 0}), (std::vector<int32_t>{3, 4}));
  EXPECT_EQ(Select(Dims(3, 2, 1), {0, 0, 9, 9, 0}), (std::vector<int32_t>{0, 1, 4}));
}

TEST(SelectBlocksTest, TiesGoToTheLowerIndex) {
  EXPECT_EQ(Select(Dims(3, 0, 1), {1, 1, 1, 1, 1}), (std::vector<int32_t>{0, 1, 4}));
  EXPECT_EQ(Select(Dims(3, 0, 1), {1, 2, 1, 2, 0}), (std::vector<int32_t>{1, 3, 4}));
  EXPECT_EQ(Select(Dims(3, 0, 1), {1, 2, 1, 1, 0}), (std::vector<int32_t>{0, 1, 4}));
}

TEST(SelectBlocksTest, AgreesWithSorting) {
  test::Random random(3);
  for (int i = 0; i < 5000; ++i) {
    const int32_t initial = static_cast<int32_t>(random.Int(0, 3));
    const int32_t local = static_cast<int32_t>(random.Int(1, 3));
    const AttentionDims dims =
        Dims(initial + local + static_cast<int32_t>(random.Int(0, 20)), initial, local);
    std::vector<float> scores(random.Int(1, 100));
    const int64_t levels = random.Pick<int64_t>({1, 2, 5, 1000000});  // few levels: many ties
    for (float& score : scores) score = static_cast<float>(random.Int(0, levels));
    ASSERT_EQ(Select(dims, scores), SortAndTake(dims, scores));
  }
}

}  // namespace
}  // namespace nsa::kernels::cpu
