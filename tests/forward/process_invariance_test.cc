// Processes over UCX compute the same bits as one rank of one process.
#include "comm/conformance/launch.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/testing/sharded.h"
#include "tests/testing/ucx_ranks.h"

namespace nsa::test {
namespace {

using comm::conformance::FreePort;
using comm::conformance::RunOnProcesses;

Problem TestProblem() {
  return RandomProblem({.num_q_heads = 8,
                        .num_kv_heads = 2,
                        .head_dim_qk = 64,
                        .head_dim_v = 64,
                        .num_selected_blocks = 6,
                        .window_tokens = 100},
                       {0, 611, 1500}, {.dtype = DType::kBF16}, 21);
}

// By UCX_TLS: shared memory as UCX chooses, and TCP alone as between hosts.
class ProcessInvarianceTest : public ::testing::TestWithParam<const char*> {};

TEST_P(ProcessInvarianceTest, SameBitsAsOneRank) {
  const Problem problem = TestProblem();
  GlobalOutputs expected(problem);
  // On processes too: nothing may have started a thread before a fork.
  const ShardPlan one = *ShardPlan::Parse("contiguous", 1500, 1, problem.cu_seqlens);
  absl::Status status =
      RunOnProcesses(1, [&](int) { return RunLoopback(problem, one, {}, &expected); });
  ASSERT_TRUE(status.ok()) << status;

  for (int num_ranks : {1, 2, 4}) {
    for (const char* sharding : {"contiguous", "zigzag", "uneven"}) {
      SCOPED_TRACE(testing::Message() << sharding << " on " << num_ranks << " processes");
      const std::string uneven = num_ranks == 1   ? "1500"
                                 : num_ranks == 2 ? "1,1499"
                                                  : "700,0,33,767";
      const ShardPlan plan =
          *ShardPlan::Parse(std::string(sharding) == "uneven" ? uneven : sharding, 1500, num_ranks,
                            problem.cu_seqlens);
      GlobalOutputs actual(problem);
      const int port = FreePort();
      status = RunOnProcesses(num_ranks, [&](int rank) -> absl::Status {
        auto communicator = MakeUcxRank(rank, num_ranks, port, {.tls = GetParam()});
        if (!communicator.ok()) return communicator.status();
        auto kernels = kernels::CpuKernels::Create({.num_threads = 1});
        if (!kernels.ok()) return kernels.status();
        RunOptions options;
        options.num_forwards = 2;
        return RunRank(problem, plan, options, *std::move(communicator), *std::move(kernels),
                       &actual);
      });
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_TRUE(SameOutputs(problem, expected, actual));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Transports, ProcessInvarianceTest, ::testing::Values("", "tcp,self"),
                         [](const auto& info) {
                           return std::string(info.param).empty() ? "Chosen" : "Tcp";
                         });

}  // namespace
}  // namespace nsa::test
