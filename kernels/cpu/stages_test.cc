// Every stage against the fp64 reference.
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/instruction_set.h"
#include "kernels/cpu/stages_testing.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cpu {
namespace {

using reference::CompressorKind;
using reference::ReferenceConfig;
using test::Decode;

std::unique_ptr<Kernels> MakeKernels(int num_threads) {
  auto kernels = CpuKernels::Create({.num_threads = num_threads});
  EXPECT_TRUE(kernels.ok()) << kernels.status();
  return *std::move(kernels);
}

void ExpectAgreement(const StageProblem& problem, const StageLayout& layout = {}) {
  SCOPED_TRACE(test::Describe(problem.config));
  const auto kernels = MakeKernels(2);
  ASSERT_EQ(kernels->Supports(problem.dims), absl::OkStatus());
  const auto run = RunStages(problem, layout, *kernels);
  ASSERT_TRUE(run.ok()) << run.status();
  const StageOutputs& out = *run;
  const DType dtype = problem.options.dtype;
  const int64_t dk = problem.config.head_dim_qk, dv = problem.config.head_dim_v;
  const double tolerance = dtype == DType::kF32 ? 1e-5 : test::DefaultTolerance(dtype);

  // What the summaries and the selection feed is compared on the backend's own ones.
  reference::ReferenceOptions options;
  const std::vector<double> kc = Decode(dtype, out.kc), vc = Decode(dtype, out.vc);
  options.given_kc = &kc;
  options.given_vc = &vc;
  options.given_block_indices = &out.block_indices;
  const auto expected = reference::Forward(problem.config, problem.inputs, options);
  ASSERT_TRUE(expected.ok()) << expected.status();
  const std::vector<int64_t>& cu_seqlens = problem.inputs.cu_seqlens;
  const auto summaries = [&](const auto& parameters, const auto& x, int64_t dim) {
    return reference::Compress(problem.config, parameters, cu_seqlens, x, dim);
  };
  EXPECT_TRUE(test::Close("kc", summaries(problem.inputs.compress_k, problem.inputs.k_cmp, dk), kc,
                          dk, tolerance));
  EXPECT_TRUE(test::Close("vc", summaries(problem.inputs.compress_v, problem.inputs.v_cmp, dv), vc,
                          dv, tolerance));
  EXPECT_TRUE(test::Close("o_cmp", expected->o_cmp, Decode(dtype, out.o_cmp), dv, tolerance));
  EXPECT_TRUE(test::SelectionAgrees(problem.config, cu_seqlens, *expected, out.block_indices));
  EXPECT_TRUE(test::Close("o_slc", expected->o_slc, Decode(dtype, out.o_slc), dv, tolerance));
  EXPECT_TRUE(test::Close("o_win", expected->o_win, Decode(dtype, out.o_win), dv, tolerance));
  EXPECT_TRUE(test::Close("o", expected->o, Decode(dtype, out.o), dv, tolerance));
  EXPECT_TRUE(
      test::CloseElements("lse_cmp", expected->lse_cmp, test::ToDoubles(out.lse_cmp), 2e-6, 1e-6));
  EXPECT_TRUE(
      test::CloseElements("lse_slc", expected->lse_slc, test::ToDoubles(out.lse_slc), 2e-6, 1e-6));
  EXPECT_TRUE(
      test::CloseElements("lse_win", expected->lse_win, test::ToDoubles(out.lse_win), 2e-6, 1e-6));
}

TEST(StagesTest, StorageTypes) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (DType gate_dtype : {DType::kF32, dtype}) {
      SCOPED_TRACE(NameOf(dtype));
      ExpectAgreement(
          MakeStageProblem(SmallConfig(), {0, 701}, {.dtype = dtype, .gate_dtype = gate_dtype}, 1));
    }
  }
}

TEST(StagesTest, InstructionSets) {
  for (int64_t set : InstructionSets()) {
    SCOPED_TRACE(NameOfInstructionSet(set));
    const ScopedInstructionSet scope(set);
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      ExpectAgreement(MakeStageProblem(SmallConfig(), {0, 333}, {.dtype = dtype}, 16));
    }
  }
}

TEST(StagesTest, GroupSizes) {
  for (int64_t group_size : {1, 3, 5, 16, 64}) {
    ReferenceConfig config = SmallConfig();
    config.num_kv_heads = group_size > 16 ? 1 : 2;
    config.num_q_heads = config.num_kv_heads * group_size;
    ExpectAgreement(MakeStageProblem(config, {0, 400}, {}, 2));
  }
}

