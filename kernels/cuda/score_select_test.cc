// The compressed branch on the GPU against the fp64 reference, the CPU kernels, and itself under
// other layouts of the same queries.
#include "kernels/cuda/score_select.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/score_select_testing.h"
#include "tests/reference/reference.h"
#include "tests/testing/compare.h"
#include "tests/testing/generate.h"
#include "tests/testing/numeric.h"
#include "tests/testing/random.h"

namespace nsa::kernels::cuda {
namespace {

using reference::ReferenceConfig;
using test::Decode;

class ScoreSelectTest : public ::testing::TestWithParam<Path> {
 protected:
  void SetUp() override {
    if (GetParam() == Path::kHopper && !HasHopperGpu()) GTEST_SKIP() << "no Hopper GPU";
    if (!HasGpu()) GTEST_SKIP() << "no GPU";
  }
};

INSTANTIATE_TEST_SUITE_P(Paths, ScoreSelectTest, ::testing::Values(Path::kHopper, Path::kPortable),
                         [](const auto& info) {
                           return info.param == Path::kHopper ? "Hopper" : "Portable";
                         });

class HopperScoreSelectTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!HasHopperGpu()) GTEST_SKIP() << "no Hopper GPU";
  }
};

std::vector<int64_t> CuSeqlens(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> cu_seqlens = {0};
  for (int64_t length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
  return cu_seqlens;
}

// With the inputs that the reference needs.
struct ReferenceProblem {
  ReferenceConfig config;
  reference::ReferenceInputs inputs;
  std::vector<double> kc, vc;  // rounded
  ScoreSelectProblem problem;
};

ReferenceProblem MakeReferenceProblem(const ReferenceConfig& config,
                                      const std::vector<int64_t>& lengths,
                                      test::InputOptions options, uint64_t seed) {
  ReferenceProblem made;
  made.config = config;
  options.share_keys = true;
  test::Random random(seed);
  made.inputs = test::RandomInputs(config, CuSeqlens(lengths), options, &random);
  const auto& in = made.inputs;
  made.kc = test::Rounded(options.dtype, reference::Compress(config, in.compress_k, in.cu_seqlens,
                                                             in.k_cmp, config.head_dim_qk));
  made.vc = test::Rounded(options.dtype, reference::Compress(config, in.compress_v, in.cu_seqlens,
                                                             in.v_cmp, config.head_dim_v));
  made.problem.dims = test::MakeDims(config, options.dtype);
  made.problem.documents = test::MakeDocuments(config, in.cu_seqlens);
  made.problem.num_tokens = in.cu_seqlens.back();
  const Document& last = made.problem.documents.back();
  made.problem.num_cmp_blocks = last.cmp_block_begin + last.num_cmp_blocks;
  made.problem.q = test::Encode(options.dtype, in.q);
  made.problem.kc = test::Encode(options.dtype, made.kc);
  made.problem.vc = test::Encode(options.dtype, made.vc);
  return made;
}

// The last queries of one document of random summaries, which may be longer than what the reference
// can do.
ScoreSelectProblem MakeLongProblem(const ReferenceConfig& config, DType dtype, int64_t num_tokens,
                                   int64_t num_queries, uint64_t seed) {
  ScoreSelectProblem problem;
  problem.dims = test::MakeDims(config, dtype);
  problem.documents = test::MakeDocuments(config, {0, num_tokens});
  problem.num_tokens = num_tokens;
  problem.query_begin = num_tokens - num_queries;
  problem.num_cmp_blocks = problem.documents[0].num_cmp_blocks;
  test::Random random(seed);
  const auto normal = [&](int64_t count) {
    std::vector<double> values(count);
    for (double& value : values) value = random.Normal();
    return test::Encode(dtype, values);
  };
  problem.q = normal(num_queries * config.num_q_heads * config.head_dim_qk);
  problem.kc = normal(problem.num_cmp_blocks * config.num_kv_heads * config.head_dim_qk);
  problem.vc = normal(problem.num_cmp_blocks * config.num_kv_heads * config.head_dim_v);
  return problem;
}

ReferenceConfig Config(int64_t q_heads, int64_t kv_heads, int64_t dk, int64_t dv) {
  ReferenceConfig config;
  config.num_q_heads = q_heads;
  config.num_kv_heads = kv_heads;
  config.head_dim_qk = dk;
  config.head_dim_v = dv;
  return config;
}

// Of tokens that stand for all: the first and the last of each document, and some between.
std::vector<int64_t> SampleTokens(const std::vector<int64_t>& cu_seqlens, int64_t count) {
  std::vector<int64_t> tokens;
  const int64_t step = std::max<int64_t>(1, cu_seqlens.back() / count);
  for (size_t d = 0; d + 1 < cu_seqlens.size(); ++d) {
    for (int64_t t = cu_seqlens[d]; t < cu_seqlens[d + 1]; t += step) tokens.push_back(t);
    if (tokens.back() != cu_seqlens[d + 1] - 1) tokens.push_back(cu_seqlens[d + 1] - 1);
  }
  return tokens;
}

template <class T>
std::vector<T> Rows(const std::vector<T>& dense, int64_t row_size,
                    const std::vector<int64_t>& rows) {
  std::vector<T> taken;
  for (int64_t row : rows) {
    taken.insert(taken.end(), dense.begin() + row * row_size, dense.begin() + (row + 1) * row_size);
  }
  return taken;
}

void ExpectAgreesWithReference(const ReferenceProblem& made, const ScoreSelectOutputs& outputs) {
  const DType dtype = made.problem.dims.dtype;
  const int64_t hq = made.config.num_q_heads, dv = made.config.head_dim_v;
  const auto& cu_seqlens = made.inputs.cu_seqlens;
  const std::vector<int64_t> tokens = SampleTokens(cu_seqlens, 60);
  reference::ReferenceOptions options;
  options.given_kc = &made.kc;
  options.given_vc = &made.vc;
  options.query_tokens = &tokens;
  const auto expected = reference::Forward(made.config, made.inputs, options);
  ASSERT_TRUE(expected.ok()) << expected.status();
  const std::vector<double> o = Decode(dtype, outputs.o);
  EXPECT_TRUE(test::Close("o_cmp", Rows(expected->o_cmp, hq * dv, tokens), Rows(o, hq * dv, tokens),
                          dv, test::DefaultTolerance(dtype)));
  EXPECT_TRUE(test::CloseElements("lse_cmp", Rows(expected->lse_cmp, hq, tokens),
                                  test::ToDoubles(Rows(outputs.lse, hq, tokens)), 2e-6, 2e-6));
  test::SelectionOptions selection;
  selection.query_tokens = &tokens;
  EXPECT_TRUE(
      test::SelectionAgrees(made.config, cu_seqlens, *expected, outputs.block_indices, selection));
}

// The share of index rows that differ is what near-ties explain.
void ExpectFewFlips(const AttentionDims& dims, const std::vector<int32_t>& expected,
                    const std::vector<int32_t>& actual, double share) {
  ASSERT_EQ(expected.size(), actual.size());
  const int64_t n = dims.num_selected_blocks;
  const int64_t num_rows = static_cast<int64_t>(expected.size()) / n;
  int64_t num_flipped = 0, first = -1;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (std::equal(&expected[i * n], &expected[i * n] + n, &actual[i * n])) continue;
    if (first < 0) first = i;
    ++num_flipped;
  }
  EXPECT_LE(num_flipped, share * num_rows) << "of " << num_rows << ", first " << first;
}

