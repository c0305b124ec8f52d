// The sharded forward against the fp64 reference, on random configurations, documents, storage
// types and shardings.
#include <cmath>

#include "gtest/gtest.h"
#include "tests/forward/backend.h"
#include "tests/testing/reference_check.h"
#include "tests/testing/sharded.h"

namespace nsa::test {
namespace {

using reference::ReferenceConfig;
using reference::ReferenceInputs;

class PropertyTest : public BackendTest, public ::testing::WithParamInterface<int> {};

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
  const std::vector<DType>& dtypes = TheBackend().dtypes;
  options.dtype = dtypes[random.Int(0, static_cast<int64_t>(dtypes.size()) - 1)];
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
  run.row_padding = TheBackend().alignment * random.Pick<int64_t>({0, 0, 8, 3});
  run.head_padding = TheBackend().alignment * random.Pick<int64_t>({0, 0, 2, 5});
  if (random.OneIn(3)) {
    // Of a few queries.
    const int64_t record = config.select_block_tokens * (config.head_dim_qk + config.head_dim_v) *
                           SizeOf(options.dtype);
    run.fetch_budget_bytes =
        config.num_selected_blocks * config.num_kv_heads * record * random.Int(1, 3);
  }
  const Problem problem = MakeProblem(config, cu_seqlens, options, inputs);
  SCOPED_TRACE(Describe(config));
  SCOPED_TRACE(testing::Message() << "tokens " << num_tokens << ", documents "
                                  << cu_seqlens.size() - 1 << ", " << NameOf(options.dtype)
                                  << ", ranks " << plan.num_ranks() << ", chunks "
                                  << plan.chunks().size());

  GlobalOutputs outputs(problem);
  const absl::Status status = RunRanks(problem, plan, run, &outputs);
  ASSERT_TRUE(status.ok()) << status;

  ExpectEqualsReference(config, inputs, options.dtype, outputs);
}

INSTANTIATE_TEST_SUITE_P(Random, PropertyTest, ::testing::Range(0, 220));

}  // namespace
}  // namespace nsa::test
