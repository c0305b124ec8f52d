// Decoding against the fp64 reference, and bit for bit against the forward's stages.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/decode_testing.h"
#include "kernels/cpu/stages_testing.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cpu {
namespace {

using reference::CompressorKind;
using reference::ReferenceConfig;
using test::Decode;

std::unique_ptr<Kernels> MakeKernels(int num_threads = 2) {
  auto kernels = CpuKernels::Create({.num_threads = num_threads});
  EXPECT_TRUE(kernels.ok()) << kernels.status();
  return *std::move(kernels);
}

// Rows `tokens` of a dense tensor.
template <class Values>
Values RowsOfTokens(const Values& values, const std::vector<int64_t>& tokens, int64_t row_size) {
  Values rows;
  for (int64_t t : tokens) {
    rows.insert(rows.end(), values.begin() + t * row_size, values.begin() + (t + 1) * row_size);
  }
  return rows;
}

// Every decoded token is the forward's, bit for bit, whatever the steps were.
void ExpectSameAsForward(const StageProblem& problem, const DecodeRun& run, Kernels& kernels,
                         bool looks_at_branches) {
  const auto forward = RunStages(problem, {}, kernels);
  ASSERT_TRUE(forward.ok()) << forward.status();
  const StageOutputs& expected = *forward;
  const StageOutputs& actual = run.outputs;
  const AttentionDims& dims = problem.dims;
  const int64_t hq = dims.num_q_heads, row_bytes = hq * dims.head_dim_v * SizeOf(dims.dtype);
  const auto expect_same = [&](const char* name, const auto& e, const auto& a, int64_t row_size) {
    EXPECT_TRUE(RowsOfTokens(e, run.tokens, row_size) == RowsOfTokens(a, run.tokens, row_size))
        << name;
  };
  EXPECT_TRUE(expected.kc == actual.kc);
  EXPECT_TRUE(expected.vc == actual.vc);
  expect_same("block_indices", expected.block_indices, actual.block_indices,
              int64_t{dims.num_kv_heads} * dims.num_selected_blocks);
  expect_same("o", expected.o, actual.o, row_bytes);
  if (!looks_at_branches) return;
  expect_same("o_cmp", expected.o_cmp, actual.o_cmp, row_bytes);
  expect_same("o_slc", expected.o_slc, actual.o_slc, row_bytes);
  expect_same("o_win", expected.o_win, actual.o_win, row_bytes);
  expect_same("lse_cmp", expected.lse_cmp, actual.lse_cmp, hq);
  expect_same("lse_slc", expected.lse_slc, actual.lse_slc, hq);
  expect_same("lse_win", expected.lse_win, actual.lse_win, hq);
}

void ExpectEqualsReference(const StageProblem& problem, const DecodeRun& run) {
  const DType dtype = problem.options.dtype;
  reference::ReferenceOptions options;
  options.summary_rounding = test::SummaryRounding(dtype);
  options.given_block_indices = &run.outputs.block_indices;
  options.query_tokens = &run.tokens;
  const auto expected = reference::Forward(problem.config, problem.inputs, options);
  ASSERT_TRUE(expected.ok()) << expected.status();
  const auto of_tokens = [&](const auto& values) {
    return RowsOfTokens(values, run.tokens,
                        static_cast<int64_t>(values.size()) / problem.num_tokens());
  };
  const auto o = of_tokens(Decode(dtype, run.outputs.o));
  const double error = test::RelativeL2(of_tokens(expected->o), o);
  EXPECT_LE(error, dtype == DType::kF32 ? 1e-5 : 6e-3);
  if (dtype == DType::kF32) {
    EXPECT_EQ(of_tokens(expected->block_indices), of_tokens(run.outputs.block_indices));
  } else {
    EXPECT_TRUE(test::SelectionAgrees(
        problem.config, problem.inputs.cu_seqlens, *expected, run.outputs.block_indices,
        {.absolute = 1e-3, .relative = 2e-2, .query_tokens = &run.tokens}));
  }
}

void ExpectDecodes(const StageProblem& problem, const DecodeSchedule& schedule) {
  SCOPED_TRACE(test::Describe(problem.config));
  const auto kernels = MakeKernels();
  ASSERT_EQ(kernels->Supports(problem.dims), absl::OkStatus());
  const auto run = RunDecode(problem, schedule, *kernels);
  ASSERT_TRUE(run.ok()) << run.status();
  int64_t num_decoded = problem.num_tokens();
  for (int64_t prefix : schedule.prefixes) num_decoded -= prefix;
  ASSERT_EQ(static_cast<int64_t>(run->tokens.size()), num_decoded);
  ExpectSameAsForward(problem, *run, *kernels, schedule.looks_at_branches);
  ExpectEqualsReference(problem, *run);
}

TEST(DecodeTest, TokenByToken) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    SCOPED_TRACE(NameOf(dtype));
    const StageProblem problem =
        MakeStageProblem(SmallConfig(), {0, 601}, {.dtype = dtype, .gate_dtype = dtype}, 1);
    ExpectDecodes(problem, {});
  }
}

