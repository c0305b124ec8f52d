#include "tests/testing/generate.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace nsa::test {
namespace {

TEST(RandomTest, IsTheSameEverywhere) {
  Random random(1);
  EXPECT_EQ(random.Next(), 0x910a2dec89025cc1u);
  EXPECT_EQ(Random(7).Normal(), Random(7).Normal());
  double sum = 0.0, sum_of_squares = 0.0;
  for (int i = 0; i < 10000; ++i) {
    const double x = random.Normal();
    sum += x;
    sum_of_squares += x * x;
  }
  EXPECT_NEAR(sum / 10000, 0.0, 0.05);
  EXPECT_NEAR(sum_of_squares / 10000, 1.0, 0.05);
}

TEST(GenerateTest, ConfigsKeepTheRules) {
  Random random(2);
  std::set<int64_t> dims;
  for (int i = 0; i < 2000; ++i) {
    const reference::ReferenceConfig config = RandomConfig({.max_head_dim = 256}, &random);
    SCOPED_TRACE(Describe(config));
    ASSERT_EQ(config.num_q_heads % config.num_kv_heads, 0);
    ASSERT_LE(config.num_q_heads, 16);
    ASSERT_EQ(config.compress_stride_tokens % 16, 0);
    ASSERT_EQ(config.compress_block_tokens % config.compress_stride_tokens, 0);
    ASSERT_EQ(config.select_block_tokens % config.compress_stride_tokens, 0);
    ASSERT_LE(config.compress_block_tokens, 64);
    ASSERT_LE(config.select_block_tokens, 128);
    ASSERT_GE(config.num_selected_blocks, config.num_initial_blocks + config.num_local_blocks);
    ASSERT_GE(config.num_local_blocks, 1);
    ASSERT_GE(config.window_tokens, 1);
    dims.insert(config.head_dim_qk);
    dims.insert(config.head_dim_v);
  }
  EXPECT_EQ(dims, (std::set<int64_t>{64, 128, 192, 256}));
}

TEST(GenerateTest, DocumentsCoverTheTokens) {
  Random random(3);
  const reference::ReferenceConfig config;
  for (int64_t num_tokens : {1, 31, 500}) {
    for (int i = 0; i < 200; ++i) {
      const auto cu_seqlens = RandomDocuments(config, num_tokens, 5, &random);
      ASSERT_EQ(cu_seqlens.front(), 0);
      ASSERT_EQ(cu_seqlens.back(), num_tokens);
      ASSERT_LE(cu_seqlens.size(), 6u);
      for (size_t j = 1; j < cu_seqlens.size(); ++j) ASSERT_LT(cu_seqlens[j - 1], cu_seqlens[j]);
    }
  }
}

TEST(GenerateTest, InputsFitTheReferenceAndAreRounded) {
  Random random(4);
  for (int i = 0; i < 8; ++i) {
    reference::ReferenceConfig config = RandomConfig({.max_q_heads = 4}, &random);
    config.compressor = static_cast<reference::CompressorKind>(i % 4);
    SCOPED_TRACE(Describe(config));
    const InputOptions options = {.dtype = i % 2 ? DType::kBF16 : DType::kF16,
                                  .gate_dtype = DType::kBF16,
                                  .parameter_dtype = DType::kBF16,
                                  .parameters_per_head = i % 3 == 0,
                                  .with_pe = i % 3 != 1};
    const auto cu_seqlens = RandomDocuments(config, 130, 2, &random);
    const auto inputs = RandomInputs(config, cu_seqlens, options, &random);
    const auto outputs = reference::Forward(config, inputs);
    ASSERT_TRUE(outputs.ok()) << outputs.status();
    EXPECT_TRUE(std::all_of(outputs->o.begin(), outputs->o.end(),
                            [](double x) { return std::isfinite(x); }));
    const EncodedInputs encoded = Encode(inputs, options);
    EXPECT_EQ(Decode(options.dtype, encoded.q), inputs.q);
    EXPECT_EQ(Decode(options.dtype, encoded.k_cmp), inputs.k_cmp);
    EXPECT_EQ(Decode(DType::kBF16, encoded.gate), inputs.gate);
    EXPECT_EQ(Decode(DType::kBF16, encoded.compress_v.w1), inputs.compress_v.w1);
    const kernels::CompressorWeights weights = encoded.compress_k.view();
    EXPECT_EQ(weights.w1 != nullptr, config.compressor == reference::CompressorKind::kMlp);
    EXPECT_EQ(weights.pe != nullptr,
              options.with_pe && config.compressor != reference::CompressorKind::kMean);
  }
}

TEST(GenerateTest, DimsAndDocuments) {
  const reference::ReferenceConfig config;
  const auto documents = MakeDocuments(config, {0, 65, 95, 130});
  ASSERT_EQ(documents.size(), 3u);
  EXPECT_EQ(documents[0].num_cmp_blocks, 3);
  EXPECT_EQ(documents[0].num_slc_blocks, 2);
  EXPECT_EQ(documents[1].num_cmp_blocks, 0);
  EXPECT_EQ(documents[2].cmp_block_begin, 3);
  EXPECT_EQ(documents[2].slc_block_begin, 3);
  EXPECT_EQ(documents[2].num_cmp_blocks, 1);
  const kernels::AttentionDims dims = MakeDims(config, DType::kBF16);
  EXPECT_EQ(dims.num_selected_blocks, 16);
  EXPECT_EQ(dims.softmax_scale, 1.0f);
}

TEST(GenerateTest, SelectionsAreRarelyNearTies) {
  Random random(5);
  reference::ReferenceConfig config;
  config.num_q_heads = 4;
  config.head_dim_qk = config.head_dim_v = 64;
  config.num_selected_blocks = 6;
  const std::vector<int64_t> cu_seqlens = {0, 1000};
  const auto inputs = RandomInputs(config, cu_seqlens, {}, &random);
  const auto outputs = reference::Forward(config, inputs);
  ASSERT_TRUE(outputs.ok());
  int64_t near_ties = 0;
  for (int64_t t = 0; t < 1000; ++t) {
    near_ties += outputs->margin[t] < 1e-3 * outputs->threshold[t];
  }
  EXPECT_LT(near_ties, 20);
}

}  // namespace
}  // namespace nsa::test