void ExpectAgreesWithCpu(const ScoreSelectProblem& problem, const ScoreSelectOutputs& outputs,
                         double flips) {
  const AttentionDims& dims = problem.dims;
  const auto cpu = CpuKernels::Create({});
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  const int64_t hq = dims.num_q_heads, hkv = dims.num_kv_heads;
  const int64_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  std::vector<std::byte> o(problem.num_queries() * hq * dv * 2);
  std::vector<float> lse(problem.num_queries() * hq);
  std::vector<int32_t> indices(problem.num_queries() * hkv * dims.num_selected_blocks);
  const std::vector<Segment> segments = problem.Segments(problem.num_tokens);
  const absl::Status status =
      (*cpu)->ScoreAndSelect({.dims = dims,
                              .queries = {.q = {problem.q.data(), hq * dk, dk},
                                          .segments = segments.data(),
                                          .num_segments = static_cast<int32_t>(segments.size()),
                                          .documents = problem.documents.data(),
                                          .num_tokens = problem.num_queries(),
                                          .kv_heads = dims.all_kv_heads()},
                              .kc = {problem.kc.data(), hkv * dk, dk},
                              .vc = {problem.vc.data(), hkv * dv, dv},
                              .num_cmp_blocks = problem.num_cmp_blocks,
                              .num_documents = static_cast<int32_t>(problem.documents.size()),
                              .o_cmp = {o.data(), hq * dv, dv},
                              .lse_cmp = lse.data(),
                              .block_indices = indices.data(),
                              .scratch = nullptr},
                             nullptr);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(test::Close("o_cmp", Decode(dims.dtype, o), Decode(dims.dtype, outputs.o), dv,
                          test::DefaultTolerance(dims.dtype)));
  EXPECT_TRUE(test::CloseElements("lse_cmp", test::ToDoubles(lse), test::ToDoubles(outputs.lse),
                                  4e-6, 4e-6));
  ExpectFewFlips(dims, indices, outputs.block_indices, flips);
}