TEST(DecodeTest, GroupsOfSequencesAfterTheirPrefixes) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    SCOPED_TRACE(NameOf(dtype));
    const StageProblem problem =
        MakeStageProblem(SmallConfig(), {0, 500, 501, 701, 732, 764, 1400}, {.dtype = dtype}, 2);
    for (int64_t max_new_tokens : {1, 5, 64}) {
      ExpectDecodes(problem, {.prefixes = {333, 0, 128, 0, 31, 575},
                              .max_new_tokens = max_new_tokens,
                              .seed = static_cast<uint64_t>(max_new_tokens)});
    }
  }
}

TEST(DecodeTest, LongPrefixAtOnce) {
  ReferenceConfig config = SmallConfig();
  config.num_kv_heads = 1;
  ExpectDecodes(MakeStageProblem(config, {0, 6007, 9000}, {}, 3),
                {.prefixes = {5990, 2980}, .max_new_tokens = 3});
}

TEST(DecodeTest, GroupSizes) {
  for (int64_t group_size : {1, 3, 16}) {
    ReferenceConfig config = SmallConfig();
    config.num_q_heads = config.num_kv_heads * group_size;
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      ExpectDecodes(MakeStageProblem(config, {0, 400}, {.dtype = dtype}, 4),
                    {.prefixes = {200}, .max_new_tokens = 9});
    }
  }
}

TEST(DecodeTest, HeadDims) {
  const std::pair<int64_t, int64_t> kDims[] = {{128, 64}, {192, 128}, {64, 256}, {256, 192}};
  for (const auto& [dk, dv] : kDims) {
    ReferenceConfig config = SmallConfig();
    config.head_dim_qk = dk;
    config.head_dim_v = dv;
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      ExpectDecodes(MakeStageProblem(config, {0, 370}, {.dtype = dtype}, 5),
                    {.prefixes = {250}, .max_new_tokens = 7});
    }
  }
}

TEST(DecodeTest, BlockSizes) {
  for (const ReferenceConfig& config : ConfigsOfBlockSizes()) {
    for (DType dtype : {DType::kF32, DType::kBF16}) {
      ExpectDecodes(MakeStageProblem(config, {0, 1111, 1150}, {.dtype = dtype}, 6),
                    {.prefixes = {700, 0}, .max_new_tokens = 40});
    }
  }
}

TEST(DecodeTest, WindowSizes) {
  for (ReferenceConfig config : ConfigsOfWindows()) {
    config.select_block_tokens = config.window_tokens % 2 == 0 ? 64 : 16;
    ExpectDecodes(MakeStageProblem(config, {0, 300, 500}, {}, 7),
                  {.prefixes = {0, 100}, .max_new_tokens = 6});
  }
}

TEST(DecodeTest, NumbersOfBlocks) {
  for (const ReferenceConfig& config : ConfigsOfBlockNumbers()) {
    ExpectDecodes(MakeStageProblem(config, {0, 900, 1300}, {}, 8),
                  {.prefixes = {600, 100}, .max_new_tokens = 6});
  }
}

TEST(DecodeTest, Compressors) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kWeighted,
                              CompressorKind::kLinear, CompressorKind::kMlp}) {
    for (bool per_head : {false, true}) {
      ReferenceConfig config = SmallConfig();
      config.head_dim_v = 128;
      config.compressor = kind;
      const DecodeSchedule schedule{.prefixes = {190, 0, 50}, .max_new_tokens = 20};
      ExpectDecodes(MakeStageProblem(config, {0, 300, 310, 400},
                                     {.parameters_per_head = per_head, .hidden_width = 90}, 9),
                    schedule);
      ExpectDecodes(MakeStageProblem(config, {0, 300, 310, 400},
                                     {.dtype = DType::kBF16,
                                      .parameter_dtype = DType::kF16,
                                      .parameters_per_head = per_head,
                                      .with_pe = false,
                                      .hidden_width = 7},
                                     10),
                    schedule);
    }
  }
}

TEST(DecodeTest, BranchesThatShareTables) {
  for (DType dtype : {DType::kF32, DType::kF16}) {
    const StageProblem problem =
        MakeStageProblem(SmallConfig(), {0, 400, 700}, {.dtype = dtype, .share_keys = true}, 11);
    ExpectDecodes(problem, {.prefixes = {170, 10}, .max_new_tokens = 17, .shares_tables = true});
  }
}

