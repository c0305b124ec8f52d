// The compression's backward against the fp64 reference, on poisoned outputs.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/reference/gradients.h"
#include "tests/testing/compare.h"
#include "tests/testing/generate.h"

namespace nsa::kernels::cpu {
namespace {

using reference::CompressorKind;
using reference::ReferenceConfig;

constexpr float kBefore = 0.5f;

struct Problem {
  ReferenceConfig config;
  std::vector<int64_t> cu_seqlens;
  test::InputOptions options = {};
  uint64_t seed = 1;
  int num_threads = 2;
  int64_t segment_tokens = int64_t{1} << 40;
  int64_t run_blocks = int64_t{1} << 40;
  bool adds = false;
};

struct Gradients {
  std::vector<double> dx;  // in global token order
  reference::CompressorParameters parameters;
};

// Segments of every other kind: own and halo. Gradients of v's summaries stand in their rows after
// others, as they do where k's come first.
struct Comparison {
  explicit Comparison(const Problem& problem) {
    const ReferenceConfig& config = problem.config;
    test::Random random(problem.seed);
    const auto inputs = test::RandomInputs(config, problem.cu_seqlens, problem.options, &random);
    const auto encoded = test::Encode(inputs, problem.options);
    const auto documents = test::MakeDocuments(config, problem.cu_seqlens);
    const auto dims = test::MakeDims(config, problem.options.dtype);
    const int64_t tokens = problem.cu_seqlens.back(), dim = config.head_dim_v;
    const int64_t row_size = config.num_kv_heads * dim, padding = 48;
    const int64_t num_blocks = documents.back().cmp_block_begin + documents.back().num_cmp_blocks;

    std::vector<double> dy(num_blocks * row_size);
    std::vector<float> d_summaries((num_blocks + 1) * (row_size + padding),
                                   std::numeric_limits<float>::quiet_NaN());
    for (int64_t row = 0; row < num_blocks; ++row) {
      for (int64_t i = 0; i < row_size; ++i) {
        const float value = static_cast<float>(random.Normal());
        dy[row * row_size + i] = value;
        d_summaries[row * (row_size + padding) + padding + i] = value;
      }
    }
    expected.parameters = reference::CompressBackward(config, inputs.compress_v, problem.cu_seqlens,
                                                      inputs.v_cmp, dim, dy, &expected.dx);

    std::vector<Segment> segments;
    std::vector<BlockRun> runs;
    for (size_t d = 0; d < documents.size(); ++d) {
      for (int64_t t = 0; t < documents[d].num_tokens; t += problem.segment_tokens) {
        segments.push_back(
            {.row = documents[d].token_begin + t,
             .num_tokens = std::min(problem.segment_tokens, documents[d].num_tokens - t),
             .position = t,
             .document = static_cast<int32_t>(d),
             .is_halo = segments.size() % 2 == 1});
      }
      for (int64_t b = 0; b < documents[d].num_cmp_blocks; b += problem.run_blocks) {
        runs.push_back({static_cast<int32_t>(d), b,
                        std::min(problem.run_blocks, documents[d].num_cmp_blocks - b)});
      }
    }
    const float poison = problem.adds ? kBefore : std::numeric_limits<float>::quiet_NaN();
    std::vector<float> own(tokens * row_size, poison), halo = own;
    const ConstTensor3 x{encoded.v_cmp.data(), row_size, dim};

    const auto& in = inputs.compress_v;
    const std::vector<double>* const shapes[] = {&in.weight, &in.pe, &in.w, &in.w1,
                                                 &in.b1,     &in.w2, &in.b2};
    std::vector<float> buffers[7];
    for (int i = 0; i < 7; ++i) {
      buffers[i].assign(shapes[i]->size(), std::numeric_limits<float>::quiet_NaN());
    }
    const auto pointer = [&](int i) { return buffers[i].empty() ? nullptr : buffers[i].data(); };
    auto kernels = *CpuKernels::Create({.num_threads = problem.num_threads});
    const Compressor compressor = test::MakeCompressor(config.compressor);
    test::Bytes scratch(kernels->CompressBackwardScratchBytes(
        dims, compressor, encoded.compress_v.hidden_width, num_blocks));
    EXPECT_TRUE(
        kernels
            ->CompressBackward({.dims = dims,
                                .head_dim = static_cast<int32_t>(dim),
                                .compressor = compressor,
                                .weights = encoded.compress_v.view(),
                                .tokens = {.own = x,
                                           .halo = x,
                                           .segments = segments.data(),
                                           .num_segments = static_cast<int32_t>(segments.size())},
                                .documents = documents.data(),
                                .runs = runs.data(),
                                .num_runs = static_cast<int32_t>(runs.size()),
                                .num_blocks = num_blocks,
                                .d_summaries = d_summaries.data() + padding,
                                .d_summaries_stride = row_size + padding,
                                .d_tokens = {own.data(), halo.data(), problem.adds},
                                .d_weights = {.weight = pointer(0),
                                              .pe = pointer(1),
                                              .w = pointer(2),
                                              .w1 = pointer(3),
                                              .b1 = pointer(4),
                                              .w2 = pointer(5),
                                              .b2 = pointer(6)},
                                .scratch = scratch.data()},
                               nullptr)
            .ok());
    for (const Segment& segment : segments) {
      const auto& rows = segment.is_halo != 0 ? halo : own;
      const auto begin = rows.begin() + segment.row * row_size;
      actual.dx.insert(actual.dx.end(), begin, begin + segment.num_tokens * row_size);
    }
    auto& out = actual.parameters;
    std::vector<double>* const results[] = {&out.weight, &out.pe, &out.w, &out.w1,
                                            &out.b1,     &out.w2, &out.b2};
    for (int i = 0; i < 7; ++i) results[i]->assign(buffers[i].begin(), buffers[i].end());
  }

