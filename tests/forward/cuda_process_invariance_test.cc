// Ranks as processes with a GPU each, over NCCL, compute the same bits as one rank, with as many
// GPUs as there are; and a captured forward the same as a call.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/conformance/gpus.h"
#include "comm/conformance/launch.h"
#include "comm/cuda_status.h"
#include "comm/nccl/test_group.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/testing/sharded.h"

namespace nsa::test {
namespace {

using comm::conformance::FreePort;
using comm::conformance::RunOnProcesses;

constexpr absl::Duration kLimit = absl::Seconds(120);  // of a group of processes

Problem TestProblem(uint64_t seed) {
  return RandomProblem(
      {.num_q_heads = 32, .num_kv_heads = 2, .head_dim_qk = 128, .head_dim_v = 128},
      {0, 500, 501, 6000}, {.dtype = DType::kBF16}, seed);
}

ShardPlan Plan(const Problem& problem, const std::string& sharding, int num_ranks) {
  std::string lengths = sharding;
  if (sharding == "uneven") {
    // Half of what is left, and nothing for every third rank.
    int64_t left = problem.num_tokens();
    lengths.clear();
    for (int rank = 0; rank + 1 < num_ranks; ++rank) {
      const int64_t length = rank % 3 == 1 ? 0 : left / 2 + 7;
      absl::StrAppend(&lengths, length, ",");
      left -= length;
    }
    absl::StrAppend(&lengths, left);
  }
  return *ShardPlan::Parse(lengths, problem.num_tokens(), num_ranks, problem.cu_seqlens);
}

// Fetch budgets of TestProblem in contiguous chunks, in records: of one query, so that queries go
// in pieces, and of the remote blocks of one kv head, not of both.
constexpr int64_t kOneQuery = 16 * 2;
constexpr int64_t kOneKvHead = 79;

int64_t RecordBytes(const Problem& problem) {
  return problem.config.select_block_tokens *
         (problem.config.head_dim_qk + problem.config.head_dim_v) *
         SizeOf(problem.input_options.dtype);
}

// What may not show in bits.
struct Variant {
  std::string sharding;
  bool use_windows = true;
  int64_t budget_records = 10000;
  int min_pieces = 1;  // of some rank, when there are several

