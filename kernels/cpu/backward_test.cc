// The stages of the branches' backward against the fp64 reference, on poisoned outputs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/backward_testing.h"
#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/stages_testing.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cpu {
namespace {

using reference::CompressorKind;
using reference::ReferenceConfig;

void ExpectAgreement(const StageProblem& problem, const BackwardCut& cut = {},
                     double tolerance_of_16_bits = 6e-3) {
  SCOPED_TRACE(test::Describe(problem.config));
  const ExpectedBackward expected = MakeExpectedBackward(problem, 7);
  const BranchGradients out = BackwardRunner(problem, expected, cut).Run();
  const double tolerance = problem.options.dtype == DType::kF32 ? 1e-5 : tolerance_of_16_bits;
  const auto close = [&](const char* name, const std::vector<double>& e,
                         const std::vector<float>& a, bool added) {
    ASSERT_EQ(e.size(), a.size()) << name;
    std::vector<double> actual = test::ToDoubles(a);
    if (added && cut.adds) {
      for (double& x : actual) x -= BackwardCut::kBefore;
    }
    // What cancels but for rounding has no relative error: a query with one key moves no logit.
    double distance = 0.0;
    for (size_t i = 0; i < e.size(); ++i) distance += (actual[i] - e[i]) * (actual[i] - e[i]);
    if (std::sqrt(distance / e.size()) <= 0.1 * tolerance) return;
    EXPECT_LE(test::RelativeL2(e, actual), tolerance) << name;
  };
  close("dgate", expected.backward.dgate, out.dgate, false);
  close("dq", expected.backward.dq, out.dq, true);
  close("dkc", expected.backward.dkc, out.dkc, false);
  close("dvc", expected.backward.dvc, out.dvc, false);
  close("dk_slc", expected.backward.dk_slc, out.dk_slc, true);
  close("dv_slc", expected.backward.dv_slc, out.dv_slc, true);
  close("dk_win", expected.backward.dk_win, out.dk_win, true);
  close("dv_win", expected.backward.dv_win, out.dv_win, true);
  const auto zeros = [&](const char* name, const std::vector<double>& dv,
                         const std::vector<float>& actual, int64_t dim, float zero) {
    const int64_t rows = static_cast<int64_t>(dv.size()) / problem.config.head_dim_v;
    for (int64_t i = 0; i < rows; ++i) {
      const auto begin = dv.begin() + i * problem.config.head_dim_v;
      if (std::any_of(begin, begin + problem.config.head_dim_v,
                      [](double x) { return x != 0.0; })) {
        continue;  // some query attends to the key
      }
      for (int64_t c = 0; c < dim; ++c) ASSERT_EQ(actual[i * dim + c], zero) << name << " " << i;
    }
  };
  const int64_t dk = problem.config.head_dim_qk, dv = problem.config.head_dim_v;
  const float before = cut.adds ? BackwardCut::kBefore : 0.0f;
  zeros("dkc", expected.backward.dvc, out.dkc, dk, 0.0f);
  zeros("dvc", expected.backward.dvc, out.dvc, dv, 0.0f);
  zeros("dk_slc", expected.backward.dv_slc, out.dk_slc, dk, before);
  zeros("dv_slc", expected.backward.dv_slc, out.dv_slc, dv, before);
}

TEST(BackwardTest, StorageTypes) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (DType gate_dtype : {DType::kF32, dtype}) {
      SCOPED_TRACE(NameOf(dtype));
      ExpectAgreement(
          MakeStageProblem(SmallConfig(), {0, 701}, {.dtype = dtype, .gate_dtype = gate_dtype}, 1));
    }
  }
}

TEST(BackwardTest, InstructionSets) {
  for (int64_t set : InstructionSets()) {
    SCOPED_TRACE(NameOfInstructionSet(set));
    const ScopedInstructionSet scope(set);
    ExpectAgreement(MakeStageProblem(SmallConfig(), {0, 333}, {}, 2));
  }
}

TEST(BackwardTest, GroupSizes) {
  for (int64_t group_size : {1, 3, 16, 160}) {
    ReferenceConfig config = SmallConfig();
    config.num_kv_heads = group_size > 16 ? 1 : 2;
    config.num_q_heads = config.num_kv_heads * group_size;
    ExpectAgreement(MakeStageProblem(config, {0, 300}, {}, 3));
  }
}

TEST(BackwardTest, HeadDims) {
  const std::pair<int64_t, int64_t> kDims[] = {{128, 64}, {192, 128}, {64, 256}, {256, 192}};
  for (const auto& [dk, dv] : kDims) {
    ReferenceConfig config = SmallConfig();
    config.head_dim_qk = dk;
    config.head_dim_v = dv;
    ExpectAgreement(MakeStageProblem(config, {0, 200}, {}, 4));
  }
}

