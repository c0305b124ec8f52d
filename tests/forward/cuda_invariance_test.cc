// What must not show in a single bit of a forward on a GPU: how often it ran, what ran before or
// beside it, how its tensors lie, and what else was asked for.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "tests/forward/cuda_testing.h"
#include "tests/testing/compare.h"

namespace nsa::test {
namespace {

using reference::CompressorKind;
using reference::ReferenceConfig;

// Of heads and dims with kernels of their own, and of others.
std::vector<Problem> Problems() {
  const ReferenceConfig fast = {
      .num_q_heads = 32, .num_kv_heads = 2, .head_dim_qk = 128, .head_dim_v = 128};
  const ReferenceConfig mixed = {.num_q_heads = 10,
                                 .num_kv_heads = 2,
                                 .head_dim_qk = 192,
                                 .head_dim_v = 128,
                                 .compress_block_tokens = 64,
                                 .num_selected_blocks = 8,
                                 .window_tokens = 300,
                                 .compressor = CompressorKind::kWeighted};
  const ReferenceConfig other = {.num_q_heads = 6,
                                 .num_kv_heads = 3,
                                 .head_dim_qk = 64,
                                 .head_dim_v = 256,
                                 .select_block_tokens = 80,
                                 .num_selected_blocks = 6,
                                 .window_tokens = 77,
                                 .compressor = CompressorKind::kMlp};
  // Each with a tile of keys that does not lie in one piece, right after one that does.
  std::vector<int64_t> short_documents = {0};
  while (short_documents.back() < 6000) short_documents.push_back(short_documents.back() + 100);
  return {RandomProblem(fast, {0, 20, 3000, 6000}, {.dtype = DType::kBF16}, 1),
          RandomProblem(fast, short_documents, {.dtype = DType::kBF16}, 4),
          RandomProblem(mixed, {0, 1000, 3500}, {.dtype = DType::kF16}, 2),
          RandomProblem(other, {0, 31, 1800}, {.dtype = DType::kBF16}, 3)};
}

// Every value of every tensor is NaN.
Problem NanProblem(Problem problem) {
  EncodedInputs& in = problem.inputs;
  for (Bytes* bytes :
       {&in.q, &in.k_cmp, &in.v_cmp, &in.k_slc, &in.v_slc, &in.k_win, &in.v_win, &in.gate}) {
    std::fill(bytes->begin(), bytes->end(), std::byte{0xff});
  }
  return problem;
}

class CudaInvarianceTest : public CudaRankTest {
 protected:
  // One call of an engine of its own, on poisoned outputs.
  std::unique_ptr<GlobalOutputs> RunOnce(const Problem& problem, const RunOptions& options = {}) {
    auto outputs = std::make_unique<GlobalOutputs>(problem);
    const absl::Status status =
        RunRank(problem, OneRank(problem), options, NewCommunicator(), kernels_, outputs.get());
    EXPECT_TRUE(status.ok()) << status;
    return outputs;
  }

  // Another call.
  absl::Status RunAgain(RankForward& forward, void* stream, GlobalOutputs* outputs) {
    if (absl::Status status = forward.Poison(); !status.ok()) return status;
    if (absl::Status status = forward.Run(stream); !status.ok()) return status;
    if (absl::Status status = kernels_->Synchronize(stream); !status.ok()) return status;
    return forward.CopyTo(outputs);
  }
};

TEST_F(CudaInvarianceTest, EveryRunGivesTheSameBits) {
  for (const Problem& problem : Problems()) {
    const auto expected = RunOnce(problem);
    const auto forward = NewForward(problem);
    ASSERT_NE(forward, nullptr);
    for (int i = 0; i < 10; ++i) {
      GlobalOutputs actual(problem);
      const absl::Status status = RunAgain(*forward, nullptr, &actual);
      ASSERT_TRUE(status.ok()) << status;
      ASSERT_TRUE(SameOutputs(problem, *expected, actual)) << "run " << i;
    }
  }
}

// A call leaves NaN in all of the workspace that holds values; none gets into the next one.
TEST_F(CudaInvarianceTest, NothingOfTheCallBeforeShows) {
  for (const Problem& problem : Problems()) {
    const auto expected = RunOnce(problem);
    const auto forward = NewForward(NanProblem(problem));
    ASSERT_NE(forward, nullptr);
    GlobalOutputs actual(problem);
    absl::Status status = RunAgain(*forward, nullptr, &actual);
    ASSERT_TRUE(status.ok()) << status;
    status = forward->Load(problem);
    ASSERT_TRUE(status.ok()) << status;
    status = RunAgain(*forward, nullptr, &actual);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_TRUE(SameOutputs(problem, *expected, actual));
  }
}

TEST_F(CudaInvarianceTest, StridesDoNotShow) {
  Random random(4);
  for (const Problem& problem : Problems()) {
    const auto expected = RunOnce(problem);
    for (int i = 0; i < 3; ++i) {
      const RunOptions options = {.row_padding = 8 * random.Int(0, 20),
                                  .head_padding = 8 * random.Int(1, 20)};
      SCOPED_TRACE(testing::Message() << options.row_padding << " " << options.head_padding);
      EXPECT_TRUE(SameOutputs(problem, *expected, *RunOnce(problem, options)));
    }
  }
}

// Without a place of their own, the branches wait in the workspace and in o.
TEST_F(CudaInvarianceTest, AskingForNothingButODoesNotShow) {
  for (const Problem& problem : Problems()) {
    const auto expected = RunOnce(problem), actual = RunOnce(problem, {.only_o = true});
    EXPECT_TRUE(
        SameBits("o", problem.input_options.dtype,
                 {problem.num_tokens(), problem.config.num_q_heads, problem.config.head_dim_v},
                 expected->data(GlobalOutputs::kO), actual->data(GlobalOutputs::kO)));
  }
}

TEST_F(CudaInvarianceTest, EnginesOnStreamsOfTheirOwnDoNotShow) {
  const std::vector<Problem> problems = Problems();
  std::vector<std::unique_ptr<GlobalOutputs>> expected;
  std::vector<std::unique_ptr<RankForward>> forwards;
  for (const Problem& problem : problems) {
    expected.push_back(RunOnce(problem));
    forwards.push_back(NewForward(problem));
    ASSERT_NE(forwards.back(), nullptr);
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < problems.size(); ++i) {
    threads.emplace_back([&, i] {
      cudaStream_t stream;
      ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
      for (int run = 0; run < 10; ++run) {
        GlobalOutputs actual(problems[i]);
        const absl::Status status = RunAgain(*forwards[i], stream, &actual);
        EXPECT_TRUE(status.ok()) << status;
        EXPECT_TRUE(SameOutputs(problems[i], *expected[i], actual)) << "run " << run;
      }
      EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace nsa::test