TEST(DecodeTest, NobodyLooksAtTheBranches) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    ExpectDecodes(MakeStageProblem(SmallConfig(), {0, 500, 600}, {.dtype = dtype}, 12),
                  {.prefixes = {300, 0}, .max_new_tokens = 8, .looks_at_branches = false});
  }
}

TEST(DecodeTest, TokensWithoutSummaries) {
  const StageProblem problem = MakeStageProblem(SmallConfig(), {0, 31, 100}, {}, 13);
  const auto kernels = MakeKernels();
  const auto run = RunDecode(problem, {.max_new_tokens = 4}, *kernels);
  ASSERT_TRUE(run.ok()) << run.status();
  const std::vector<double> o_cmp = Decode(DType::kF32, run->outputs.o_cmp);
  const int64_t heads = problem.config.num_q_heads;
  for (int64_t t = 0; t < 100; ++t) {
    const bool sees_some = t >= 31 + 31;
    for (int64_t h = 0; h < heads; ++h) {
      const float lse = run->outputs.lse_cmp[t * heads + h];
      EXPECT_EQ(std::isfinite(lse), sees_some) << t;
      if (sees_some) continue;
      EXPECT_EQ(lse, -std::numeric_limits<float>::infinity());
      for (int64_t c = 0; c < 64; ++c) EXPECT_EQ(o_cmp[(t * heads + h) * 64 + c], 0.0);
    }
  }
}

// Logits of several hundred: exp of anything but the largest is nothing, and nothing overflows.
TEST(DecodeTest, ExtremeLogits) {
  for (double scale : {1e-30, 1000.0}) {
    const StageProblem problem =
        MakeStageProblem(SmallConfig(), {0, 600}, {.logit_scale = scale}, 14);
    const auto kernels = MakeKernels();
    const auto run = RunDecode(problem, {.prefixes = {100}, .max_new_tokens = 8}, *kernels);
    ASSERT_TRUE(run.ok()) << run.status();
    for (double x : RowsOfTokens(Decode(DType::kF32, run->outputs.o), run->tokens, 4 * 64)) {
      ASSERT_TRUE(std::isfinite(x));
    }
    ExpectSameAsForward(problem, *run, *kernels, true);
  }
}

// Blocks of the same tokens score the same: the lower index is taken.
TEST(DecodeTest, TiedScoresGoToTheLowerIndex) {
  ReferenceConfig config = SmallConfig();
  config.compress_block_tokens = 16;  // blocks do not reach over into their neighbours
  config.num_selected_blocks = 8;
  test::Random random(15);
  reference::ReferenceInputs inputs = test::RandomInputs(config, {0, 2560}, {}, &random);
  const int64_t block_values = 64 * config.num_kv_heads * 64;
  for (int64_t j = 1; j < 40; ++j) {
    std::copy_n(inputs.k_cmp.begin(), block_values, inputs.k_cmp.begin() + j * block_values);
  }
  const auto kernels = MakeKernels();
  const auto run = RunDecode(MakeStageProblem(config, {}, inputs),
                             {.prefixes = {8 * 64}, .max_new_tokens = 50}, *kernels);
  ASSERT_TRUE(run.ok()) << run.status();
  for (int64_t t : run->tokens) {
    for (int64_t g = 0; g < 2; ++g) {
      const int32_t* const picks = &run->outputs.block_indices[(t * 2 + g) * 8];
      for (int32_t i = 0; i < 6; ++i) ASSERT_EQ(picks[i], i) << t;
      ASSERT_EQ(picks[6], t / 64 - 1);
      ASSERT_EQ(picks[7], t / 64);
    }
  }
}

TEST(DecodeTest, RandomConfigurations) {
  test::Random random(16);
  for (int i = 0; i < 40; ++i) {
    SCOPED_TRACE(i);
    const ReferenceConfig config = test::RandomConfig({}, &random);
    const auto cu_seqlens = test::RandomDocuments(config, random.Int(1, 900), 5, &random);
    const test::InputOptions options{.dtype = random.Pick({DType::kF32, DType::kBF16, DType::kF16}),
                                     .parameter_dtype = random.Pick({DType::kF32, DType::kBF16}),
                                     .parameters_per_head = random.OneIn(2)};
    DecodeSchedule schedule{.max_new_tokens = random.Int(1, 64), .seed = random.Next()};
    for (size_t d = 0; d + 1 < cu_seqlens.size(); ++d) {
      schedule.prefixes.push_back(random.Int(0, cu_seqlens[d + 1] - cu_seqlens[d] - 1));
    }
    ExpectDecodes(MakeStageProblem(config, cu_seqlens, options, random.Next()), schedule);
  }
}