  std::string Name() const {
    return absl::StrCat(sharding, use_windows ? " " : " in copies ", budget_records);
  }
};

std::vector<Variant> Variants() {
  return {{"contiguous"},
          {"zigzag"},
          {"zigzag-per-document"},
          {"uneven"},
          {"zigzag", false},
          {"uneven", false},
          {"contiguous", true, kOneQuery, 10},
          {"zigzag", false, kOneQuery, 10},
          {"contiguous", true, kOneKvHead, 2},
          {"contiguous", false, kOneKvHead, 2}};
}

absl::Status RunVariant(const Problem& problem, const Variant& variant, int rank, int size,
                        int port, GlobalOutputs* outputs) {
  comm::NcclOptions nccl_options;
  nccl_options.use_windows = variant.use_windows;
  auto communicator = comm::nccl::CreateOnThisHost(variant.Name(), rank, size, port, nccl_options);
  if (!communicator.ok()) return communicator.status();
  auto kernels = kernels::CudaKernels::Create({.device = comm::conformance::GpuOfRank(rank)});
  if (!kernels.ok()) return kernels.status();
  const RunOptions options = {.fetch_budget_bytes = variant.budget_records * RecordBytes(problem),
                              .row_padding = 8,
                              .num_forwards = 2};
  ForwardStats stats;
  absl::Status status = RunRank(problem, Plan(problem, variant.sharding, size), options,
                                *std::move(communicator), *std::move(kernels), outputs, &stats);
  if (!status.ok() || size == 1) return status;
  int most_pieces = 0;
  for (const RankStats& of_rank : stats.ranks()) {
    most_pieces = std::max(most_pieces, of_rank.query_pieces());
  }
  if (most_pieces >= variant.min_pieces) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(most_pieces, " pieces, where ", variant.min_pieces, " were to be tested"));
}

TEST(CudaProcessInvarianceTest, SameBitsAsOneRank) {
  const int num_ranks = comm::conformance::CountGpuRanks();
  if (num_ranks < 1) GTEST_SKIP() << "this host has no GPU";
  const Problem problem = TestProblem(1);
  const std::vector<Variant> variants = Variants();
  std::unique_ptr<GlobalOutputs> one;
  for (int size : std::set<int>{1, 2, 3, 4, num_ranks}) {
    if (size > num_ranks) continue;
    std::vector<std::unique_ptr<GlobalOutputs>> outputs;
    for (size_t i = 0; i < variants.size(); ++i) {
      outputs.push_back(std::make_unique<GlobalOutputs>(problem));
    }
    const int port = FreePort();
    const absl::Status status = RunOnProcesses(
        size,
        [&](int rank) -> absl::Status {
          for (size_t i = 0; i < variants.size(); ++i) {
            absl::Status status =
                RunVariant(problem, variants[i], rank, size, port, outputs[i].get());
            if (!status.ok()) {
              return absl::Status(status.code(),
                                  absl::StrCat(variants[i].Name(), ": ", status.message()));
            }
          }
          return absl::OkStatus();
        },
        kLimit);
    ASSERT_TRUE(status.ok()) << size << " ranks: " << status;
    if (one == nullptr) one = std::move(outputs[0]);
    for (size_t i = 0; i < variants.size(); ++i) {
      if (outputs[i] == nullptr) continue;
      EXPECT_TRUE(SameOutputs(problem, *one, *outputs[i]))
          << variants[i].Name() << " on " << size << " ranks";
    }
  }
}

// Runs the problems by calls, then by replays of one call that was captured.
absl::Status CallAndReplay(const std::vector<Problem>& problems, int rank, int size, int port,
                           const std::vector<std::unique_ptr<GlobalOutputs>>& called,
                           const std::vector<std::unique_ptr<GlobalOutputs>>& replayed) {
  auto communicator = comm::nccl::CreateOnThisHost("graph", rank, size, port, {});
  if (!communicator.ok()) return communicator.status();
  auto kernels = kernels::CudaKernels::Create({.device = comm::conformance::GpuOfRank(rank)});
  if (!kernels.ok()) return kernels.status();
  const RunOptions options = {.fetch_budget_bytes = kOneKvHead * RecordBytes(problems[0])};
  auto forward = RankForward::Create(problems[0], Plan(problems[0], "contiguous", size), options,
                                     *std::move(communicator), *std::move(kernels));
  if (!forward.ok()) return forward.status();
  cudaStream_t stream;
  NSA_COMM_CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto run_all = [&](const auto& run, const auto& outputs) -> absl::Status {
    for (size_t i = 0; i < problems.size(); ++i) {
      absl::Status status = (*forward)->Load(problems[i]);
      if (status.ok()) status = (*forward)->Poison();
      if (status.ok()) status = run();
      if (!status.ok()) return status;
      NSA_COMM_CUDA_OK(cudaStreamSynchronize(stream));
      status = (*forward)->CopyTo(outputs[i].get());
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  };
  absl::Status status = run_all([&] { return (*forward)->Run(stream); }, called);
  if (!status.ok()) return status;

  NSA_COMM_CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  status = (*forward)->Run(stream);
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
  if (!status.ok()) return status;
  NSA_COMM_CUDA_OK(ended);
  cudaGraphExec_t executable = nullptr;
  NSA_COMM_CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  status = run_all(
      [&]() -> absl::Status {
        NSA_COMM_CUDA_OK(cudaGraphLaunch(executable, stream));
        return absl::OkStatus();
      },
      replayed);
  NSA_COMM_CUDA_OK(cudaGraphExecDestroy(executable));
  NSA_COMM_CUDA_OK(cudaGraphDestroy(graph));
  NSA_COMM_CUDA_OK(cudaStreamDestroy(stream));
  return status;
}

TEST(CudaGraphTest, ReplaysGiveTheBitsOfCalls) {
  const int num_ranks = comm::conformance::CountGpuRanks();
  if (num_ranks < 1) GTEST_SKIP() << "this host has no GPU";
  const std::vector<Problem> problems = {TestProblem(1), TestProblem(2), TestProblem(3)};
  for (int size : std::set<int>{1, num_ranks}) {
    std::vector<std::unique_ptr<GlobalOutputs>> called, replayed;
    for (const Problem& problem : problems) {
      called.push_back(std::make_unique<GlobalOutputs>(problem));
      replayed.push_back(std::make_unique<GlobalOutputs>(problem));
    }
    const int port = FreePort();
    const absl::Status status = RunOnProcesses(
        size, [&](int rank) { return CallAndReplay(problems, rank, size, port, called, replayed); },
        kLimit);
    ASSERT_TRUE(status.ok()) << size << " ranks: " << status;
    for (size_t i = 0; i < problems.size(); ++i) {
      EXPECT_TRUE(SameOutputs(problems[i], *called[i], *replayed[i]))
          << "replay " << i << " on " << size << " ranks";
    }
  }
}

}  // namespace
}  // namespace nsa::test