void ExpectSame(const ScoreSelectProblem& problem, const ScoreSelectOutputs& expected,
                const ScoreSelectOutputs& actual) {
  const AttentionDims& dims = problem.dims;
  EXPECT_TRUE(test::SameBits("o_cmp", dims.dtype,
                             {problem.num_queries(), dims.num_q_heads, dims.head_dim_v},
                             expected.o.data(), actual.o.data()));
  if (!expected.lse.empty() && !actual.lse.empty()) {
    EXPECT_TRUE(test::SameBits("lse_cmp", DType::kF32, {problem.num_queries(), dims.num_q_heads},
                               expected.lse.data(), actual.lse.data()));
  }
  EXPECT_TRUE(test::SameIndices(
      "block_indices", {problem.num_queries(), dims.num_kv_heads, dims.num_selected_blocks},
      expected.block_indices, actual.block_indices));
}

// Agreement with reference and CPU in one layout, and the same bits in others.
void CheckAll(Path path, const ReferenceConfig& config, const std::vector<int64_t>& lengths,
              const test::InputOptions& options, uint64_t seed) {
  SCOPED_TRACE(absl::StrCat(test::Describe(config), " ", NameOf(options.dtype)));
  const ReferenceProblem made = MakeReferenceProblem(config, lengths, options, seed);
  const ScoreSelectProblem& problem = made.problem;
  const auto outputs = RunScoreSelect(problem, {.path = path});
  ASSERT_EQ(outputs.error, cudaSuccess) << cudaGetErrorString(outputs.error);
  ExpectAgreesWithReference(made, outputs);
  ExpectAgreesWithCpu(problem, outputs, 2e-3);
  {
    SCOPED_TRACE("again");
    ExpectSame(problem, outputs, RunScoreSelect(problem, {.path = path}));
  }
  {
    SCOPED_TRACE("one query a segment");
    ExpectSame(problem, outputs,
               RunScoreSelect(problem, {.path = path, .segment_tokens = 1, .reverse_rows = true}));
  }
  {
    SCOPED_TRACE("segments of 37, padded rows, no lse");
    ExpectSame(problem, outputs,
               RunScoreSelect(problem, {.path = path,
                                        .segment_tokens = 37,
                                        .reverse_rows = true,
                                        .row_padding = 24,
                                        .want_lse = false}));
  }
}

const std::vector<int64_t> kDocuments = {1, 31, 32, 700, 2500, 130, 1100, 47};

TEST_P(ScoreSelectTest, DefaultHeads) {
  const ReferenceConfig config = Config(32, 2, 128, 128);
  ASSERT_TRUE(HasFastRank(test::MakeDims(config, DType::kBF16)));
  CheckAll(GetParam(), config, kDocuments, {.dtype = DType::kBF16}, 1);
  CheckAll(GetParam(), config, {1500, 2600}, {.dtype = DType::kF16}, 2);
}