// Neither a step of no tokens nor one that does not compress touches what is not its own.
TEST(DecodeTest, WritesNothingElse) {
  const StageProblem problem = MakeStageProblem(SmallConfig(), {0, 64}, {}, 17);
  const AttentionDims& dims = problem.dims;
  const auto kernels = MakeKernels();
  const int64_t page_bytes = dims.num_kv_heads * kernels->RecordBytes(dims);
  test::Bytes page(page_bytes, kPoison);
  test::Bytes summaries(kSummaryPageBlocks * dims.num_kv_heads * 128 * 4, kPoison);
  const test::Bytes no_summaries = summaries;
  void* page_entry = page.data();
  void* summaries_entry = summaries.data();
  const auto append = [&](const std::vector<DecodeRow>& rows, bool compresses) {
    const ConstTensor3 k = {problem.encoded.k_slc.data(), 2 * 64, 64};
    const ConstTensor3 v = {problem.encoded.v_slc.data(), 2 * 64, 64};
    return kernels->AppendTokens({.dims = dims,
                                  .rows = rows.data(),
                                  .num_rows = static_cast<int64_t>(rows.size()),
                                  .tables = {.slc = &page_entry,
                                             .win = &page_entry,
                                             .cmp = &page_entry,
                                             .summaries = &summaries_entry,
                                             .max_pages = 1,
                                             .max_summary_pages = 1},
                                  .slc = {k, v},
                                  .win = {},
                                  .cmp = {},
                                  .compresses = compresses,
                                  .compressor = Compressor::kMean,
                                  .weights_k = {},
                                  .weights_v = {}},
                                 nullptr);
  };
  ASSERT_TRUE(append({{-1, 0}, {-1, 3}}, true).ok());
  EXPECT_EQ(page, test::Bytes(page_bytes, kPoison));
  EXPECT_EQ(summaries, no_summaries);

  std::vector<DecodeRow> rows;
  for (int64_t t = 0; t < 40; ++t) rows.push_back({0, t});
  ASSERT_TRUE(append(rows, false).ok());
  EXPECT_EQ(summaries, no_summaries);
  // Tokens 40 and later are as they were.
  for (int64_t head = 0; head < 2; ++head) {
    const std::byte* const record = page.data() + head * page_bytes / 2;
    for (int64_t i = 0; i < 64; ++i) {
      for (int64_t t = 0; t < 64; ++t) {
        const bool k_is_poison = record[(i * 64 + t) * 4 + 3] == kPoison;
        const bool v_is_poison = record[64 * 64 * 4 + (t * 64 + i) * 4 + 3] == kPoison;
        ASSERT_EQ(k_is_poison, t >= 40);
        ASSERT_EQ(v_is_poison, t >= 40);
      }
    }
  }
  // The block of tokens [16, 48) ends with token 47, and no other one before token 63.
  ASSERT_TRUE(append({{0, 40}, {0, 41}, {0, 42}, {0, 43}, {0, 44}, {0, 45}, {0, 46}}, true).ok());
  EXPECT_EQ(summaries, no_summaries);
  ASSERT_TRUE(append({{0, 47}}, true).ok());
  const int64_t row_bytes = dims.num_kv_heads * 128 * 4;
  for (int64_t i = 0; i < static_cast<int64_t>(summaries.size()); i += 4) {
    ASSERT_EQ(summaries[i + 3] == kPoison, i / row_bytes != 1) << i;
  }
}

TEST(DecodeTest, CopiesPieces) {
  const auto kernels = MakeKernels();
  for (int64_t num_bytes : {16, 4096}) {
    for (int64_t count : {0, 1, 37}) {
      std::vector<test::Bytes> from, to;
      std::vector<const void*> src;
      std::vector<void*> dst;
      test::Random random(18);
      for (int64_t i = 0; i < count; ++i) {
        test::Bytes bytes(num_bytes);
        for (std::byte& b : bytes) b = static_cast<std::byte>(random.Int(0, 255));
        from.push_back(bytes);
        to.emplace_back(num_bytes + 1, kPoison);
      }
      for (int64_t i = 0; i < count; ++i) {
        src.push_back(from[i].data());
        dst.push_back(to[i].data());
      }
      ASSERT_TRUE(
          kernels
              ->CopyPieces(
                  {.src = src.data(), .dst = dst.data(), .count = count, .num_bytes = num_bytes},
                  nullptr)
              .ok());
      for (int64_t i = 0; i < count; ++i) {
        EXPECT_EQ(std::memcmp(from[i].data(), to[i].data(), num_bytes), 0);
        EXPECT_EQ(to[i].back(), kPoison);
      }
    }
  }
}

}  // namespace
}  // namespace nsa::kernels::cpu