TEST(StagesTest, HeadDims) {
  const std::pair<int64_t, int64_t> kDims[] = {{128, 64}, {192, 128}, {64, 256}, {256, 192}};
  for (const auto& [dk, dv] : kDims) {
    ReferenceConfig config = SmallConfig();
    config.head_dim_qk = dk;
    config.head_dim_v = dv;
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      ExpectAgreement(MakeStageProblem(config, {0, 333}, {.dtype = dtype}, 3));
    }
  }
}

TEST(StagesTest, BlockSizes) {
  for (const ReferenceConfig& config : ConfigsOfBlockSizes()) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      ExpectAgreement(MakeStageProblem(config, {0, 1111}, {.dtype = dtype}, 4));
    }
  }
}

TEST(StagesTest, DocumentsOfAnyLength) {
  ExpectAgreement(MakeStageProblem(SmallConfig(),
                                   {0, 1, 2, 33, 65, 97, 98, 161, 225, 290, 802, 818, 833}, {}, 5));
  ExpectAgreement(MakeStageProblem(SmallConfig(), {0, 1}, {}, 6));
}

TEST(StagesTest, WindowSizes) {
  for (const ReferenceConfig& config : ConfigsOfWindows()) {
    ExpectAgreement(MakeStageProblem(config, {0, 300, 500}, {}, 7));
  }
}

TEST(StagesTest, NumbersOfBlocks) {
  for (const ReferenceConfig& config : ConfigsOfBlockNumbers()) {
    ExpectAgreement(MakeStageProblem(config, {0, 900, 1300}, {}, 8));
  }
}

TEST(StagesTest, Compressors) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kWeighted,
                              CompressorKind::kLinear, CompressorKind::kMlp}) {
    for (bool per_head : {false, true}) {
      ReferenceConfig config = SmallConfig();
      config.head_dim_v = 128;
      config.compressor = kind;
      ExpectAgreement(MakeStageProblem(config, {0, 300, 310, 400},
                                       {.parameters_per_head = per_head, .hidden_width = 90}, 9));
      ExpectAgreement(MakeStageProblem(config, {0, 300, 310, 400},
                                       {.dtype = DType::kBF16,
                                        .parameter_dtype = DType::kF16,
                                        .parameters_per_head = per_head,
                                        .with_pe = false,
                                        .hidden_width = 7},
                                       10));
    }
  }
}

// Logits of several hundred: exp of anything but the largest is nothing, and nothing overflows.
TEST(StagesTest, ExtremeLogits) {
  for (double scale : {1e-30, 100.0, 1000.0}) {
    const StageProblem problem =
        MakeStageProblem(SmallConfig(), {0, 600}, {.logit_scale = scale}, 11);
    const auto kernels = MakeKernels(1);
    const auto out = RunStages(problem, {}, *kernels);
    ASSERT_TRUE(out.ok());
    for (const test::Bytes* o : {&out->o_cmp, &out->o_slc, &out->o_win, &out->o}) {
      for (double x : Decode(DType::kF32, *o)) ASSERT_TRUE(std::isfinite(x));
    }
    for (const auto* lse : {&out->lse_slc, &out->lse_win}) {
      for (float x : *lse) ASSERT_TRUE(std::isfinite(x));
    }
    if (scale < 1.0) ExpectAgreement(problem);
  }
}

TEST(StagesTest, LargeLogitsKeepTheirAccuracy) {
  // An f32 logit of 100 is known to about 1e-5, and so is its exp.
  ReferenceConfig config = SmallConfig();
  const StageProblem problem = MakeStageProblem(config, {0, 500}, {.logit_scale = 30.0}, 12);
  const auto kernels = MakeKernels(1);
  const auto out = RunStages(problem, {}, *kernels);
  ASSERT_TRUE(out.ok());
  const auto expected = reference::Forward(config, problem.inputs);
  ASSERT_TRUE(expected.ok());
  EXPECT_LT(test::RelativeL2(expected->o_win, Decode(DType::kF32, out->o_win)), 3e-5);
  EXPECT_LT(test::RelativeL2(expected->o_cmp, Decode(DType::kF32, out->o_cmp)), 3e-5);
}

