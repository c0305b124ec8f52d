// Every stage on the GPU: against the fp64 reference, and against itself under other layouts of the
// same tokens.
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/stages_testing.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/mirrored_testing.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cuda {
namespace {

using cpu::MakeStageProblem;
using cpu::SmallConfig;
using cpu::StageLayout;
using cpu::StageOutputs;
using cpu::StageProblem;
using reference::CompressorKind;
using reference::ReferenceConfig;
using test::Decode;

class StagesTest : public MirroredTest {
 protected:
  StageOutputs Run(const StageProblem& problem, const StageLayout& layout = {}) {
    auto outputs = cpu::RunStages(problem, layout, *kernels_);
    EXPECT_TRUE(outputs.ok()) << outputs.status();
    return outputs.ok() ? *std::move(outputs) : StageOutputs{};
  }

  void ExpectAgreement(const StageProblem& problem, const StageLayout& layout = {}) {
    SCOPED_TRACE(test::Describe(problem.config));
    ASSERT_EQ(kernels_->Supports(problem.dims), absl::OkStatus());
    const StageOutputs out = Run(problem, layout);
    if (HasFailure()) return;
    const DType dtype = problem.options.dtype;
    const int64_t dk = problem.config.head_dim_qk, dv = problem.config.head_dim_v;
    const double tolerance = test::DefaultTolerance(dtype);

    // What the summaries and the selection feed is compared on the kernels' own ones.
    reference::ReferenceOptions options;
    const std::vector<double> kc = Decode(dtype, out.kc), vc = Decode(dtype, out.vc);
    options.given_kc = &kc;
    options.given_vc = &vc;
    options.given_block_indices = &out.block_indices;
    options.num_threads = static_cast<int>(std::thread::hardware_concurrency());
    const auto expected = reference::Forward(problem.config, problem.inputs, options);
    ASSERT_TRUE(expected.ok()) << expected.status();
    const std::vector<int64_t>& cu_seqlens = problem.inputs.cu_seqlens;
    const auto summaries = [&](const auto& parameters, const auto& x, int64_t dim) {
      return reference::Compress(problem.config, parameters, cu_seqlens, x, dim);
    };
    const auto expect_rows = [&](const char* name, const std::vector<double>& wanted,
                                 const test::Bytes& actual, int64_t row_size) {
      EXPECT_TRUE(test::Close(name, wanted, Decode(dtype, actual), row_size, tolerance));
    };
    const auto expect_lse = [](const char* name, const std::vector<double>& wanted,
                               const std::vector<float>& actual) {
      EXPECT_TRUE(test::CloseElements(name, wanted, test::ToDoubles(actual), 1e-5, 2e-6));
    };
    expect_rows("kc", summaries(problem.inputs.compress_k, problem.inputs.k_cmp, dk), out.kc, dk);
    expect_rows("vc", summaries(problem.inputs.compress_v, problem.inputs.v_cmp, dv), out.vc, dv);
    expect_rows("o_cmp", expected->o_cmp, out.o_cmp, dv);
    expect_rows("o_slc", expected->o_slc, out.o_slc, dv);
    expect_rows("o_win", expected->o_win, out.o_win, dv);
    expect_rows("o", expected->o, out.o, dv);
    expect_lse("lse_cmp", expected->lse_cmp, out.lse_cmp);
    expect_lse("lse_slc", expected->lse_slc, out.lse_slc);
    expect_lse("lse_win", expected->lse_win, out.lse_win);
    EXPECT_TRUE(test::SelectionAgrees(problem.config, cu_seqlens, *expected, out.block_indices));
  }

  void ExpectSameBits(const StageOutputs& expected, const StageOutputs& actual, DType dtype) {
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
    EXPECT_EQ(expected.lse_cmp, actual.lse_cmp);
    EXPECT_EQ(expected.lse_slc, actual.lse_slc);
    EXPECT_EQ(expected.lse_win, actual.lse_win);
    EXPECT_EQ(expected.block_indices, actual.block_indices);
  }
};

INSTANTIATE_TEST_SUITE_P(Paths, StagesTest, ::testing::Values(CudaPath::kAuto, CudaPath::kPortable),
                         NameOfPath);

constexpr DType kDTypes[] = {DType::kBF16, DType::kF16};

TEST_P(StagesTest, StorageTypes) {
  for (DType dtype : kDTypes) {
    for (DType gate_dtype : {DType::kF32, dtype}) {
      SCOPED_TRACE(NameOf(dtype));
      ExpectAgreement(
          MakeStageProblem(SmallConfig(), {0, 701}, {.dtype = dtype, .gate_dtype = gate_dtype}, 1));
    }
  }
}

TEST_P(StagesTest, GroupSizes) {
  for (int64_t group_size : {1, 3, 5, 16, 24, 48, 64, 130}) {
    ReferenceConfig config = SmallConfig();
    config.num_kv_heads = group_size > 16 ? 1 : 2;
    config.num_q_heads = config.num_kv_heads * group_size;
    ExpectAgreement(MakeStageProblem(config, {0, 400}, {.dtype = DType::kBF16}, 2));
  }
}

TEST_P(StagesTest, HeadDims) {
  for (int64_t dk : {64, 128, 192, 256}) {
    for (int64_t dv : {64, 128, 192, 256}) {
      ReferenceConfig config = SmallConfig();
      config.head_dim_qk = dk;
      config.head_dim_v = dv;
      for (DType dtype : kDTypes) {
        ExpectAgreement(MakeStageProblem(config, {0, 333}, {.dtype = dtype}, 3));
      }
    }
  }
}

TEST_P(StagesTest, BlockSizes) {
  for (const ReferenceConfig& config : cpu::ConfigsOfBlockSizes()) {
    ExpectAgreement(MakeStageProblem(config, {0, 1111}, {.dtype = DType::kBF16}, 4));
  }
}

TEST_P(StagesTest, DocumentsOfAnyLength) {
  for (DType dtype : kDTypes) {
    ExpectAgreement(MakeStageProblem(SmallConfig(),
                                     {0, 1, 2, 33, 65, 97, 98, 161, 225, 290, 802, 818, 833},
                                     {.dtype = dtype}, 5));
    ExpectAgreement(MakeStageProblem(SmallConfig(), {0, 1}, {.dtype = dtype}, 6));
  }
}

TEST_P(StagesTest, WindowSizes) {
  for (const ReferenceConfig& config : cpu::ConfigsOfWindows()) {
    ExpectAgreement(MakeStageProblem(config, {0, 300, 500}, {.dtype = DType::kF16}, 7));
  }
}

TEST_P(StagesTest, NumbersOfBlocks) {
  for (const ReferenceConfig& config : cpu::ConfigsOfBlockNumbers()) {
    ExpectAgreement(MakeStageProblem(config, {0, 900, 2300}, {.dtype = DType::kF16}, 8));
  }
}

TEST_P(StagesTest, Compressors) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kWeighted,
                              CompressorKind::kLinear, CompressorKind::kMlp}) {
    for (bool per_head : {false, true}) {
      ReferenceConfig config = SmallConfig();
      config.head_dim_v = 128;
      config.compressor = kind;
      for (DType parameters : {DType::kF32, DType::kBF16, DType::kF16}) {
        ExpectAgreement(MakeStageProblem(config, {0, 300, 310, 2400},
                                         {.dtype = DType::kF16,
                                          .parameter_dtype = parameters,
                                          .parameters_per_head = per_head,
                                          .hidden_width = 90},
                                         9));
      }
      ExpectAgreement(MakeStageProblem(config, {0, 300, 310, 400},
                                       {.dtype = DType::kBF16,
                                        .parameters_per_head = per_head,
                                        .with_pe = false,
                                        .hidden_width = 7},
                                       10));
    }
  }
}

