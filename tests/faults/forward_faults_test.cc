// A rank that is killed or stopped in the middle of a forward: the others end with an error that
// names it, in time, and nobody hangs.
#include <signal.h>

#include "comm/conformance/launch.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/testing/sharded.h"
#include "tests/testing/ucx_ranks.h"

namespace nsa::test {
namespace {

using comm::conformance::FreePort;
using comm::conformance::Processes;
using comm::conformance::ProcessResult;
using ::testing::HasSubstr;

constexpr int kRanks = 4;
constexpr absl::Duration kTimeout = absl::Seconds(4);

struct Fault {
  int victim;
  const char* stage;  // at whose start in the second forward it strikes
  int signal;
};

class ForwardFaultsTest : public ::testing::TestWithParam<Fault> {};

TEST_P(ForwardFaultsTest, OthersNameTheRankInTime) {
  const Fault fault = GetParam();
  const Problem problem =
      RandomProblem({.num_q_heads = 4, .num_kv_heads = 2, .head_dim_qk = 64, .head_dim_v = 64},
                    {0, 2000}, {.dtype = DType::kBF16}, 5);
  const ShardPlan plan = *ShardPlan::Parse("zigzag", 2000, kRanks);
  GlobalOutputs outputs(problem);
  const int port = FreePort();
  const absl::Time begin = absl::Now();
  Processes processes(kRanks, [&](int rank) -> absl::Status {
    auto communicator = MakeUcxRank(rank, kRanks, port, {.timeout = kTimeout});
    if (!communicator.ok()) return communicator.status();
    auto kernels = kernels::CpuKernels::Create({.num_threads = 1});
    if (!kernels.ok()) return kernels.status();
    RunOptions options;
    options.num_forwards = 1000;  // nobody gets that far
    int times = 0;
    options.on_stage = [&](absl::string_view stage) {
      if (rank == fault.victim && stage == fault.stage && ++times == 2) raise(fault.signal);
    };
    return RunRank(problem, plan, options, *std::move(communicator), *std::move(kernels), &outputs);
  });
  if (fault.signal == SIGSTOP) {
    // The others are done after the deadline; then the stopped one may go.
    absl::SleepFor(kTimeout + absl::Seconds(3));
    processes.Signal(fault.victim, SIGKILL);
  }
  const std::vector<ProcessResult> results = processes.Join();
  EXPECT_LT(absl::Now() - begin, kTimeout + absl::Seconds(10));
  const std::string victim = "rank " + std::to_string(fault.victim);
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank == fault.victim) continue;
    SCOPED_TRACE(testing::Message() << "rank " << rank);
    const ProcessResult& result = results[rank];
    ASSERT_TRUE(result.exited) << "killed by signal " << result.signal;
    EXPECT_LT(result.run_time, kTimeout + absl::Seconds(5));
    const std::string message(result.status.message());
    EXPECT_THAT(message, HasSubstr(victim));
    if (fault.signal == SIGKILL) {
      EXPECT_EQ(result.status.code(), absl::StatusCode::kUnavailable) << result.status;
    } else {
      EXPECT_EQ(result.status.code(), absl::StatusCode::kDeadlineExceeded) << result.status;
      // Who waited for whom; a rank that did not wait itself hears it from one that did.
      EXPECT_THAT(message, ::testing::ContainsRegex("rank [0-9] waited .* for .*" + victim));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Stages, ForwardFaultsTest,
    ::testing::Values(Fault{2, "agree", SIGKILL}, Fault{2, "halo", SIGKILL},
                      Fault{0, "compress", SIGKILL}, Fault{3, "all-gather", SIGKILL},
                      Fault{1, "window", SIGKILL}, Fault{0, "fetch", SIGKILL},
                      Fault{2, "attend+gate", SIGKILL}, Fault{2, "halo", SIGSTOP},
                      Fault{0, "all-gather", SIGSTOP}, Fault{1, "fetch", SIGSTOP}),
    [](const auto& info) {
      std::string name = std::string(info.param.signal == SIGKILL ? "Killed" : "Stopped") + "_" +
                         std::to_string(info.param.victim) + "_at_" + info.param.stage;
      for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
      return name;
    });

}  // namespace
}  // namespace nsa::test
