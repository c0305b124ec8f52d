// Decoding on the GPU, a step at a time: against the fp64 reference's forward of the whole
// sequence, and against itself in other batches. All that kernels have not written is NaN.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/stages_testing.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/decode_testing.h"
#include "kernels/cuda/gpu_testing.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cuda {
namespace {

using cpu::MakeStageProblem;
using cpu::SmallConfig;
using cpu::StageProblem;
using reference::CompressorKind;
using reference::ReferenceConfig;
using test::Bytes;

// Steps over the last `num_decoded` tokens of each sequence.
struct Schedule {
  int64_t num_decoded = 3;
  int64_t new_tokens = 1;        // of a sequence in a step
  bool with_empty_rows = false;  // between sequences
  bool one_sequence_a_step = false;
};

class DecodeTest : public ::testing::TestWithParam<CudaPath> {
 protected:
  void SetUp() override {
    NSA_SKIP_WITHOUT_GPU();
    auto kernels = CudaKernels::Create({.path = GetParam()});
    ASSERT_TRUE(kernels.ok()) << kernels.status();
    kernels_ = *std::move(kernels);
  }

  static std::vector<std::vector<DecodeRow>> Steps(const StageProblem& problem,
                                                   const Schedule& schedule,
                                                   std::vector<int64_t>& prefill) {
    const auto& cu = problem.inputs.cu_seqlens;
    std::vector<std::vector<DecodeRow>> steps;
    const auto num_sequences = static_cast<int32_t>(cu.size()) - 1;
    for (int32_t s = 0; s < num_sequences; ++s) {
      prefill.push_back(std::max<int64_t>(0, cu[s + 1] - cu[s] - schedule.num_decoded));
    }
    for (int64_t begin = 0; begin < schedule.num_decoded; begin += schedule.new_tokens) {
      std::vector<DecodeRow> rows;
      for (int32_t s = 0; s < num_sequences; ++s) {
        const int64_t length = cu[s + 1] - cu[s];
        for (int64_t i = 0; i < schedule.new_tokens; ++i) {
          const int64_t position = prefill[s] + begin + i;
          if (position < length) rows.push_back({s, position});
        }
        if (schedule.with_empty_rows) rows.push_back({-1, 0});
        if (schedule.one_sequence_a_step && !rows.empty()) {
          steps.push_back(std::move(rows));
          rows.clear();
        }
      }
      if (!rows.empty()) steps.push_back(rows);
    }
    return steps;
  }

  DecodeOutputs Run(const StageProblem& problem, const Schedule& schedule,
                    std::pair<Bytes, Bytes>* summaries = nullptr) {
    std::vector<int64_t> prefill;
    const auto steps = Steps(problem, schedule, prefill);
    size_t max_rows = 64;
    for (const auto& step : steps) max_rows = std::max(max_rows, step.size());
    DecodeCache cache(*kernels_, problem, max_rows);
    cache.Prefill(prefill);
    for (const auto& step : steps) cache.Step(step);
    if (summaries != nullptr) *summaries = cache.Summaries();
    return cache.results();
  }