// Logits of several hundred: exp of anything but the largest is nothing, and nothing overflows.
TEST_P(StagesTest, ExtremeLogits) {
  for (double scale : {1e-30, 100.0, 1000.0}) {
    ReferenceConfig config = SmallConfig();
    for (int64_t dim : {64, 256}) {
      config.head_dim_qk = config.head_dim_v = dim;
      const StageProblem problem =
          MakeStageProblem(config, {0, 600}, {.dtype = DType::kBF16, .logit_scale = scale}, 11);
      const StageOutputs out = Run(problem);
      for (const test::Bytes* o : {&out.o_cmp, &out.o_slc, &out.o_win, &out.o}) {
        for (double x : Decode(DType::kBF16, *o)) ASSERT_TRUE(std::isfinite(x));
      }
      for (const auto* lse : {&out.lse_slc, &out.lse_win}) {
        for (float x : *lse) ASSERT_TRUE(std::isfinite(x));
      }
      if (scale < 1.0) ExpectAgreement(problem);
    }
  }
}

TEST_P(StagesTest, QueriesWithoutSummaries) {
  const StageOutputs out =
      Run(MakeStageProblem(SmallConfig(), {0, 31, 100}, {.dtype = DType::kBF16}, 13));
  const std::vector<double> o_cmp = Decode(DType::kBF16, out.o_cmp);
  const int64_t heads = SmallConfig().num_q_heads;
  for (int64_t t = 0; t < 100; ++t) {
    const bool sees_some = t >= 31 + 31;
    for (int64_t h = 0; h < heads; ++h) {
      const float lse = out.lse_cmp[t * heads + h];
      EXPECT_EQ(std::isfinite(lse), sees_some) << t;
      if (sees_some) continue;
      EXPECT_LT(lse, 0.0f);
      EXPECT_FALSE(std::isnan(lse));
      for (int64_t c = 0; c < 64; ++c) EXPECT_EQ(o_cmp[(t * heads + h) * 64 + c], 0.0);
    }
  }
}

