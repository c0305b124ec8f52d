// What must not show in a single bit of the results: threads, the cut of queries into segments and
// calls, and where a token or a record is read from.
#include <cstdint>
#include <memory>
#include <string>
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
    return MakeStageProblem(config, {0, 1, 40, 311, 771}, {.dtype = shape.dtype}, 21);
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

TEST_P(InvarianceTest, OneKvHeadACall) {
  const StageProblem problem = Problem();
  ExpectSameBits(problem, RunOnce(problem, {}, 1),
                 RunOnce(problem, {.one_kv_head_a_call = true}, 1));
}

TEST_P(InvarianceTest, GateInPlace) {
  const StageProblem problem = Problem();
  EXPECT_EQ(RunOnce(problem, {}, 2).o, RunOnce(problem, {.gate_in_place = true}, 2).o);
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

TEST(RandomInvarianceTest, Layouts) {
  test::Random random(31);
  for (int i = 0; i < 30; ++i) {
    const ReferenceConfig config = test::RandomConfig({.max_head_dim = 256}, &random);
    SCOPED_TRACE(test::Describe(config));
    const StageProblem problem =
        MakeStageProblem(config, test::RandomDocuments(config, random.Int(1, 900), 5, &random),
                         {.dtype = random.Pick({DType::kF32, DType::kBF16, DType::kF16}),
                          .parameters_per_head = random.OneIn(2),
                          .hidden_width = random.Int(1, 40)},
                         random.Next());
    const StageLayout layout{.segment_tokens = random.Int(1, 300),
                             .use_halo_and_slots = random.OneIn(2),
                             .row_padding = random.Int(0, 1) * 24};
    ExpectSameBits(problem, RunOnce(problem, {}, 1), RunOnce(problem, layout, 2));
  }
}

}  // namespace
}  // namespace nsa::kernels::cpu