  void ExpectAgreement(const StageProblem& problem, const Schedule& schedule = {}) {
    SCOPED_TRACE(test::Describe(problem.config));
    ASSERT_EQ(kernels_->Supports(problem.dims), absl::OkStatus());
    std::pair<Bytes, Bytes> summaries;
    const DecodeOutputs out = Run(problem, schedule, &summaries);
    if (HasFailure()) return;
    const DType dtype = problem.options.dtype;
    const int64_t dk = problem.config.head_dim_qk, dv = problem.config.head_dim_v;
    const double tolerance = test::DefaultTolerance(dtype);
    const std::vector<int64_t>& cu = problem.inputs.cu_seqlens;
    std::vector<int64_t> tokens, prefill;
    for (const auto& step : Steps(problem, schedule, prefill)) {
      for (const DecodeRow& row : step) {
        if (row.sequence >= 0) tokens.push_back(cu[row.sequence] + row.position);
      }
    }

    // What the summaries and the selection feed is compared on the kernels' own ones.
    reference::ReferenceOptions options;
    const std::vector<double> kc = test::Decode(dtype, summaries.first);
    const std::vector<double> vc = test::Decode(dtype, summaries.second);
    options.given_kc = &kc;
    options.given_vc = &vc;
    options.given_block_indices = &out.block_indices;
    options.query_tokens = &tokens;
    options.num_threads = static_cast<int>(std::thread::hardware_concurrency());
    const auto expected = reference::Forward(problem.config, problem.inputs, options);
    ASSERT_TRUE(expected.ok()) << expected.status();
    const auto expect_summaries = [&](const char* name, const auto& parameters, const auto& x,
                                      int64_t dim, const std::vector<double>& actual) {
      EXPECT_TRUE(test::Close(name, reference::Compress(problem.config, parameters, cu, x, dim),
                              actual, dim, tolerance));
    };
    expect_summaries("kc", problem.inputs.compress_k, problem.inputs.k_cmp, dk, kc);
    expect_summaries("vc", problem.inputs.compress_v, problem.inputs.v_cmp, dv, vc);
    // Of the tokens alone.
    const auto pick = [&](const auto& all, int64_t row_size) {
      std::vector<double> picked;
      for (int64_t token : tokens) {
        picked.insert(picked.end(), all.begin() + token * row_size,
                      all.begin() + (token + 1) * row_size);
      }
      return picked;
    };
    const int64_t heads = problem.config.num_q_heads;
    const auto expect_rows = [&](const char* name, const std::vector<double>& wanted,
                                 const Bytes& actual) {
      EXPECT_TRUE(test::Close(name, pick(wanted, heads * dv),
                              pick(test::Decode(dtype, actual), heads * dv), dv, tolerance));
    };
    const auto expect_lse = [&](const char* name, const std::vector<double>& wanted,
                                const std::vector<float>& actual) {
      EXPECT_TRUE(test::CloseElements(name, pick(wanted, heads), pick(actual, heads), 1e-5, 2e-6));
    };
    expect_rows("o_cmp", expected->o_cmp, out.o_cmp);
    expect_rows("o_slc", expected->o_slc, out.o_slc);
    expect_rows("o_win", expected->o_win, out.o_win);
    expect_rows("o", expected->o, out.o);
    expect_lse("lse_cmp", expected->lse_cmp, out.lse_cmp);
    expect_lse("lse_slc", expected->lse_slc, out.lse_slc);
    expect_lse("lse_win", expected->lse_win, out.lse_win);
    EXPECT_TRUE(test::SelectionAgrees(problem.config, cu, *expected, out.block_indices,
                                      {.query_tokens = &tokens}));
  }

  static void ExpectSameBits(const DecodeOutputs& expected, const DecodeOutputs& actual) {
    EXPECT_EQ(expected.o, actual.o);
    EXPECT_EQ(expected.o_cmp, actual.o_cmp);
    EXPECT_EQ(expected.o_slc, actual.o_slc);
    EXPECT_EQ(expected.o_win, actual.o_win);
    EXPECT_EQ(expected.lse_cmp, actual.lse_cmp);
    EXPECT_EQ(expected.lse_slc, actual.lse_slc);
    EXPECT_EQ(expected.lse_win, actual.lse_win);
    EXPECT_EQ(expected.block_indices, actual.block_indices);
  }

  std::unique_ptr<Kernels> kernels_;
};

INSTANTIATE_TEST_SUITE_P(Paths, DecodeTest, ::testing::Values(CudaPath::kAuto, CudaPath::kPortable),
                         NameOfPath);

TEST_P(DecodeTest, StorageTypes) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (DType gate_dtype : {DType::kF32, dtype}) {
      for (bool share_keys : {false, true}) {
        ExpectAgreement(MakeStageProblem(
            SmallConfig(), {0, 701},
            {.dtype = dtype, .gate_dtype = gate_dtype, .share_keys = share_keys}, 1));
      }
    }
  }
}

TEST_P(DecodeTest, GroupSizes) {
  for (int64_t group_size : {1, 3, 16, 24, 64, 130}) {
    ReferenceConfig config = SmallConfig();
    config.num_kv_heads = group_size > 16 ? 1 : 2;
    config.num_q_heads = config.num_kv_heads * group_size;
    ExpectAgreement(MakeStageProblem(config, {0, 900}, {.dtype = DType::kBF16}, 2));
  }
}

TEST_P(DecodeTest, HeadDims) {
  for (int64_t dk : {64, 128, 192, 256}) {
    for (int64_t dv : {64, 128, 192, 256}) {
      ReferenceConfig config = SmallConfig();
      config.head_dim_qk = dk;
      config.head_dim_v = dv;
      ExpectAgreement(MakeStageProblem(config, {0, 433}, {.dtype = DType::kF16}, 3));
    }
  }
}