  Gradients expected, actual;
};

void ExpectAgreement(const Problem& problem) {
  SCOPED_TRACE(test::Describe(problem.config));
  const Comparison run(problem);
  Gradients actual = run.actual;
  if (problem.adds) {
    for (double& x : actual.dx) x -= kBefore;
  }
  const Gradients& expected = run.expected;
  ASSERT_EQ(actual.dx.size(), expected.dx.size());
  for (size_t i = 0; i < actual.dx.size(); ++i) {
    if (expected.dx[i] == 0.0) {
      ASSERT_EQ(actual.dx[i], 0.0) << i;
    }
  }
  // Inputs are the same rounded numbers for both, and gradients are f32.
  const auto close = [](const char* name, const std::vector<double>& e,
                        const std::vector<double>& a) {
    EXPECT_LE(test::RelativeL2(e, a), 1e-5) << name;
  };
  close("dx", expected.dx, actual.dx);
  close("weight", expected.parameters.weight, actual.parameters.weight);
  close("pe", expected.parameters.pe, actual.parameters.pe);
  close("w", expected.parameters.w, actual.parameters.w);
  close("w1", expected.parameters.w1, actual.parameters.w1);
  close("b1", expected.parameters.b1, actual.parameters.b1);
  close("w2", expected.parameters.w2, actual.parameters.w2);
  close("b2", expected.parameters.b2, actual.parameters.b2);
}

constexpr CompressorKind kKinds[] = {CompressorKind::kMean, CompressorKind::kWeighted,
                                     CompressorKind::kLinear, CompressorKind::kMlp};

ReferenceConfig SmallConfig(CompressorKind kind) {
  ReferenceConfig config;
  config.num_q_heads = 2;
  config.num_kv_heads = 2;
  config.head_dim_qk = 64;
  config.head_dim_v = 64;
  config.compressor = kind;
  return config;
}

TEST(CompressBackwardTest, Parameters) {
  for (CompressorKind kind : kKinds) {
    for (bool per_head : {false, true}) {
      for (bool with_pe : {false, true}) {
        ExpectAgreement({.config = SmallConfig(kind),
                         .cu_seqlens = {0, 333},
                         .options = {.parameters_per_head = per_head,
                                     .with_pe = with_pe,
                                     .hidden_width = per_head ? 37 : 80}});
      }
    }
  }
}

TEST(CompressBackwardTest, StorageTypes) {
  for (CompressorKind kind : kKinds) {
    for (DType dtype : {DType::kBF16, DType::kF16}) {
      for (DType parameter_dtype : {DType::kF32, dtype}) {
        ExpectAgreement({.config = SmallConfig(kind),
                         .cu_seqlens = {0, 200},
                         .options = {.dtype = dtype, .parameter_dtype = parameter_dtype}});
      }
    }
  }
}

// Blocks reach from run to run and from segment to segment, and end before their documents do.
TEST(CompressBackwardTest, RunsAndSegments) {
  for (CompressorKind kind : kKinds) {
    ReferenceConfig config = SmallConfig(kind);
    config.compress_block_tokens = 64;
    for (bool adds : {false, true}) {
      ExpectAgreement({.config = config,
                       .cu_seqlens = {0, 20, 90, 1511, 1512},
                       .segment_tokens = 43,
                       .run_blocks = 3,
                       .adds = adds});
    }
  }
}

TEST(CompressBackwardTest, NoBlocks) {
  for (CompressorKind kind : kKinds) {
    const Comparison run({.config = SmallConfig(kind), .cu_seqlens = {0, 31, 40}});
    for (double x : run.actual.dx) ASSERT_EQ(x, 0.0);
    for (double x : run.actual.parameters.w1) ASSERT_EQ(x, 0.0);
    for (double x : run.actual.parameters.pe) ASSERT_EQ(x, 0.0);
    for (double x : run.actual.parameters.b2) ASSERT_EQ(x, 0.0);
  }
}

TEST(CompressBackwardTest, RandomConfigurations) {
  test::Random random(5);
  for (int i = 0; i < 20; ++i) {
    const ReferenceConfig config = test::RandomConfig({}, &random);
    ExpectAgreement({.config = config,
                     .cu_seqlens = test::RandomDocuments(config, random.Int(1, 600), 4, &random),
                     .options = {.dtype = random.Pick({DType::kF32, DType::kBF16, DType::kF16}),
                                 .parameters_per_head = random.OneIn(2),
                                 .hidden_width = random.Int(1, 70)},
                     .seed = random.Next(),
                     .segment_tokens = random.Int(1, 200),
                     .run_blocks = random.Int(1, 20)});
  }
}

TEST(CompressBackwardTest, ThreadsDoNotShow) {
  for (CompressorKind kind : kKinds) {
    Problem problem{.config = SmallConfig(kind), .cu_seqlens = {0, 100, 3000}};
    problem.num_threads = 1;
    const Gradients a = Comparison(problem).actual;
    problem.num_threads = 4;
    const Gradients b = Comparison(problem).actual;
    EXPECT_EQ(a.dx, b.dx);
    EXPECT_EQ(a.parameters.weight, b.parameters.weight);
    EXPECT_EQ(a.parameters.pe, b.parameters.pe);
    EXPECT_EQ(a.parameters.w, b.parameters.w);
    EXPECT_EQ(a.parameters.w1, b.parameters.w1);
    EXPECT_EQ(a.parameters.b1, b.parameters.b1);
    EXPECT_EQ(a.parameters.w2, b.parameters.w2);
    EXPECT_EQ(a.parameters.b2, b.parameters.b2);
  }
}

}  // namespace
}  // namespace nsa::kernels::cpu
