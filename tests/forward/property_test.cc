// The sharded forward against the fp64 reference, on random configurations, documents, storage
// types and shardings.
#include <cmath>

#include "gtest/gtest.h"
#include "tests/testing/compare.h"
#include "tests/testing/sharded.h"

namespace nsa::test {
namespace {

using reference::ReferenceConfig;
using reference::ReferenceInputs;
using reference::ReferenceOutputs;

// Relative L2 error against the reference that each storage type may have.
double Bound(DType dtype) { return dtype == DType::kF32 ? 1e-5 : 4e-3; }

ShardPlan RandomPlan(const std::vector<int64_t>& cu_seqlens, Random* random) {
  const int64_t num_tokens = cu_seqlens.back();
  const int num_ranks = static_cast<int>(random->Int(1, 6));
  switch (random->Int(0, 3)) {
    case 0:
      return *ShardPlan::Parse("contiguous", num_tokens, num_ranks, cu_seqlens);
    case 1:
      return *ShardPlan::Parse("zigzag", num_tokens, num_ranks, cu_seqlens);
    case 2:
      return *ShardPlan::Parse("zigzag-per-document", num_tokens, num_ranks, cu_seqlens);
    default:
      break;
  }
  std::vector<Chunk> chunks;
  const int64_t longest = random->Pick<int64_t>({7, 100, 1000});
  for (int64_t begin = 0; begin < num_tokens;) {
    const int64_t length = std::min(num_tokens - begin, random->Int(0, longest));
    chunks.push_back({static_cast<int32_t>(random->Int(0, num_ranks - 1)), begin, length});
    begin += length;
  }
  return *ShardPlan::Create(num_tokens, num_ranks, chunks, cu_seqlens);
}

class PropertyTest : public ::testing::TestWithParam<int> {};

TEST_P(PropertyTest, ForwardEqualsTheReference) {
  Random random(1000 + GetParam());
  const ReferenceConfig config = RandomConfig({}, &random);
  // Lengths spread evenly in their logarithm, and now and then the longest.
  const int64_t num_tokens =
      random.OneIn(20)
          ? 3000
          : static_cast<int64_t>(std::floor(std::exp(random.Uniform() * std::log(3000.0))));
  const std::vector<int64_t> cu_seqlens =
      RandomDocuments(config, num_tokens, random.Pick<int64_t>({1, 1, 4, 10}), &random);
  InputOptions options;
  options.dtype = random.Pick({DType::kF32, DType::kF32, DType::kBF16, DType::kBF16, DType::kF16});
  options.gate_dtype = random.Pick({DType::kF32, options.dtype});
  options.parameter_dtype = random.Pick({DType::kF32, options.dtype});
  options.parameters_per_head = random.OneIn(2);
  options.with_pe = !random.OneIn(3);
  options.hidden_width = random.Int(1, 40);
  options.share_keys = random.OneIn(3);
  const ReferenceInputs inputs = RandomInputs(config, cu_seqlens, options, &random);
  const ShardPlan plan = RandomPlan(cu_seqlens, &random);
  RunOptions run;
  run.share_kv = options.share_keys;
  run.row_padding = random.Pick<int64_t>({0, 0, 8, 3});
  const Problem problem = MakeProblem(config, cu_seqlens, options, inputs);
  SCOPED_TRACE(Describe(config));
  SCOPED_TRACE(testing::Message() << "tokens " << num_tokens << ", documents "
                                  << cu_seqlens.size() - 1 << ", " << NameOf(options.dtype)
                                  << ", ranks " << plan.num_ranks() << ", chunks "
                                  << plan.chunks().size());

  GlobalOutputs outputs(problem);
  const absl::Status status = RunLoopback(problem, plan, run, &outputs);
  ASSERT_TRUE(status.ok()) << status;

  // The reference attends to the blocks that were selected, and judges the selection by itself.
  const std::vector<int32_t> indices = outputs.block_indices();
  reference::ReferenceOptions reference_options;
  reference_options.summary_rounding = SummaryRounding(options.dtype);
  reference_options.given_block_indices = &indices;
  const auto expected = reference::Forward(config, inputs, reference_options);
  ASSERT_TRUE(expected.ok()) << expected.status();
  EXPECT_TRUE(SelectionAgrees(config, cu_seqlens, *expected, indices,
                              {.relative = options.dtype == DType::kF32 ? 1e-4 : 2e-2}));
  const double bound = Bound(options.dtype);
  const int64_t row = config.head_dim_v;
  EXPECT_TRUE(Close("o_cmp", expected->o_cmp, outputs.Values(GlobalOutputs::kOCmp), row, bound));
  EXPECT_TRUE(Close("o_slc", expected->o_slc, outputs.Values(GlobalOutputs::kOSlc), row, bound));
  EXPECT_TRUE(Close("o_win", expected->o_win, outputs.Values(GlobalOutputs::kOWin), row, bound));
  EXPECT_TRUE(Close("o", expected->o, outputs.Values(GlobalOutputs::kO), row, bound));
  const double lse = options.dtype == DType::kF32 ? 1e-5 : 1e-2;
  EXPECT_TRUE(CloseElements("lse_cmp", expected->lse_cmp, outputs.Values(GlobalOutputs::kLseCmp),
                            lse, lse));
  EXPECT_TRUE(CloseElements("lse_slc", expected->lse_slc, outputs.Values(GlobalOutputs::kLseSlc),
                            1e-5, 1e-5));
  EXPECT_TRUE(CloseElements("lse_win", expected->lse_win, outputs.Values(GlobalOutputs::kLseWin),
                            1e-5, 1e-5));
}

INSTANTIATE_TEST_SUITE_P(Random, PropertyTest, ::testing::Range(0, 220));

}  // namespace
}  // namespace nsa::test
