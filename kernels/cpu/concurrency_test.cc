// Several CpuKernels objects, and several callers of one, at the same time.
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/stages_testing.h"

namespace nsa::kernels::cpu {
namespace {

TEST(ConcurrencyTest, ObjectsAndCallers) {
  reference::ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = 64;
  config.head_dim_v = 64;
  config.window_tokens = 50;
  config.compressor = reference::CompressorKind::kLinear;
  const StageProblem problem = MakeStageProblem(config, {0, 200}, {}, 22);
  auto single = CpuKernels::Create({.num_threads = 1});
  auto shared = CpuKernels::Create({.num_threads = 3});
  ASSERT_TRUE(single.ok() && shared.ok());
  const auto expected = RunStages(problem, {}, **single);
  ASSERT_TRUE(expected.ok());

  std::vector<StageOutputs> outputs(6);
  std::vector<std::thread> callers;
  for (int i = 0; i < 6; ++i) {
    callers.emplace_back([&, i] {
      auto own = CpuKernels::Create({.num_threads = 2});
      ASSERT_TRUE(own.ok());
      auto run = RunStages(problem, {}, i % 2 == 0 ? **own : **shared);
      ASSERT_TRUE(run.ok());
      outputs[i] = *std::move(run);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const StageOutputs& output : outputs) {
    EXPECT_EQ(output.kc, expected->kc);
    EXPECT_EQ(output.o_cmp, expected->o_cmp);
    EXPECT_EQ(output.o_win, expected->o_win);
    EXPECT_EQ(output.o, expected->o);
    EXPECT_EQ(output.block_indices, expected->block_indices);
  }
}

}  // namespace
}  // namespace nsa::kernels::cpu