TEST_P(DecodeTest, BlockSizes) {
  for (const ReferenceConfig& config : cpu::ConfigsOfBlockSizes()) {
    ExpectAgreement(MakeStageProblem(config, {0, 2611}, {.dtype = DType::kBF16}, 4),
                    {.num_decoded = 40, .new_tokens = 13});
  }
}

// Every token is decoded, from the first on; and rows without a token lie between.
TEST_P(DecodeTest, SequencesOfAnyLength) {
  ExpectAgreement(
      MakeStageProblem(SmallConfig(), {0, 1, 3, 34, 66, 163, 288}, {.dtype = DType::kBF16}, 5),
      {.num_decoded = 125, .new_tokens = 1, .with_empty_rows = true});
  ExpectAgreement(MakeStageProblem(SmallConfig(), {0, 100, 300, 2300}, {.dtype = DType::kF16}, 6),
                  {.num_decoded = 128, .new_tokens = 64, .with_empty_rows = true});
}

TEST_P(DecodeTest, WindowSizes) {
  for (const ReferenceConfig& config : cpu::ConfigsOfWindows()) {
    ExpectAgreement(MakeStageProblem(config, {0, 300, 500}, {.dtype = DType::kF16}, 7));
  }
}

TEST_P(DecodeTest, NumbersOfBlocks) {
  for (const ReferenceConfig& config : cpu::ConfigsOfBlockNumbers()) {
    ExpectAgreement(MakeStageProblem(config, {0, 900, 5300}, {.dtype = DType::kF16}, 8));
  }
}

// Several tiles a part, and scores that do not fit into shared memory.
TEST_P(DecodeTest, LongSequences) {
  ReferenceConfig config = SmallConfig();
  config.num_kv_heads = 1;
  config.compress_block_tokens = config.compress_stride_tokens = 16;
  config.select_block_tokens = 16;
  config.num_selected_blocks = 40;
  config.window_tokens = 9000;
  ExpectAgreement(MakeStageProblem(config, {0, 150003}, {.dtype = DType::kBF16}, 9));
}

TEST_P(DecodeTest, Compressors) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kWeighted,
                              CompressorKind::kLinear, CompressorKind::kMlp}) {
    for (bool per_head : {false, true}) {
      ReferenceConfig config = SmallConfig();
      config.head_dim_v = 128;
      config.compressor = kind;
      for (DType parameters : {DType::kF32, DType::kBF16, DType::kF16}) {
        ExpectAgreement(MakeStageProblem(config, {0, 300, 310, 700},
                                         {.dtype = DType::kF16,
                                          .parameter_dtype = parameters,
                                          .parameters_per_head = per_head,
                                          .hidden_width = 290},
                                         10),
                        {.num_decoded = 40, .new_tokens = 20});
      }
      ExpectAgreement(MakeStageProblem(config, {0, 300, 310, 400},
                                       {.dtype = DType::kBF16,
                                        .parameters_per_head = per_head,
                                        .with_pe = false,
                                        .hidden_width = 7},
                                       11));
    }
  }
}

TEST_P(DecodeTest, ExtremeLogits) {
  for (double scale : {100.0, 1000.0}) {
    const DecodeOutputs out =
        Run(MakeStageProblem(SmallConfig(), {0, 600}, {.dtype = DType::kBF16, .logit_scale = scale},
                             12),
            {});
    for (const Bytes* o : {&out.o, &out.o_cmp, &out.o_slc, &out.o_win}) {
      for (double x : test::Decode(DType::kBF16, *o)) ASSERT_TRUE(std::isfinite(x));
    }
  }
  ExpectAgreement(
      MakeStageProblem(SmallConfig(), {0, 600}, {.dtype = DType::kBF16, .logit_scale = 1e-30}, 13));
}

TEST_P(DecodeTest, RandomConfigurations) {
  test::Random random(14);
  for (int i = 0; i < 30; ++i) {
    SCOPED_TRACE(i);
    const ReferenceConfig config = test::RandomConfig({.max_head_dim = 256}, &random);
    const auto cu_seqlens = test::RandomDocuments(config, random.Int(1, 1500), 5, &random);
    const test::InputOptions options{.dtype = random.Pick({DType::kBF16, DType::kF16}),
                                     .parameter_dtype = random.Pick({DType::kF32, DType::kBF16}),
                                     .parameters_per_head = random.OneIn(2)};
    ExpectAgreement(MakeStageProblem(config, cu_seqlens, options, random.Next()),
                    {.num_decoded = random.Int(1, 40),
                     .new_tokens = random.Int(1, 20),
                     .with_empty_rows = random.OneIn(2)});
  }
}