// More tiles than a GPU has places for, so that a CTA works on several.
TEST_P(StagesTest, LongSequences) {
  for (auto [dk, dv] : {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}, {128, 64}}) {
    ReferenceConfig config = SmallConfig();
    config.num_q_heads = 16;
    config.head_dim_qk = dk;
    config.head_dim_v = dv;
    config.num_selected_blocks = 16;
    config.window_tokens = 512;
    ExpectAgreement(MakeStageProblem(config, {0, 900, 2600}, {.dtype = DType::kBF16}, 17));
  }
}

TEST_P(StagesTest, RandomConfigurations) {
  test::Random random(15);
  for (int i = 0; i < 40; ++i) {
    SCOPED_TRACE(i);
    const ReferenceConfig config = test::RandomConfig({.max_head_dim = 256}, &random);
    const auto cu_seqlens = test::RandomDocuments(config, random.Int(1, 900), 5, &random);
    const test::InputOptions options{.dtype = random.Pick({DType::kBF16, DType::kF16}),
                                     .parameter_dtype = random.Pick({DType::kF32, DType::kBF16}),
                                     .parameters_per_head = random.OneIn(2)};
    const StageLayout layout{.segment_tokens = random.Int(1, 300),
                             .use_halo_and_slots = random.OneIn(2),
                             .gate_in_place = false,
                             .row_padding = random.Int(0, 1) * 24};
    ExpectAgreement(MakeStageProblem(config, cu_seqlens, options, random.Next()), layout);
  }
}

// Nothing of the layout shows in a single bit.
TEST_P(StagesTest, LayoutsGiveTheSameBits) {
  struct Shape {
    int64_t q_heads, kv_heads, dk, dv, l, slc, window;
    CompressorKind compressor;
    DType dtype;
  };
  constexpr Shape kShapes[] = {
      {8, 2, 64, 64, 32, 64, 130, CompressorKind::kMean, DType::kBF16},
      {32, 2, 128, 128, 32, 64, 130, CompressorKind::kMean, DType::kBF16},
      {3, 3, 128, 64, 16, 48, 64, CompressorKind::kMlp, DType::kF16},
      {24, 1, 192, 128, 64, 64, 1, CompressorKind::kLinear, DType::kF16},
      {16, 1, 64, 256, 32, 160, 77, CompressorKind::kWeighted, DType::kBF16},
  };
  for (const Shape& shape : kShapes) {
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
    SCOPED_TRACE(test::Describe(config));
    const StageProblem problem =
        MakeStageProblem(config, {0, 1, 40, 311, 771}, {.dtype = shape.dtype}, 21);
    const StageOutputs expected = Run(problem);
    if (HasFailure()) return;
    for (int i = 0; i < 3; ++i) {
      SCOPED_TRACE("again");
      ExpectSameBits(expected, Run(problem), shape.dtype);
    }
    for (int64_t segment_tokens : {1, 7, 64, 333}) {
      SCOPED_TRACE(segment_tokens);
      ExpectSameBits(expected, Run(problem, {.segment_tokens = segment_tokens, .row_padding = 8}),
                     shape.dtype);
      ExpectSameBits(expected,
                     Run(problem, {.segment_tokens = segment_tokens, .use_halo_and_slots = true}),
                     shape.dtype);
    }
    SCOPED_TRACE("one kv head a call");
    ExpectSameBits(expected, Run(problem, {.one_kv_head_a_call = true}), shape.dtype);
    SCOPED_TRACE("one query a call");
    const StageProblem small = MakeStageProblem(config, {0, 40, 311}, {.dtype = shape.dtype}, 22);
    ExpectSameBits(Run(small), Run(small, {.one_query_a_call = true}), shape.dtype);
  }
}

TEST_P(StagesTest, GateMayWriteOverTheCompressedBranch) {
  const StageProblem problem =
      MakeStageProblem(SmallConfig(), {0, 500}, {.dtype = DType::kBF16}, 23);
  EXPECT_EQ(Run(problem).o, Run(problem, {.gate_in_place = true}).o);
}

}  // namespace
}  // namespace nsa::kernels::cuda