TEST_P(ScoreSelectTest, OtherHeadDims) {
  CheckAll(GetParam(), Config(16, 1, 64, 64), kDocuments, {.dtype = DType::kBF16}, 3);
  CheckAll(GetParam(), Config(16, 1, 192, 128), kDocuments, {.dtype = DType::kBF16}, 4);
  CheckAll(GetParam(), Config(16, 1, 64, 64), {3000}, {.dtype = DType::kF16}, 5);
  CheckAll(GetParam(), Config(16, 1, 192, 128), {3000}, {.dtype = DType::kF16}, 6);
}

TEST_P(ScoreSelectTest, GroupSizes) {
  for (const int64_t group : {1, 3, 4, 8, 12, 20, 32, 48, 64}) {
    const ReferenceConfig config = Config(2 * group, 2, 128, 128);
    ASSERT_TRUE(HasFastRank(test::MakeDims(config, DType::kBF16)));
    CheckAll(GetParam(), config, {300, 1700}, {.dtype = DType::kBF16}, 10 + group);
  }
}

TEST_P(ScoreSelectTest, NumbersOfBlocks) {
  ReferenceConfig config = Config(16, 1, 64, 64);
  for (const auto& [selected, initial, local] :
       {std::array{3, 1, 2}, std::array{4, 1, 2}, std::array{5, 0, 1}, std::array{34, 0, 2}}) {
    config.num_selected_blocks = selected;
    config.num_initial_blocks = initial;
    config.num_local_blocks = local;
    ASSERT_TRUE(HasFastRank(test::MakeDims(config, DType::kBF16)));
    CheckAll(GetParam(), config, {900, 3300}, {.dtype = DType::kBF16}, 30 + selected);
  }
}

TEST_P(ScoreSelectTest, ExtremeLogits) {
  CheckAll(GetParam(), Config(16, 1, 128, 128), {2500},
           {.dtype = DType::kBF16, .logit_scale = 30.0}, 40);
}

ReferenceConfig WithBlocks(ReferenceConfig config, int64_t l, int64_t d, int64_t block,
                           int64_t selected) {
  config.compress_block_tokens = l;
  config.compress_stride_tokens = d;
  config.select_block_tokens = block;
  config.num_selected_blocks = selected;
  return config;
}

// Every l / d and l' / d that Hopper's ranking kernel serves.
TEST_P(ScoreSelectTest, BlockShapes) {
  for (const int64_t cmp_strides : {1, 2, 4}) {
    for (const int64_t slc_strides : {2, 4, 8}) {
      if (cmp_strides > slc_strides) continue;
      for (const int64_t d : {16, 32}) {
        const int64_t group = d == 16 ? 16 : 20;  // one or two sets of 16 rows a query
        const ReferenceConfig config =
            WithBlocks(Config(group, 1, 64, 64), cmp_strides * d, d, slc_strides * d, 5);
        ASSERT_TRUE(HasFastRank(test::MakeDims(config, DType::kBF16)));
        CheckAll(GetParam(), config, {1, 40, 70 * d, 130 * d + 7, 333}, {.dtype = DType::kBF16},
                 100 + 10 * cmp_strides + slc_strides);
      }
    }
  }
  // Chunks of scores end elsewhere for 192 dimensions; f16.
  for (const auto& [l, block] : {std::pair{16, 32}, std::pair{64, 64}, std::pair{32, 128}}) {
    const ReferenceConfig config = WithBlocks(Config(16, 1, 192, 128), l, 16, block, 16);
    ASSERT_TRUE(HasFastRank(test::MakeDims(config, DType::kF16)));
    CheckAll(GetParam(), config, {4000}, {.dtype = DType::kF16}, 150 + l);
  }
}

// Hopper attends, and the kernel for any dims ranks.
TEST_P(ScoreSelectTest, HopperAttendsAlone) {
  struct Case {
    int64_t q_heads, kv_heads, dk, dv, l, d, block, selected;
  };
  for (const Case& c : {Case{4, 2, 64, 64, 16, 16, 16, 16}, Case{32, 2, 128, 128, 64, 16, 32, 16},
                        Case{16, 1, 192, 128, 96, 16, 48, 5}, Case{64, 1, 64, 64, 320, 16, 64, 4},
                        Case{16, 2, 128, 128, 32, 16, 64, 40}}) {
    const ReferenceConfig config =
        WithBlocks(Config(c.q_heads, c.kv_heads, c.dk, c.dv), c.l, c.d, c.block, c.selected);
    const AttentionDims dims = test::MakeDims(config, DType::kBF16);
    ASSERT_TRUE(HasFastScoreSelect(dims) && !HasFastRank(dims));
    CheckAll(GetParam(), config, {1, 40, 1500, 333, 3000}, {.dtype = DType::kBF16}, 80 + c.l);
  }
}

