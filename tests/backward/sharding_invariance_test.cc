// Of the backward, the number of ranks, the sharding, the fetch budget and what was kept must not
// show in a single bit of dq and dgate, and in other gradients by no more than the order of sums.
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/forward/backend.h"
#include "tests/testing/compare.h"
#include "tests/testing/gradient_check.h"
#include "tests/testing/sharded_backward.h"

namespace nsa::test {
namespace {

using G = GlobalGradients;

class BackwardInvarianceTest : public BackendTest, public ::testing::WithParamInterface<DType> {
 protected:
  void SetUp() override {
    BackendTest::SetUp();
    if (IsSkipped()) return;
    InputOptions options;
    options.dtype = GetParam();
    options.hidden_width = 24;
    problem_ = RandomProblem({.num_q_heads = 8,
                              .num_kv_heads = 2,
                              .head_dim_qk = 64,
                              .head_dim_v = 128,
                              .num_selected_blocks = 6,
                              .window_tokens = 100,
                              .compressor = reference::CompressorKind::kMlp},
                             cu_seqlens_, options, 7);
    Random random(8);
    d_o_ = Encode(GetParam(), RandomOutputGradients(problem_, &random));
    one_ = Run("contiguous", 1);
  }

  std::unique_ptr<G> Run(const std::string& sharding, int num_ranks, const RunOptions& options = {},
                         const BackwardRun& run = {}) {
    auto gradients = std::make_unique<G>(problem_, num_ranks, run.gradient_dtype);
    GlobalOutputs outputs(problem_);
    const absl::Status status = RunLoopbackBackward(
        problem_, d_o_, *ShardPlan::Parse(sharding, cu_seqlens_.back(), num_ranks, cu_seqlens_),
        options, run, &outputs, gradients.get(), &stats_, TheBackend().make_kernels);
    EXPECT_TRUE(status.ok()) << status;
    return gradients;
  }

  void ExpectSame(const G& expected, const G& actual, G::Field field) {
    EXPECT_TRUE(SameBits(G::Name(field), expected.dtype(), expected.shape(field),
                         expected.data(field), actual.data(field)));
  }
  void ExpectAllSame(const G& expected, const G& actual) {
    for (int i = 0; i < G::kNumFields; ++i) ExpectSame(expected, actual, static_cast<G::Field>(i));
    for (int c = 0; c < 2; ++c) {
      for (int i = 0; i < G::kNumWeights; ++i) {
        const auto weight = static_cast<G::Weight>(i);
        if (expected.weight_shape(c, weight).empty()) continue;
        EXPECT_EQ(expected.WeightValues(c, weight), actual.WeightValues(c, weight));
      }
    }
  }
  // As those of one rank.
  void ExpectEquivalent(const std::string& sharding, int num_ranks, const RunOptions& options = {},
                        const BackwardRun& run = {}) {
    SCOPED_TRACE(testing::Message() << sharding << " on " << num_ranks << " ranks");
    const auto gradients = Run(sharding, num_ranks, options, run);
    ExpectSame(*one_, *gradients, G::kDq);
    ExpectSame(*one_, *gradients, G::kDgate);
    const double tolerance = GetParam() == DType::kF32 ? 1e-6 : 1e-3;
    for (int i = 0; i < G::kNumFields; ++i) {
      const auto field = static_cast<G::Field>(i);
      EXPECT_LE(RelativeL2(one_->Values(field), gradients->Values(field)), tolerance)
          << G::Name(field);
    }
    for (int c = 0; c < 2; ++c) {
      for (int i = 0; i < G::kNumWeights; ++i) {
        const auto weight = static_cast<G::Weight>(i);
        // Of compress_k, that of b2 is zero but for rounding.
        if (one_->weight_shape(c, weight).empty() || (c == 0 && weight == G::kB2)) continue;
        EXPECT_LE(RelativeL2(one_->WeightValues(c, weight), gradients->WeightValues(c, weight)),
                  tolerance)
            << c << " " << G::Name(weight);
      }
    }
  }