TEST(StagesTest, QueriesWithoutSummaries) {
  const StageProblem problem = MakeStageProblem(SmallConfig(), {0, 31, 100}, {}, 13);
  const auto kernels = MakeKernels(1);
  const auto out = RunStages(problem, {}, *kernels);
  ASSERT_TRUE(out.ok());
  const std::vector<double> o_cmp = Decode(DType::kF32, out->o_cmp);
  const int64_t heads = problem.config.num_q_heads;
  for (int64_t t = 0; t < 100; ++t) {
    const bool sees_some = t >= 31 + 31;
    for (int64_t h = 0; h < heads; ++h) {
      const float lse = out->lse_cmp[t * heads + h];
      EXPECT_EQ(std::isfinite(lse), sees_some) << t;
      if (sees_some) continue;
      EXPECT_LT(lse, 0.0f);
      EXPECT_FALSE(std::isnan(lse));
      for (int64_t c = 0; c < 64; ++c) EXPECT_EQ(o_cmp[(t * heads + h) * 64 + c], 0.0);
    }
  }
}

// Blocks of the same tokens score the same, wherever they lie: the lower index is taken.
TEST(StagesTest, TiedScoresGoToTheLowerIndex) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kMlp}) {
    ReferenceConfig config = SmallConfig();
    config.compressor = kind;
    config.compress_block_tokens = 16;  // blocks do not reach over into their neighbours
    config.num_selected_blocks = 8;
    test::Random random(14);
    reference::ReferenceInputs inputs = test::RandomInputs(config, {0, 6400}, {}, &random);
    const int64_t block_values = 64 * config.num_kv_heads * 64;
    for (int64_t j = 1; j < 100; ++j) {
      std::copy_n(inputs.k_cmp.begin(), block_values, inputs.k_cmp.begin() + j * block_values);
    }
    const auto kernels = MakeKernels(2);
    const auto out = RunStages(MakeStageProblem(config, {}, inputs), {}, *kernels);
    ASSERT_TRUE(out.ok());
    for (int64_t t = 8 * 64; t < 6400; ++t) {
      for (int64_t g = 0; g < 2; ++g) {
        const int32_t* const picks = &out->block_indices[(t * 2 + g) * 8];
        for (int32_t i = 0; i < 6; ++i) ASSERT_EQ(picks[i], i) << t;
        ASSERT_EQ(picks[6], t / 64 - 1);
        ASSERT_EQ(picks[7], t / 64);
      }
    }
  }
}

// Sums over a thousand summaries stay as accurate as over a few.
TEST(StagesTest, LongDocument) {
  ReferenceConfig config = SmallConfig();
  config.num_q_heads = 2;
  config.num_kv_heads = 1;
  const StageProblem problem = MakeStageProblem(config, {0, 20000}, {}, 17);
  const auto kernels = MakeKernels(2);
  const auto out = RunStages(problem, {}, *kernels);
  ASSERT_TRUE(out.ok());
  const std::vector<int64_t> tokens = {12345, 19967, 19999};
  const auto expected =
      reference::Forward(config, problem.inputs,
                         {.given_block_indices = &out->block_indices, .query_tokens = &tokens});
  ASSERT_TRUE(expected.ok());
  EXPECT_TRUE(test::SelectionAgrees(config, problem.inputs.cu_seqlens, *expected,
                                    out->block_indices, {.query_tokens = &tokens}));
  for (int64_t t : tokens) {
    const auto row = [&](const std::vector<double>& values) {
      return absl::MakeConstSpan(values).subspan(t * 128, 128);
    };
    const std::vector<double> o_cmp = Decode(DType::kF32, out->o_cmp);
    const std::vector<double> o = Decode(DType::kF32, out->o);
    EXPECT_LT(test::RelativeL2(row(expected->o_cmp), row(o_cmp)), 2e-6);
    EXPECT_LT(test::RelativeL2(row(expected->o), row(o)), 2e-6);
  }
}

TEST(StagesTest, RandomConfigurations) {
  test::Random random(15);
  for (int i = 0; i < 40; ++i) {
    SCOPED_TRACE(i);
    const ReferenceConfig config = test::RandomConfig({}, &random);
    const auto cu_seqlens = test::RandomDocuments(config, random.Int(1, 900), 5, &random);
    const test::InputOptions options{.dtype = random.Pick({DType::kF32, DType::kBF16, DType::kF16}),
                                     .parameter_dtype = random.Pick({DType::kF32, DType::kBF16}),
                                     .parameters_per_head = random.OneIn(2)};
    const StageLayout layout{.segment_tokens = random.Int(1, 300),
                             .use_halo_and_slots = random.OneIn(2),
                             .row_padding = random.Int(0, 1) * 24};
    ExpectAgreement(MakeStageProblem(config, cu_seqlens, options, random.Next()), layout);
  }
}

}  // namespace
}  // namespace nsa::kernels::cpu
