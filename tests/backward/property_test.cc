// The sharded backward against the fp64 reference, on random configurations, documents, storage
// types and shardings.
#include <cmath>

#include "gtest/gtest.h"
#include "tests/forward/backend.h"
#include "tests/testing/generate.h"
#include "tests/testing/gradient_check.h"
#include "tests/testing/sharded_backward.h"

namespace nsa::test {
namespace {

class BackwardPropertyTest : public BackendTest, public ::testing::WithParamInterface<int> {};

TEST_P(BackwardPropertyTest, GradientsEqualTheReference) {
  Random random(5000 + GetParam());
  const reference::ReferenceConfig config = RandomConfig({}, &random);
  const int64_t longest = random.OneIn(10) ? 1500 : 500;
  const auto num_tokens = static_cast<int64_t>(
      std::floor(std::exp(random.Uniform() * std::log(static_cast<double>(longest)))));
  const std::vector<int64_t> cu_seqlens =
      RandomDocuments(config, num_tokens, random.Pick<int64_t>({1, 1, 4, 10}), &random);
  InputOptions options;
  const std::vector<DType>& dtypes = TheBackend().dtypes;
  options.dtype = dtypes[random.Int(0, static_cast<int64_t>(dtypes.size()) - 1)];
  options.gate_dtype = random.Pick({DType::kF32, options.dtype});
  options.parameter_dtype = random.Pick({DType::kF32, options.dtype});
  options.parameters_per_head = random.OneIn(2);
  options.with_pe = !random.OneIn(3);
  options.hidden_width = random.Int(1, 40);
  options.share_keys = random.OneIn(3);
  const reference::ReferenceInputs inputs = RandomInputs(config, cu_seqlens, options, &random);
  const ShardPlan plan = RandomPlan(cu_seqlens, &random);
  RunOptions run;
  run.share_kv = options.share_keys;
  run.row_padding = TheBackend().alignment * random.Pick<int64_t>({0, 0, 8, 3});
  run.head_padding = TheBackend().alignment * random.Pick<int64_t>({0, 0, 2, 5});
  if (random.OneIn(3)) {
    // Of one kv head, of a rank that sees all blocks.
    const int64_t record = config.select_block_tokens * (config.head_dim_qk + config.head_dim_v) *
                           SizeOf(options.dtype);
    const int64_t num_blocks = num_tokens / config.select_block_tokens + cu_seqlens.size();
    run.fetch_budget_bytes =
        std::max(num_blocks, config.num_selected_blocks * config.num_kv_heads) * record;
  }
  BackwardRun backward;
  backward.gradient_dtype = random.Pick({DType::kF32, DType::kF32, options.dtype});
  backward.keep_summaries = random.OneIn(2);
  backward.keep_blocks = random.OneIn(2);
  backward.num_accumulated = random.Pick({1, 1, 2});
  backward.other_forwards_between = random.OneIn(4);
  const Problem problem = MakeProblem(config, cu_seqlens, options, inputs);
  SCOPED_TRACE(Describe(config));
  SCOPED_TRACE(testing::Message() << "tokens " << num_tokens << ", documents "
                                  << cu_seqlens.size() - 1 << ", " << NameOf(options.dtype)
                                  << ", ranks " << plan.num_ranks() << ", chunks "
                                  << plan.chunks().size());

  const std::vector<double> d_o = RandomOutputGradients(problem, &random);
  GlobalOutputs outputs(problem);
  GlobalGradients gradients(problem, plan.num_ranks(), backward.gradient_dtype);
  const absl::Status status =
      RunLoopbackBackward(problem, Encode(options.dtype, d_o), plan, run, backward, &outputs,
                          &gradients, nullptr, TheBackend().make_kernels);
  ASSERT_TRUE(status.ok()) << status;
  ExpectGradientsEqualReference(config, inputs, options.dtype, d_o, options.share_keys, outputs,
                                gradients, backward.num_accumulated);
}

INSTANTIATE_TEST_SUITE_P(Random, BackwardPropertyTest, ::testing::Range(0, 120));

}  // namespace
}  // namespace nsa::test