// Nothing of the batch shows in a single bit.
TEST_P(DecodeTest, BatchesGiveTheSameBits) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kMlp}) {
    ReferenceConfig config = SmallConfig();
    config.compressor = kind;
    const StageProblem problem =
        MakeStageProblem(config, {0, 40, 311, 4771}, {.dtype = DType::kBF16}, 15);
    const DecodeOutputs expected = Run(problem, {.num_decoded = 36, .one_sequence_a_step = true});
    ExpectSameBits(expected, Run(problem, {.num_decoded = 36}));
    ExpectSameBits(expected, Run(problem, {.num_decoded = 36, .new_tokens = 12}));
    ExpectSameBits(expected,
                   Run(problem, {.num_decoded = 36, .new_tokens = 36, .with_empty_rows = true}));
  }
}

// One graph serves steps of other lengths and of fewer rows.
TEST_P(DecodeTest, GraphServesLaterSteps) {
  ReferenceConfig config = SmallConfig();
  config.num_q_heads = 32;
  const StageProblem problem =
      MakeStageProblem(config, {0, 200, 3200, 3900}, {.dtype = DType::kBF16}, 16);
  const Schedule schedule{.num_decoded = 70, .with_empty_rows = true};
  const DecodeOutputs expected = Run(problem, schedule);
  std::vector<int64_t> prefill;
  const auto steps = Steps(problem, schedule, prefill);
  DecodeCache cache(*kernels_, problem, 64);
  cache.Prefill(prefill);

  const int64_t num_rows = 6;
  auto stream = kernels_->CreateStream();
  ASSERT_TRUE(stream.ok());
  auto* const cuda_stream = static_cast<cudaStream_t>((*stream)->get());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_EQ(cache.Append(num_rows, cuda_stream), absl::OkStatus());
  ASSERT_EQ(cache.Attend(num_rows, cuda_stream), absl::OkStatus());
  ASSERT_EQ(cudaStreamEndCapture(cuda_stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  for (std::vector<DecodeRow> rows : steps) {
    rows.resize(num_rows, {-1, 0});
    cache.SetRows(rows);
    ASSERT_EQ(cudaGraphLaunch(exec, cuda_stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(cuda_stream), cudaSuccess);
    cache.Collect();
  }
  ExpectSameBits(expected, cache.results());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
}

TEST_P(DecodeTest, CopiesPieces) {
  test::Random random(17);
  for (int64_t num_bytes : {16, 48, 16384, 1 << 20}) {
    constexpr int64_t kCount = 5;
    DeviceCopy from(*kernels_, kCount * num_bytes, 0), to(*kernels_, kCount * num_bytes, kNaN);
    for (auto& byte : from.bytes()) byte = static_cast<Bytes::value_type>(random.Next());
    from.Upload();
    DeviceCopy src(*kernels_, kCount * sizeof(void*), 0), dst(*kernels_, kCount * sizeof(void*), 0);
    for (int64_t i = 0; i < kCount; ++i) {
      const char* const a = from.as<char>() + i * num_bytes;
      const char* const b = to.as<char>() + (kCount - 1 - i) * num_bytes;
      std::memcpy(src.bytes().data() + i * sizeof(a), &a, sizeof(a));
      std::memcpy(dst.bytes().data() + i * sizeof(b), &b, sizeof(b));
    }
    src.Upload();
    dst.Upload();
    ASSERT_EQ(
        kernels_->CopyPieces({src.as<const void*>(), dst.as<void*>(), kCount, num_bytes}, nullptr),
        absl::OkStatus());
    to.Download();
    for (int64_t i = 0; i < kCount; ++i) {
      EXPECT_TRUE(std::equal(from.bytes().begin() + i * num_bytes,
                             from.bytes().begin() + (i + 1) * num_bytes,
                             to.bytes().begin() + (kCount - 1 - i) * num_bytes));
    }
  }
}

}  // namespace
}  // namespace nsa::kernels::cuda