// What no Hopper kernel serves.
TEST_P(ScoreSelectTest, OtherShapes) {
  struct Case {
    int64_t q_heads, kv_heads, dk, dv, l, d, block, selected;
  };
  for (const Case& c : {Case{4, 2, 64, 256, 16, 16, 16, 16}, Case{8, 2, 128, 64, 64, 16, 64, 16},
                        Case{4, 1, 256, 192, 32, 32, 128, 5}, Case{20, 2, 192, 256, 32, 16, 64, 16},
                        Case{130, 1, 64, 64, 96, 16, 48, 40}, Case{4, 4, 64, 128, 32, 16, 32, 8}}) {
    const ReferenceConfig config =
        WithBlocks(Config(c.q_heads, c.kv_heads, c.dk, c.dv), c.l, c.d, c.block, c.selected);
    ASSERT_FALSE(HasFastScoreSelect(test::MakeDims(config, DType::kBF16)));
    CheckAll(GetParam(), config, {1, 40, 1500, 333}, {.dtype = DType::kBF16}, 50 + c.l + c.dk);
  }
}

// Lists and blocks as long as they may be: what shared memory is divided for.
TEST_P(ScoreSelectTest, LongListsAndBlocks) {
  struct Case {
    int64_t q_heads, l, d, block, selected, num_tokens;
  };
  for (const Case& c : {Case{4, 16, 16, 16, 4096, 70000}, Case{4, 16, 16, 16, 900, 20000},
                        Case{40, 4096, 16, 4096, 4, 40000}, Case{4, 4096, 32, 16 * 32, 7, 40000}}) {
    const ReferenceConfig config =
        WithBlocks(Config(c.q_heads, 1, 256, 64), c.l, c.d, c.block, c.selected);
    SCOPED_TRACE(test::Describe(config));
    const ScoreSelectProblem problem =
        MakeLongProblem(config, DType::kBF16, c.num_tokens, 100, 70 + c.selected);
    const auto outputs = RunScoreSelect(problem, {.path = GetParam()});
    ASSERT_EQ(outputs.error, cudaSuccess) << cudaGetErrorString(outputs.error);
    ExpectAgreesWithCpu(problem, outputs, 0.05);
    ExpectSame(problem, outputs,
               RunScoreSelect(problem, {.path = GetParam(), .segment_tokens = 3}));
  }
}

// Blocks whose summaries are equal score the same, and ties go to the lower index.
TEST_P(ScoreSelectTest, Ties) {
  for (const int64_t strides : {2, 4, 8}) {
    SCOPED_TRACE(strides);
    ScoreSelectProblem problem =
        MakeLongProblem(WithBlocks(Config(16, 1, 128, 128), 32, 16, 16 * strides, 16), DType::kBF16,
                        12000, 12000, 60);
    const int64_t row_bytes = 128 * 2;
    const int64_t period = 37 * strides;  // 37 different blocks, over and over
    for (int64_t i = period; i < problem.num_cmp_blocks; ++i) {
      std::copy_n(&problem.kc[(i % period) * row_bytes], row_bytes, &problem.kc[i * row_bytes]);
    }
    const auto outputs = RunScoreSelect(problem, {.path = GetParam()});
    ASSERT_EQ(outputs.error, cudaSuccess);
    ExpectAgreesWithCpu(problem, outputs, 0.0);
  }
}

TEST_P(ScoreSelectTest, AllTheSame) {
  ScoreSelectProblem problem =
      MakeLongProblem(Config(16, 1, 128, 128), DType::kBF16, 9000, 9000, 61);
  std::fill(problem.kc.begin(), problem.kc.end(), std::byte{0});
  const auto outputs = RunScoreSelect(problem, {.path = GetParam()});
  ASSERT_EQ(outputs.error, cudaSuccess);
  // Block 0 has one summary less that reaches into it, but is forced.
  const int64_t n = problem.dims.num_selected_blocks;
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t own = t / 64;
      const int64_t expected =
          own + 1 <= n ? (i <= own ? i : -1) : (i < n - 2 ? i : own - n + 1 + i);
      ASSERT_EQ(outputs.block_indices[t * n + i], expected) << t << " " << i;
    }
  }
}

