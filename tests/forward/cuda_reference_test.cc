// The forward on a GPU against the fp64 reference and the CPU kernels: every shape that has kernels
// of its own, and the inputs that are hard on them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/loopback/loopback.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/mirrored_kernels.h"
#include "tests/forward/cuda_testing.h"
#include "tests/testing/compare.h"
#include "tests/testing/reference_check.h"

namespace nsa::test {
namespace {

using reference::CompressorKind;
using reference::ReferenceConfig;
using reference::ReferenceInputs;
using ::testing::AllOf;
using ::testing::HasSubstr;

// All else as by default.
ReferenceConfig Heads(int64_t q_heads, int64_t kv_heads, int64_t dk, int64_t dv) {
  ReferenceConfig config;
  config.num_q_heads = q_heads;
  config.num_kv_heads = kv_heads;
  config.head_dim_qk = dk;
  config.head_dim_v = dv;
  return config;
}

ReferenceConfig Blocks(int64_t l, int64_t d, int64_t select_block_tokens, int64_t dim = 128) {
  ReferenceConfig config = Heads(16, 1, dim, dim);
  config.compress_block_tokens = l;
  config.compress_stride_tokens = d;
  config.select_block_tokens = select_block_tokens;
  return config;
}

ReferenceConfig Compressing(CompressorKind compressor, int64_t dk = 128, int64_t dv = 128) {
  ReferenceConfig config = Heads(8, 2, dk, dv);
  config.compressor = compressor;
  return config;
}

class CudaReferenceTest : public CudaRankTest {
 protected:
  // One rank, and three that share the GPU, whose bits must be the same.
  void ExpectReference(const ReferenceConfig& config, const InputOptions& options,
                       const ReferenceInputs& inputs, const ReferenceCheck& check = {}) {
    SCOPED_TRACE(Describe(config));
    const Problem problem = MakeProblem(config, inputs.cu_seqlens, options, inputs);
    GlobalOutputs outputs(problem);
    absl::Status status =
        RunRank(problem, OneRank(problem), {}, NewCommunicator(), kernels_, &outputs);
    ASSERT_TRUE(status.ok()) << status;
    ExpectEqualsReference(config, inputs, options.dtype, outputs, check);

    GlobalOutputs three(problem);
    const ShardPlan plan = *ShardPlan::Parse("zigzag", problem.num_tokens(), 3, problem.cu_seqlens);
    status = RunLoopback(problem, plan, {}, &three, nullptr, [this] {
      return std::make_unique<kernels::cuda::MirroredKernels>(kernels_);
    });
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(SameOutputs(problem, outputs, three));
  }
};

struct Case {
  std::string name;
  ReferenceConfig config;
  std::vector<int64_t> cu_seqlens;
  InputOptions options = {.dtype = DType::kBF16};
};

class CudaShapesTest : public CudaReferenceTest, public ::testing::WithParamInterface<Case> {};

TEST_P(CudaShapesTest, ForwardEqualsTheReference) {
  const Case& c = GetParam();
  Random random(1);
  ExpectReference(c.config, c.options, RandomInputs(c.config, c.cu_seqlens, c.options, &random));
}

// Documents of less than a block, of a block, and of little more.
const std::vector<int64_t> kShort = {0, 1, 2, 17, 48, 80, 143, 207, 272, 401, 433, 448};

std::vector<Case> Cases() {
  const InputOptions f16 = {.dtype = DType::kF16};
  const InputOptions f16_all = {.dtype = DType::kF16,
                                .gate_dtype = DType::kF16,
                                .parameter_dtype = DType::kF16,
                                .parameters_per_head = true,
                                .hidden_width = 90};
  const InputOptions bf16_no_pe = {.dtype = DType::kBF16,
                                   .gate_dtype = DType::kBF16,
                                   .parameter_dtype = DType::kBF16,
                                   .with_pe = false,
                                   .hidden_width = 7};
  std::vector<Case> cases = {
      {"LongGroupOf16", Heads(16, 1, 128, 128), {0, 8192}},
      {"LongGroupOf1", Heads(4, 4, 64, 64), {0, 8192}, f16},
      {"LongGroupOf3", Heads(6, 2, 128, 128), {0, 8191}},
      {"GroupOf1", Heads(2, 2, 128, 128), {0, 1000, 3000}, f16},
      {"GroupOf3", Heads(6, 2, 64, 64), {0, 4000}, f16},
      {"GroupOf5", Heads(5, 1, 192, 128), {0, 3001}},
      {"GroupOf16", Heads(32, 2, 128, 128), {0, 700, 2600}, f16},
      {"GroupOf24", Heads(24, 1, 192, 128), {0, 2050}, f16},
      {"GroupOf24Dim64", Heads(24, 1, 64, 64), {0, 2050}},
      {"GroupOf64", Heads(64, 1, 128, 128), {0, 1500}},
      {"GroupOf64Dim64", Heads(64, 1, 64, 64), {0, 2500}, f16},
      {"Dims64", Heads(16, 1, 64, 64), {0, 500, 3500}},
      {"Dims192And128", Heads(32, 2, 192, 128), {0, 2300}},
      {"Dims64And256", Heads(6, 2, 64, 256), {0, 1700}},
      {"Dims256And192", Heads(6, 1, 256, 192), {0, 1700}, f16},
      {"Dims192", Heads(4, 2, 192, 192), {0, 1700}},
      {"ShortDocuments", Heads(16, 1, 128, 128), kShort},
      {"ShortDocumentsOfManyHeads", Heads(12, 4, 192, 128), kShort, f16},
      {"ShortDocumentsOfOtherDims", Heads(3, 1, 128, 256), kShort, f16},
      {"OneToken", Heads(16, 1, 128, 128), {0, 1}},
  };
  for (int64_t select : {32, 64, 128}) {
    const std::string end = "Select" + std::to_string(select);
    cases.push_back({"Blocks16By16" + end, Blocks(16, 16, select), {0, 2800}});
    cases.push_back({"Blocks32By16" + end, Blocks(32, 16, select), {0, 300, 4000}, f16});
    cases.push_back({"Blocks32By32" + end, Blocks(32, 32, select, 64), {0, 3000}});
    cases.push_back({"Blocks64By16" + end, Blocks(64, 16, select, 64), {0, 2900}, f16});
    cases.push_back({"Blocks128By32" + end, Blocks(128, 32, select), {0, 3100}});
  }
  cases.push_back({"Blocks64By64Select64", Blocks(64, 64, 64), {0, 4100}});
  cases.push_back({"Blocks48By48Select240", Blocks(48, 48, 240), {0, 4100}});
  const std::pair<const char*, CompressorKind> compressors[] = {
      {"Mean", CompressorKind::kMean},
      {"Weighted", CompressorKind::kWeighted},
      {"Linear", CompressorKind::kLinear},
      {"Mlp", CompressorKind::kMlp}};
  for (const auto& [name, kind] : compressors) {
    cases.push_back({std::string(name), Compressing(kind), {0, 20, 900, 2500}});
    cases.push_back({name + std::string("OfF16"), Compressing(kind, 192), {0, 1800}, f16_all});
    cases.push_back({name + std::string("NoPe"), Compressing(kind, 64, 64), {0, 1800}, bf16_no_pe});
  }
  Case numbers = {"ManyBlocksAndLongWindow", Heads(16, 1, 128, 128), {0, 5000}};
  numbers.config.num_selected_blocks = 40;
  numbers.config.num_initial_blocks = 3;
  numbers.config.num_local_blocks = 4;
  numbers.config.window_tokens = 10000;
  cases.push_back(numbers);
  numbers.name = "OneBlockAndOwnToken";
  numbers.config.num_selected_blocks = numbers.config.num_local_blocks = 1;
  numbers.config.num_initial_blocks = 0;
  numbers.config.window_tokens = 1;
  cases.push_back(numbers);
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudaShapesTest, ::testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

// A query that no compressed block precedes gives zeros and -inf in that branch, not NaN.
TEST_F(CudaReferenceTest, QueriesWithoutSummaries) {
  const ReferenceConfig config = Heads(16, 1, 128, 128);
  const Problem problem = RandomProblem(config, {0, 31, 95}, {.dtype = DType::kBF16}, 2);
  GlobalOutputs outputs(problem);
  const absl::Status status =
      RunRank(problem, OneRank(problem), {}, NewCommunicator(), kernels_, &outputs);
  ASSERT_TRUE(status.ok()) << status;
  const std::vector<double> lse = outputs.Values(GlobalOutputs::kLseCmp);
  const std::vector<double> o_cmp = outputs.Values(GlobalOutputs::kOCmp);
  const std::vector<double> o = outputs.Values(GlobalOutputs::kO);
  for (int64_t row = 0; row < 95 * 16; ++row) {
    const bool sees_some = row / 16 >= 31 + 31;
    ASSERT_EQ(std::isinf(lse[row]) && lse[row] < 0, !sees_some) << row;
    for (int64_t i = row * 128; i < (row + 1) * 128; ++i) {
      ASSERT_TRUE(sees_some || o_cmp[i] == 0.0) << row;
      ASSERT_TRUE(std::isfinite(o[i])) << row;
    }
  }
}

// Softmax takes one key and drops all others, and nothing overflows.
TEST_F(CudaReferenceTest, LogitsOfHundreds) {
  for (const ReferenceConfig& config : {Heads(16, 1, 128, 128), Heads(16, 1, 64, 64),
                                        Heads(3, 1, 192, 128), Heads(2, 1, 256, 64)}) {
    for (double scale : {100.0, 400.0}) {
      SCOPED_TRACE(scale);
      const InputOptions options = {.dtype = DType::kF16, .logit_scale = scale};
      Random random(3);
      const ReferenceInputs inputs = RandomInputs(config, {0, 70, 1500}, options, &random);
      ExpectReference(config, options, inputs);
    }
  }
}

// q = 0: every key weighs the same, every score of equally many summaries ties, and ties go to the
// lower index.
TEST_F(CudaReferenceTest, EqualLogits) {
  for (const ReferenceConfig& config : {Heads(16, 1, 128, 128), Heads(10, 2, 64, 64),
                                        Heads(3, 1, 192, 128), Heads(2, 1, 256, 64)}) {
    const InputOptions options = {.dtype = DType::kBF16};
    Random random(4);
    ReferenceInputs inputs = RandomInputs(config, {0, 3000}, options, &random);
    std::fill(inputs.q.begin(), inputs.q.end(), 0.0);
    ExpectReference(config, options, inputs, {.same_selection = true});
  }
}

// More than the reference can do: it judges the queries for which the two select otherwise, and
// some of all.
TEST_F(CudaReferenceTest, AgreesWithTheCpuAt32kTokens) {
  const ReferenceConfig config = Heads(32, 2, 128, 128);
  const int64_t num_tokens = 32768, hkv = config.num_kv_heads, n = config.num_selected_blocks;
  const InputOptions options = {.dtype = DType::kBF16};
  Random random(5);
  const ReferenceInputs inputs = RandomInputs(config, {0, num_tokens}, options, &random);
  const Problem problem = MakeProblem(config, inputs.cu_seqlens, options, inputs);
  GlobalOutputs cpu(problem), gpu(problem);
  auto group = comm::LoopbackGroup::Create(1);
  ASSERT_TRUE(group.ok()) << group.status();
  auto cpu_kernels = kernels::CpuKernels::Create();
  ASSERT_TRUE(cpu_kernels.ok()) << cpu_kernels.status();
  absl::Status status =
      RunRank(problem, OneRank(problem), {}, std::move((*group)[0]), *std::move(cpu_kernels), &cpu);
  ASSERT_TRUE(status.ok()) << status;
  status = RunRank(problem, OneRank(problem), {}, NewCommunicator(), kernels_, &gpu);
  ASSERT_TRUE(status.ok()) << status;

  const std::vector<int32_t> cpu_blocks = cpu.block_indices(), gpu_blocks = gpu.block_indices();
  std::vector<int64_t> flipped;  // tokens
  for (int64_t token = 0; token < num_tokens; ++token) {
    const auto row = gpu_blocks.begin() + token * hkv * n;
    if (!std::equal(row, row + hkv * n, cpu_blocks.begin() + token * hkv * n)) {
      flipped.push_back(token);
    }
  }
  EXPECT_LE(flipped.size(), num_tokens / 500);
  const int64_t row_values = config.num_q_heads * config.head_dim_v;
  for (const auto& [name, field] :
       {std::pair{"o_cmp", GlobalOutputs::kOCmp}, std::pair{"o_slc", GlobalOutputs::kOSlc},
        std::pair{"o_win", GlobalOutputs::kOWin}, std::pair{"o", GlobalOutputs::kO}}) {
    std::vector<double> expected = cpu.Values(field), actual = gpu.Values(field);
    if (field == GlobalOutputs::kOSlc || field == GlobalOutputs::kO) {
      for (int64_t token : flipped) {
        for (std::vector<double>* values : {&expected, &actual}) {
          std::fill_n(values->begin() + token * row_values, row_values, 0.0);
        }
      }
    }
    EXPECT_TRUE(Close(name, expected, actual, config.head_dim_v, 4e-3));
  }
  EXPECT_TRUE(CloseElements("lse_cmp", cpu.Values(GlobalOutputs::kLseCmp),
                            gpu.Values(GlobalOutputs::kLseCmp), 1e-2, 1e-2));
  EXPECT_TRUE(CloseElements("lse_win", cpu.Values(GlobalOutputs::kLseWin),
                            gpu.Values(GlobalOutputs::kLseWin), 1e-5, 1e-5));

  std::vector<int64_t> judged = std::move(flipped);
  for (int64_t token = 0; token < num_tokens; token += 331) judged.push_back(token);
  ExpectEqualsReference(config, inputs, options.dtype, gpu, {.query_tokens = &judged});
}

// What no kernel can do is said where the engine is made, with what they can.
TEST_F(CudaReferenceTest, RefusesWhatItCannotCompute) {
  const auto create = [&](const NsaConfig& config, DType dtype) {
    return Engine::Create({.config = config, .dtype = dtype},
                          *ShardPlan::Parse("contiguous", 100, 1), NewCommunicator(), kernels_)
        .status();
  };
  absl::Status status = create({}, DType::kF32);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("dtype = f32"), HasSubstr("bf16, f16")));
  NsaConfig config;
  config.head_dim_qk = 80;
  status = create(config, DType::kBF16);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), AllOf(HasSubstr("head_dim_qk = 80"), HasSubstr("64, 128, 192")));
  config = {};
  config.compress_stride_tokens = 8;
  status = create(config, DType::kBF16);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("compress_stride_tokens = 8"));
}

// Kernels read rows 16 bytes at a time.
TEST_F(CudaReferenceTest, RefusesRowsThatAreNotAligned) {
  const Problem problem =
      RandomProblem(Heads(16, 1, 128, 128), {0, 300}, {.dtype = DType::kBF16}, 6);
  const auto forward = NewForward(problem, {.row_padding = 3});
  ASSERT_NE(forward, nullptr);
  const absl::Status status = forward->Run();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(),
              AllOf(HasSubstr("strides[0] = "), HasSubstr("multiple of 16 bytes")));
}

}  // namespace
}  // namespace nsa::test
