#include "nsa/config.h"

#include <cmath>
#include <fstream>
#include <limits>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nsa {
namespace {

using ::testing::HasSubstr;

TEST(ConfigTest, DefaultsAreValidAndScaleFollowsTheHeadDim) {
  const NsaConfig config;
  EXPECT_TRUE(Validate(config).ok()) << Validate(config);
  EXPECT_FLOAT_EQ(MakeDims(config, DType::kBF16).softmax_scale, 1 / std::sqrt(128.0f));
}

TEST(ConfigTest, EveryBrokenRuleIsReportedAtOnce) {
  NsaConfig config;
  config.num_q_heads = 6;
  config.num_kv_heads = 4;
  config.head_dim_qk = 100;
  config.head_dim_v = 0;
  config.compress_block_tokens = 40;
  config.compress_stride_tokens = 16;
  config.select_block_tokens = 72;
  config.num_selected_blocks = 2;
  config.num_initial_blocks = 1;
  config.num_local_blocks = 2;
  config.window_tokens = 0;
  config.softmax_scale = std::numeric_limits<float>::quiet_NaN();
  const absl::Status status = Validate(config);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  for (const char* part :
       {"num_q_heads = 6: must be a multiple of num_kv_heads = 4", "head_dim_qk = 100: must be one",
        "head_dim_v = 0: must be one", "compress_block_tokens = 40: must be a multiple of 16",
        "select_block_tokens = 72: must be a multiple of compress_stride_tokens = 16",
        "num_selected_blocks = 2: must be at least num_initial_blocks + num_local_blocks = 3",
        "window_tokens = 0: must lie in [1", "softmax_scale = nan: must be finite"}) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(part));
  }
  EXPECT_EQ(BrokenRules(config).size(), 8u);
}

TEST(ConfigTest, ExtremeValuesAreRejectedWithoutOverflow) {
  const NsaConfig defaults;
  for (int32_t value :
       {std::numeric_limits<int32_t>::min(), -1, 0, std::numeric_limits<int32_t>::max()}) {
    NsaConfig config{.num_q_heads = value,
                     .num_kv_heads = value,
                     .head_dim_qk = value,
                     .head_dim_v = value,
                     .compress_block_tokens = value,
                     .compress_stride_tokens = value,
                     .select_block_tokens = value,
                     .num_selected_blocks = value,
                     .num_initial_blocks = value,
                     .num_local_blocks = value,
                     .window_tokens = value,
                     .softmax_scale = std::nullopt,
                     .compressor = defaults.compressor};
    EXPECT_GE(BrokenRules(config).size(), 9u);
  }
}

TEST(ConfigTest, TextProtoAndJsonLoadTheSameConfig) {
  NsaConfig expected;
  expected.num_q_heads = 8;
  expected.num_kv_heads = 2;
  expected.softmax_scale = 0.25f;
  expected.compressor = Compressor::kMlp;
  const auto text = ParseTextProto(
      "num_q_heads: 8 num_kv_heads: 2  # a comment\nsoftmax_scale: 0.25 compressor: MLP");
  ASSERT_TRUE(text.ok()) << text.status();
  EXPECT_EQ(*text, expected);
  const auto json = ParseJson(
      R"({"num_q_heads": 8, "num_kv_heads": 2, "softmax_scale": 0.25, "compressor": "MLP"})");
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ(*json, expected);
}

TEST(ConfigTest, EveryFieldSurvivesTheProto) {
  NsaConfig config{.num_q_heads = 48,
                   .num_kv_heads = 3,
                   .head_dim_qk = 192,
                   .head_dim_v = 64,
                   .compress_block_tokens = 64,
                   .compress_stride_tokens = 32,
                   .select_block_tokens = 128,
                   .num_selected_blocks = 11,
                   .num_initial_blocks = 0,
                   .num_local_blocks = 5,
                   .window_tokens = 77,
                   .softmax_scale = 0.5f,
                   .compressor = Compressor::kLinear};
  EXPECT_EQ(FromProto(ToProto(config)), config);
  EXPECT_EQ(Fields(config).size(),
            static_cast<size_t>(NsaConfigProto::descriptor()->field_count()));
  for (const auto& [name, value] : Fields(config)) {
    EXPECT_NE(NsaConfigProto::descriptor()->FindFieldByName(name), nullptr) << name;
  }
}

TEST(ConfigTest, BadTextSaysWhere) {
  EXPECT_THAT(std::string(ParseTextProto("num_q_heads: 8\nheads: 3").status().message()),
              HasSubstr("2:6: "));
  for (const char* text : {"num_q_heads: \"x\"", "num_q_heads: 99999999999", "{", "\xff\xfe"}) {
    EXPECT_EQ(ParseTextProto(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  for (const char* text : {"", "[]", "{\"num_q_heads\": \"x\"}", "{\"nope\": 1}", "{"}) {
    EXPECT_EQ(ParseJson(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
  // An enum number that would be a valid one if it were cut to 8 bits.
  EXPECT_THAT(std::string(ParseJson("{\"compressor\": 256}").status().message()),
              HasSubstr("compressor"));
  EXPECT_THAT(std::string(ParseTextProto("num_kv_heads: 3").status().message()),
              HasSubstr("num_q_heads = 64: must be a multiple of num_kv_heads = 3"));
}

TEST(ConfigTest, FilesLoadByEndingAndErrorsNameThem) {
  const std::string folder = ::testing::TempDir();
  std::ofstream(folder + "/a.json") << "{\"window_tokens\": 128}";
  std::ofstream(folder + "/a.txtpb") << "window_tokens: 128";
  std::ofstream(folder + "/bad.txtpb") << "window_tokens: -1";
  for (const char* name : {"/a.json", "/a.txtpb"}) {
    const auto config = LoadConfig(folder + name);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->window_tokens, 128);
  }
  EXPECT_THAT(std::string(LoadConfig(folder + "/bad.txtpb").status().message()),
              HasSubstr("bad.txtpb: config: window_tokens = -1"));
  EXPECT_EQ(LoadConfig(folder + "/none").status().code(), absl::StatusCode::kNotFound);
}

TEST(ConfigTest, BlockCounts) {
  const NsaConfig config;  // l 32, d 16, l' 64
  EXPECT_EQ(NumCompressionBlocks(config, 31), 0);
  EXPECT_EQ(NumCompressionBlocks(config, 32), 1);
  EXPECT_EQ(NumCompressionBlocks(config, 47), 1);
  EXPECT_EQ(NumCompressionBlocks(config, 48), 2);
  EXPECT_EQ(NumSelectBlocks(config, 1), 1);
  EXPECT_EQ(NumSelectBlocks(config, 64), 1);
  EXPECT_EQ(NumSelectBlocks(config, 65), 2);
}

}  // namespace
}  // namespace nsa