// Many tiles, and scores that rise or fall with the position.
TEST_F(HopperScoreSelectTest, LongDocuments) {
  struct Case {
    int64_t dk, num_tokens, l, block;
  };
  for (const auto& [dk, num_tokens, l, block] :
       {Case{64, 100000, 32, 64}, Case{128, 200000, 32, 64}, Case{192, 50000, 32, 64},
        Case{64, 60000, 16, 32}, Case{128, 60000, 32, 32}, Case{192, 60000, 64, 128}}) {
    const ReferenceConfig config =
        WithBlocks(Config(16, 1, dk, dk == 192 ? 128 : dk), l, 16, block, 16);
    const ScoreSelectProblem random = MakeLongProblem(config, DType::kBF16, num_tokens, 300, 62);
    for (const double slope : {0.0, 1.0, -1.0}) {
      SCOPED_TRACE(absl::StrCat(test::Describe(config), " slope ", slope));
      ScoreSelectProblem problem = random;
      if (slope != 0.0) {
        // The first dimension of q is 4, that of a summary rises or falls along the document.
        std::vector<double> kc = Decode(DType::kBF16, problem.kc);
        std::vector<double> q = Decode(DType::kBF16, problem.q);
        for (int64_t i = 0; i < problem.num_cmp_blocks; ++i) {
          kc[i * dk] = slope * (32.0 * i / problem.num_cmp_blocks - 16.0);
        }
        for (size_t i = 0; i < q.size(); i += dk) q[i] = 4.0;
        problem.kc = test::Encode(DType::kBF16, kc);
        problem.q = test::Encode(DType::kBF16, q);
      }
      const auto outputs = RunScoreSelect(problem);
      ASSERT_EQ(outputs.error, cudaSuccess);
      const auto portable = RunScoreSelect(problem, {.path = Path::kPortable});
      ASSERT_EQ(portable.error, cudaSuccess);
      EXPECT_TRUE(test::Close("o_cmp", Decode(DType::kBF16, portable.o),
                              Decode(DType::kBF16, outputs.o), problem.dims.head_dim_v, 4e-3));
      EXPECT_TRUE(test::CloseElements("lse", test::ToDoubles(portable.lse),
                                      test::ToDoubles(outputs.lse), 4e-6, 4e-6));
      ExpectFewFlips(problem.dims, portable.block_indices, outputs.block_indices, 1e-2);
      ExpectSame(problem, outputs,
                 RunScoreSelect(problem, {.segment_tokens = 5, .reverse_rows = true}));
    }
  }
}

// A race would show as bits that move.
TEST_P(ScoreSelectTest, SameBitsAgainAndAgain) {
  const ScoreSelectProblem problem =
      MakeLongProblem(Config(32, 2, 128, 128), DType::kBF16, 40000, 8000, 64);
  const auto outputs = RunScoreSelect(problem, {.path = GetParam()});
  ASSERT_EQ(outputs.error, cudaSuccess);
  for (int64_t i = 0; i < 10; ++i) {
    ExpectSame(problem, outputs,
               RunScoreSelect(problem, {.path = GetParam(), .segment_tokens = 8000 - 700 * i}));
  }
}

TEST_P(ScoreSelectTest, RefusesNoScratch) {
  const ScoreSelectProblem problem =
      MakeLongProblem(Config(16, 1, 128, 128), DType::kBF16, 64, 64, 63);
  ScoreAndSelectParams params{};
  params.dims = problem.dims;
  params.queries.num_tokens = problem.num_tokens;
  params.queries.kv_heads = params.dims.all_kv_heads();
  params.num_cmp_blocks = problem.num_cmp_blocks;
  params.num_documents = 1;
  EXPECT_EQ(kScoreAndSelect.Choose(params.dims, GetParam())(params, {1, 0, GetParam()}, nullptr),
            cudaErrorInvalidValue);
}

}  // namespace
}  // namespace nsa::kernels::cuda