TEST(BackwardTest, BlockSizes) {
  struct Sizes {
    int64_t l, d, slc, window;
  };
  for (const Sizes& sizes :
       {Sizes{16, 16, 16, 1}, {64, 16, 48, 64}, {32, 16, 80, 200}, {32, 32, 128, 63}}) {
    ReferenceConfig config = SmallConfig();
    config.compress_block_tokens = sizes.l;
    config.compress_stride_tokens = sizes.d;
    config.select_block_tokens = sizes.slc;
    config.window_tokens = sizes.window;
    ExpectAgreement(MakeStageProblem(config, {0, 433}, {}, 5));
  }
}

TEST(BackwardTest, DocumentsWithoutSummaries) {
  ExpectAgreement(MakeStageProblem(SmallConfig(), {0, 1, 32, 40, 150}, {}, 6));
}

TEST(BackwardTest, AddsToWhatIsThere) {
  ExpectAgreement(MakeStageProblem(SmallConfig(), {0, 100, 400}, {}, 8),
                  {.segment_tokens = 77, .use_halo = true, .queries_a_call = 150, .adds = true});
}

TEST(BackwardTest, RandomConfigurations) {
  test::Random random(9);
  for (int i = 0; i < 30; ++i) {
    SCOPED_TRACE(i);
    const ReferenceConfig config = test::RandomConfig({}, &random);
    const auto cu_seqlens = test::RandomDocuments(config, random.Int(150, 500), 5, &random);
    const StageProblem problem = MakeStageProblem(
        config, cu_seqlens, {.dtype = random.Pick({DType::kF32, DType::kBF16, DType::kF16})},
        random.Next());
    // Summaries, which the reference does not round, make large logits here and there.
    ExpectAgreement(problem,
                    {.segment_tokens = random.Int(1, 300),
                     .use_halo = random.OneIn(2),
                     .heads_a_call = static_cast<int32_t>(random.Int(1, 4)),
                     .queries_a_call = random.Int(50, 500)},
                    1.2e-2);
  }
}

void ExpectSameBits(const char* name, const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_TRUE(
      test::SameBits(name, DType::kF32, {static_cast<int64_t>(a.size())}, a.data(), b.data()));
}

TEST(BackwardTest, ThreadsDoNotShow) {
  test::Random random(10);
  for (int i = 0; i < 10; ++i) {
    const ReferenceConfig config = test::RandomConfig({}, &random);
    SCOPED_TRACE(test::Describe(config));
    const StageProblem problem =
        MakeStageProblem(config, test::RandomDocuments(config, 400, 4, &random),
                         {.dtype = random.Pick({DType::kF32, DType::kBF16})}, random.Next());
    const ExpectedBackward expected = MakeExpectedBackward(problem, 7);
    const BranchGradients a = BackwardRunner(problem, expected, {.num_threads = 1}).Run();
    const BranchGradients b = BackwardRunner(problem, expected, {.num_threads = 4}).Run();
    ExpectSameBits("dq", a.dq, b.dq);
    ExpectSameBits("dgate", a.dgate, b.dgate);
    ExpectSameBits("dkc", a.dkc, b.dkc);
    ExpectSameBits("dvc", a.dvc, b.dvc);
    ExpectSameBits("dk_slc", a.dk_slc, b.dk_slc);
    ExpectSameBits("dv_slc", a.dv_slc, b.dv_slc);
    ExpectSameBits("dk_win", a.dk_win, b.dk_win);
    ExpectSameBits("dv_win", a.dv_win, b.dv_win);
  }
}

TEST(BackwardTest, GroupingOfQueriesDoesNotShowInDq) {
  test::Random random(11);
  for (int i = 0; i < 10; ++i) {
    const ReferenceConfig config = test::RandomConfig({}, &random);
    SCOPED_TRACE(test::Describe(config));
    const StageProblem problem =
        MakeStageProblem(config, test::RandomDocuments(config, 400, 4, &random), {}, random.Next());
    const ExpectedBackward expected = MakeExpectedBackward(problem, 7);
    const BranchGradients a = BackwardRunner(problem, expected, {}).Run();
    const BackwardCut cut{.segment_tokens = random.Int(1, 150),
                          .use_halo = true,
                          .heads_a_call = 1,
                          .queries_a_call = random.Int(1, 200)};
    const BranchGradients b = BackwardRunner(problem, expected, cut).Run();
    ExpectSameBits("dq", a.dq, b.dq);
    ExpectSameBits("dgate", a.dgate, b.dgate);
  }
}

}  // namespace
}  // namespace nsa::kernels::cpu