  std::vector<int64_t> cu_seqlens_ = {0, 500, 501, 1203};
  Problem problem_;
  Bytes d_o_;
  std::unique_ptr<G> one_;
  ForwardStats stats_;
};

TEST_P(BackwardInvarianceTest, AnyNumberOfRanksAndAnySharding) {
  for (int num_ranks : {2, 4}) {
    ExpectEquivalent("contiguous", num_ranks);
    ExpectEquivalent("zigzag", num_ranks);
    ExpectEquivalent("zigzag-per-document", num_ranks);
  }
  ExpectEquivalent("0,401,0,802", 4);
}

TEST_P(BackwardInvarianceTest, RepeatedRunsGiveTheSameBits) {
  ExpectAllSame(*one_, *Run("contiguous", 1));
  ExpectAllSame(*Run("zigzag", 3), *Run("zigzag", 3));
}

TEST_P(BackwardInvarianceTest, RecomputedSummariesAndForwardsBetween) {
  const auto kept = Run("zigzag", 3);
  const RunOptions options = {.row_padding = 5 * TheBackend().alignment,
                              .head_padding = 3 * TheBackend().alignment};
  ExpectAllSame(
      *kept, *Run("zigzag", 3, options, {.keep_summaries = false, .other_forwards_between = true}));
}

TEST_P(BackwardInvarianceTest, KeptBlocksAreNotFetchedAgain) {
  const auto fetched = Run("zigzag", 3);
  EXPECT_GT(stats_.ranks(2).records_fetched(), 0);
  const int64_t saved_bytes = stats_.ranks(2).saved_bytes();
  ExpectAllSame(*fetched, *Run("zigzag", 3, {}, {.keep_blocks = true}));
  EXPECT_EQ(stats_.ranks(2).records_fetched(), 0);
  EXPECT_GT(stats_.ranks(2).saved_bytes(), saved_bytes);
  ExpectAllSame(*fetched,
                *Run("zigzag", 3, {}, {.keep_blocks = true, .other_forwards_between = true}));
  // The first rank sees nothing remote; pieces of one kv head.
  const int64_t record = 64 * (64 + 128) * SizeOf(GetParam());
  ExpectEquivalent("contiguous", 3, {.fetch_budget_bytes = 13 * record}, {.keep_blocks = true});
}

TEST_P(BackwardInvarianceTest, FetchBudgetOfOneKvHead) {
  // The last of three ranks sees the 7 blocks of its document that others own, of 2 kv heads.
  const int64_t record = 64 * (64 + 128) * SizeOf(GetParam());
  ExpectEquivalent("contiguous", 3, {.fetch_budget_bytes = 13 * record});
  EXPECT_EQ(stats_.ranks(0).query_pieces(), 2) << "the same on all ranks";
  EXPECT_GT(stats_.ranks(0).block_gradients_received(), 0);
  EXPECT_GT(stats_.ranks(0).saved_bytes(), 0);
}

TEST_P(BackwardInvarianceTest, ParametersSummedOverRanks) {
  const auto local = Run("zigzag", 3);
  const auto sum = Run("zigzag", 3, {}, {.sum_over_ranks = true});
  for (int c = 0; c < 2; ++c) {
    for (int i = 0; i < G::kNumWeights; ++i) {
      const auto weight = static_cast<G::Weight>(i);
      const Dims shape = sum->weight_shape(c, weight);
      if (shape.empty()) continue;
      for (int rank = 1; rank < 3; ++rank) {
        EXPECT_TRUE(SameBits(G::Name(weight), DType::kF32, shape, sum->weight_data(c, weight, 0),
                             sum->weight_data(c, weight, rank)));
      }
      std::vector<double> three = local->WeightValues(c, weight);
      for (double& x : three) x *= 3;  // WeightValues adds up ranks that have the whole sum each
      if (c == 1 || weight != G::kB2) {
        EXPECT_LE(RelativeL2(three, sum->WeightValues(c, weight)), 1e-5) << G::Name(weight);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(DTypes, BackwardInvarianceTest, ::testing::ValuesIn(TheBackend().dtypes),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace nsa::test
