// The backward by ranks as processes with a GPU each, over NCCL: dq and dgate are those of one rank
// bit for bit, the other gradients up to the order of sums; and a second run gives the same bits.
#include <cuda_runtime_api.h>

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
#include "tests/testing/compare.h"
#include "tests/testing/gradient_check.h"
#include "tests/testing/local_tensor.h"
#include "tests/testing/sharded_backward.h"

namespace nsa::test {
namespace {

using comm::conformance::FreePort;
using comm::conformance::RunOnProcesses;
using G = GlobalGradients;

constexpr absl::Duration kLimit = absl::Seconds(120);  // of a group of processes
constexpr int64_t kOneKvHead = 79;                     // records: of two kv heads those of one fit

Problem TestProblem() {
  return RandomProblem(
      {.num_q_heads = 32, .num_kv_heads = 2, .head_dim_qk = 128, .head_dim_v = 128},
      {0, 500, 501, 6000}, {.dtype = DType::kBF16}, 1);
}

struct Variant {
  std::string sharding;
  bool use_windows = true;
  int64_t budget_records = 10000;
  bool keep_summaries = true;

  std::string Name() const {
    return absl::StrCat(sharding, use_windows ? " " : " in copies ", budget_records,
                        keep_summaries ? "" : ", summaries again");
  }
};

std::vector<Variant> Variants() {
  return {{"contiguous"},
          {"zigzag"},
          {"zigzag"},  // must be the same bits again
          {"zigzag-per-document"},
          {"zigzag", false},
          {"contiguous", true, kOneKvHead, false},
          {"contiguous", false, kOneKvHead}};
}

absl::Status RunVariant(const Problem& problem, const Bytes& d_o, const Variant& variant, int rank,
                        int size, int port, G* gradients) {
  comm::NcclOptions nccl_options;
  nccl_options.use_windows = variant.use_windows;
  auto communicator = comm::nccl::CreateOnThisHost(variant.Name(), rank, size, port, nccl_options);
  if (!communicator.ok()) return communicator.status();
  auto kernels = kernels::CudaKernels::Create({.device = comm::conformance::GpuOfRank(rank)});
  if (!kernels.ok()) return kernels.status();
  const int64_t record_bytes = problem.config.select_block_tokens *
                               (problem.config.head_dim_qk + problem.config.head_dim_v) *
                               SizeOf(problem.input_options.dtype);
  const ShardPlan plan =
      *ShardPlan::Parse(variant.sharding, problem.num_tokens(), size, problem.cu_seqlens);
  GlobalOutputs outputs(problem);
  return RunRankBackward(
      problem, d_o, plan, {.fetch_budget_bytes = variant.budget_records * record_bytes},
      {.gradient_dtype = gradients->dtype(), .keep_summaries = variant.keep_summaries},
      *std::move(communicator), *std::move(kernels), &outputs, gradients);
}

TEST(CudaBackwardProcessTest, GradientsAreThoseOfOneRank) {
  const int num_ranks = comm::conformance::CountGpuRanks();
  if (num_ranks < 1) GTEST_SKIP() << "this host has no GPU";
  const Problem problem =
      RandomProblem({.num_q_heads = 32, .num_kv_heads = 2, .head_dim_qk = 128, .head_dim_v = 128},
                    {0, 500, 501, 6000}, {.dtype = DType::kBF16}, 1);
  Random random(2);
  const Bytes d_o = Encode(DType::kBF16, RandomOutputGradients(problem, &random));
  const std::vector<Variant> variants = Variants();
  std::unique_ptr<G> one;
  for (int size : std::set<int>{1, 2, 3, 4, num_ranks}) {
    if (size > num_ranks) continue;
    std::vector<std::unique_ptr<G>> gradients;
    for (size_t i = 0; i < variants.size(); ++i) {
      gradients.push_back(std::make_unique<G>(problem, size, DType::kF32));
    }
    const int port = FreePort();
    const absl::Status status = RunOnProcesses(
        size,
        [&](int rank) -> absl::Status {
          for (size_t i = 0; i < variants.size(); ++i) {
            absl::Status status =
                RunVariant(problem, d_o, variants[i], rank, size, port, gradients[i].get());
            if (!status.ok()) {
              return absl::Status(status.code(),
                                  absl::StrCat(variants[i].Name(), ": ", status.message()));
            }
          }
          return absl::OkStatus();
        },
        kLimit);
    ASSERT_TRUE(status.ok()) << size << " ranks: " << status;
    if (one == nullptr) one = std::move(gradients[0]);
    for (int f = 0; f < G::kNumFields; ++f) {
      const auto field = static_cast<G::Field>(f);
      const auto same = [&](const G& a, const G& b) {
        return SameBits(G::Name(field), DType::kF32, a.shape(field), a.data(field), b.data(field));
      };
      EXPECT_TRUE(same(*gradients[1], *gradients[2])) << "again on " << size << " ranks";
      for (size_t i = 0; i < variants.size(); ++i) {
        if (gradients[i] == nullptr) continue;
        SCOPED_TRACE(absl::StrCat(variants[i].Name(), " on ", size, " ranks"));
        if (field == G::kDq || field == G::kDgate) {
          EXPECT_TRUE(same(*one, *gradients[i]));
        }
        EXPECT_LE(RelativeL2(one->Values(field), gradients[i]->Values(field)), 1e-3)
            << G::Name(field);
      }
    }
  }
}

// dq [T,Hq,Dk] of a step, forward and backward, by a call and by two replays of one that was
// captured.
absl::Status CallAndReplay(const Problem& problem, const Bytes& d_o, int rank, int size, int port) {
  auto communicator = comm::nccl::CreateOnThisHost("graph", rank, size, port, {});
  if (!communicator.ok()) return communicator.status();
  auto created = kernels::CudaKernels::Create({.device = comm::conformance::GpuOfRank(rank)});
  if (!created.ok()) return created.status();
  const std::shared_ptr<kernels::Kernels> kernels = *std::move(created);
  const ShardPlan plan =
      *ShardPlan::Parse("zigzag", problem.num_tokens(), size, problem.cu_seqlens);
  auto forward = RankForward::Create(problem, plan, {.only_o = true, .has_backward = true},
                                     *std::move(communicator), kernels);
  if (!forward.ok()) return forward.status();
  Engine& engine = (*forward)->engine();
  const std::vector<int64_t>& rows = (*forward)->rows();
  const auto tokens = static_cast<int64_t>(rows.size());
  const int64_t hq = problem.config.num_q_heads;
  auto local_d_o =
      LocalTensor::Create(*kernels, DType::kBF16, {tokens, hq, problem.config.head_dim_v});
  auto dq = LocalTensor::Create(*kernels, DType::kF32, {tokens, hq, problem.config.head_dim_qk});
  auto saved = engine.CreateSavedForward();
  for (const absl::Status& status : {local_d_o.status(), dq.status(), saved.status()}) {
    if (!status.ok()) return status;
  }
  absl::Status status = local_d_o->Load(*kernels, d_o.data(), rows);
  if (!status.ok()) return status;
  Gradients gradients;
  gradients.dq = dq->view();
  cudaStream_t stream;
  NSA_COMM_CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const auto step = [&]() -> absl::Status {
    absl::Status s =
        engine.Forward((*forward)->inputs(), (*forward)->outputs(), stream, saved->get());
    if (!s.ok()) return s;
    return engine.Backward((*forward)->inputs(), local_d_o->view(), **saved, gradients, stream);
  };
  const int64_t dq_bytes = problem.num_tokens() * hq * problem.config.head_dim_qk * 4;
  const auto run = [&](auto&& enqueue, Bytes* result) -> absl::Status {
    absl::Status s = dq->Poison(*kernels);
    if (s.ok()) s = enqueue();
    if (!s.ok()) return s;
    NSA_COMM_CUDA_OK(cudaStreamSynchronize(stream));
    result->resize(dq_bytes);
    return dq->Store(*kernels, result->data(), rows);
  };
  Bytes called, replayed;
  status = run(step, &called);
  if (!status.ok()) return status;
  NSA_COMM_CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  status = step();
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
  if (!status.ok()) return status;
  NSA_COMM_CUDA_OK(ended);
  cudaGraphExec_t executable = nullptr;
  NSA_COMM_CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  for (int i = 0; i < 2 && status.ok(); ++i) {
    status = run(
        [&]() -> absl::Status {
          NSA_COMM_CUDA_OK(cudaGraphLaunch(executable, stream));
          return absl::OkStatus();
        },
        &replayed);
    if (status.ok() && replayed != called) status = absl::InternalError("a replay's dq differs");
  }
  NSA_COMM_CUDA_OK(cudaGraphExecDestroy(executable));
  NSA_COMM_CUDA_OK(cudaGraphDestroy(graph));
  NSA_COMM_CUDA_OK(cudaStreamDestroy(stream));
  return status;
}

TEST(CudaBackwardGraphTest, ReplaysOfAStepGiveTheBitsOfACall) {
  const int num_ranks = comm::conformance::CountGpuRanks();
  if (num_ranks < 1) GTEST_SKIP() << "this host has no GPU";
  const Problem problem = TestProblem();
  Random random(2);
  const Bytes d_o = Encode(DType::kBF16, RandomOutputGradients(problem, &random));
  for (int size : std::set<int>{1, num_ranks}) {
    const int port = FreePort();
    const absl::Status status = RunOnProcesses(
        size, [&](int rank) { return CallAndReplay(problem, d_o, rank, size, port); }, kLimit);
    EXPECT_TRUE(status.ok()) << size << " ranks: " << status;
  }
}

}  // namespace
}  // namespace nsa::test
