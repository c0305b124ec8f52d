// What must not show in a single bit of the results: threads, the cut of queries into segments and
// calls, and where a token or a record is read from.
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/stages_testing.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cpu {
namespace {

using reference::CompressorKind;
using reference::ReferenceConfig;

StageOutputs RunOnce(const StageProblem& problem, const StageLayout& layout, int num_threads) {
  auto kernels = CpuKernels::Create({.num_threads = num_threads});
  EXPECT_TRUE(kernels.ok()) << kernels.status();
  auto outputs = RunStages(problem, layout, **kernels);
  EXPECT_TRUE(outputs.ok()) << outputs.status();
  return *std::move(outputs);
}

void ExpectSameBits(const StageProblem& problem, const StageOutputs& expected,
                    const StageOutputs& actual) {
  const DType dtype = problem.options.dtype;
  const auto compare = [&](const char* name, const test::Bytes& a, const test::Bytes& b) {
    ASSERT_EQ(a.size(), b.size());
    EXPECT_TRUE(test::SameBits(name, dtype, {static_cast<int64_t>(a.size()) / SizeOf(dtype)},
                               a.data(), b.data()));
  };
  compare("kc", expected.kc, actual.kc);
  compare("vc", expected.vc, actual.vc);
  compare("o_cmp", expected.o_cmp, actual.o_cmp);
  compare("o_slc", expected.o_slc, actual.o_slc);
  compare("o_win", expected.o_win, actual.o_win);
  compare("o", expected.o, actual.o);
  const auto compare_lse = [](const char* name, const std::vector<float>& a,
                              const std::vector<float>& b) {
    ASSERT_EQ(a.size(), b.size());
    EXPECT_TRUE(
        test::SameBits(name, DType::kF32, {static_cast<int64_t>(a.size())}, a.data(), b.data()));
  };
  compare_lse("lse_cmp", expected.lse_cmp, actual.lse_cmp);
  compare_lse("lse_slc", expected.lse_slc, actual.lse_slc);
  compare_lse("lse_win", expected.lse_win, actual.lse_win);
  EXPECT_EQ(expected.block_indices, actual.block_indices);
}

class InvarianceTest : public ::testing::TestWithParam<int> {
 protected:
  // Problems of several shapes and types; each has documents that no tile or block divides.
  static StageProblem Problem() {
    struct Shape {
      int64_t q_heads, kv_heads, dk, dv, l, slc, window;
      CompressorKind compressor;
      DType dtype;
    };
    constexpr Shape kShapes[] = {
        {8, 2, 64, 64, 32, 64, 130, CompressorKind::kMean, DType::kBF16},
        {3, 3, 128, 64, 16, 48, 64, CompressorKind::kMlp, DType::kF32},
        {10, 2, 64, 128, 64, 80, 1, CompressorKind::kLinear, DType::kF16},
        {16, 1, 64, 64, 32, 16, 77, CompressorKind::kWeighted, DType::kF32},
    };
    const Shape& shape = kShapes[GetParam()];
    ReferenceConfig config;
    config.num_q_heads = shape.q_heads;
    config.num_kv_heads = shape.kv_heads;
    config.head_dim_qk = shape.dk;
    config.head_dim_v = shape.dv;
    config.compress_block_tokens = shape.l;
    config.select_block_tokens = shape.slc;
    config.num_selected_blocks = 5;
    config.window_tokens = shape.window;
    config.compressor = shape.compressor;
    return MakeStageProblem(config, {0, 1, 40, 611, 1411}, {.dtype = shape.dtype}, 21);
  }
};

TEST_P(InvarianceTest, Threads) {
  const StageProblem problem = Problem();
  ExpectSameBits(problem, RunOnce(problem, {}, 1), RunOnce(problem, {}, 3));
}

TEST_P(InvarianceTest, Segments) {
  const StageProblem problem = Problem();
  const StageOutputs expected = RunOnce(problem, {}, 1);
  for (int64_t segment_tokens : {1, 7, 64, 333}) {
    SCOPED_TRACE(segment_tokens);
    ExpectSameBits(problem, expected,
                   RunOnce(problem, {.segment_tokens = segment_tokens, .row_padding = 8}, 2));
  }
}

TEST_P(InvarianceTest, HaloAndSlots) {
  const StageProblem problem = Problem();
  ExpectSameBits(problem, RunOnce(problem, {}, 1),
                 RunOnce(problem, {.segment_tokens = 45, .use_halo_and_slots = true}, 1));
}

TEST_P(InvarianceTest, OneQueryACall) {
  const StageProblem problem = Problem();
  ExpectSameBits(problem, RunOnce(problem, {}, 1), RunOnce(problem, {.one_query_a_call = true}, 1));
}

TEST_P(InvarianceTest, InstructionSets) {
  const StageProblem problem = Problem();
  const StageOutputs expected = RunOnce(problem, {}, 1);
  for (int64_t set : InstructionSets()) {
    if (!HasFma(set) || !HasFma(InstructionSets().front())) continue;
    SCOPED_TRACE(NameOfInstructionSet(set));
    const ScopedInstructionSet scope(set);
    ExpectSameBits(problem, expected, RunOnce(problem, {}, 1));
  }
}

INSTANTIATE_TEST_SUITE_P(Shapes, InvarianceTest, ::testing::Range(0, 4));

// Several objects, and several callers of one, at the same time.
TEST(ConcurrencyTest, ObjectsAndCallers) {
  ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = 64;
  config.head_dim_v = 64;
  config.window_tokens = 50;
  const StageProblem problem = MakeStageProblem(config, {0, 200}, {}, 22);
  const StageOutputs expected = RunOnce(problem, {}, 1);
  auto shared = CpuKernels::Create({.num_threads = 3});
  ASSERT_TRUE(shared.ok());
  std::vector<std::thread> callers;
  std::vector<StageOutputs> outputs(6);
  for (int i = 0; i < 6; ++i) {
    callers.emplace_back([&, i] {
      if (i % 2 == 0) {
        outputs[i] = RunOnce(problem, {}, 2);
      } else {
        auto run = RunStages(problem, {}, **shared);
        ASSERT_TRUE(run.ok());
        outputs[i] = *std::move(run);
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const StageOutputs& output : outputs) ExpectSameBits(problem, expected, output);
}

}  // namespace
}  // namespace nsa::kernels::cpu
