// A rank that is killed or stopped in the middle of a forward or of a backward: the others end with
// an error that names it, in time, and nobody hangs.
#include <signal.h>

#include "comm/conformance/launch.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/testing/sharded.h"
#include "tests/testing/sharded_backward.h"
#include "tests/testing/ucx_ranks.h"

namespace nsa::test {
namespace {

using comm::conformance::FreePort;
using comm::conformance::Processes;
using comm::conformance::ProcessResult;
using ::testing::HasSubstr;

constexpr int kRanks = 4;
constexpr absl::Duration kTimeout = absl::Seconds(4);

enum Pass { kForward, kBackward };

struct Fault {
  Pass pass;
  int victim;
  const char* stage;  // of this pass; it strikes when the stage starts for the second time
  int signal;
};

class FaultsTest : public ::testing::TestWithParam<Fault> {};

TEST_P(FaultsTest, OthersNameTheRankInTime) {
  const Fault fault = GetParam();
  const Problem problem =
      RandomProblem({.num_q_heads = 4, .num_kv_heads = 2, .head_dim_qk = 64, .head_dim_v = 64},
                    {0, 2000}, {.dtype = DType::kBF16}, 5);
  const ShardPlan plan = *ShardPlan::Parse("zigzag", 2000, kRanks);
  GlobalOutputs outputs(problem);
  GlobalGradients gradients(problem, kRanks, DType::kF32);
  const int port = FreePort();
  const absl::Time begin = absl::Now();
  Processes processes(kRanks, [&](int rank) -> absl::Status {
    auto communicator = MakeUcxRank(rank, kRanks, port, {.timeout = kTimeout});
    if (!communicator.ok()) return communicator.status();
    auto kernels = kernels::CpuKernels::Create({.num_threads = 1});
    if (!kernels.ok()) return kernels.status();
    RunOptions options;
    // One halo for all branches: a rank's neighbours then go on to calls in which all wait for it.
    options.share_kv = true;
    int times = 0;
    options.on_stage = [&](absl::string_view stage) {
      if (rank == fault.victim && stage == fault.stage && ++times == 2) raise(fault.signal);
    };
    constexpr int kNumCalls = 1000;  // nobody gets that far
    if (fault.pass == kForward) {
      options.num_forwards = kNumCalls;
      return RunRank(problem, plan, options, *std::move(communicator), *std::move(kernels),
                     &outputs);
    }
    // Any numbers will do for d_o: q has its shape.
    return RunRankBackward(problem, /*d_o=*/problem.inputs.q, plan, options,
                           {.num_accumulated = kNumCalls}, *std::move(communicator),
                           *std::move(kernels), &outputs, &gradients);
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

std::string NameOf(const ::testing::TestParamInfo<Fault>& info) {
  const Fault& fault = info.param;
  std::string name = std::string(fault.signal == SIGKILL ? "Killed" : "Stopped") + "_" +
                     std::to_string(fault.victim) + "_at_" + fault.stage;
  for (char& c : name) c = std::isalnum(static_cast<unsigned char>(c)) ? c : '_';
  return name;
}

INSTANTIATE_TEST_SUITE_P(Forward, FaultsTest,
                         ::testing::Values(Fault{kForward, 2, "agree", SIGKILL},
                                           Fault{kForward, 2, "halo", SIGKILL},
                                           Fault{kForward, 0, "compress", SIGKILL},
                                           Fault{kForward, 3, "all-gather", SIGKILL},
                                           Fault{kForward, 1, "window", SIGKILL},
                                           Fault{kForward, 0, "fetch", SIGKILL},
                                           Fault{kForward, 2, "attend+gate", SIGKILL},
                                           Fault{kForward, 2, "halo", SIGSTOP},
                                           Fault{kForward, 0, "all-gather", SIGSTOP},
                                           Fault{kForward, 1, "fetch", SIGSTOP}),
                         NameOf);

INSTANTIATE_TEST_SUITE_P(Backward, FaultsTest,
                         ::testing::Values(Fault{kBackward, 2, "gate backward", SIGKILL},
                                           Fault{kBackward, 1, "window backward", SIGKILL},
                                           Fault{kBackward, 0, "selected backward", SIGKILL},
                                           Fault{kBackward, 3, "return blocks", SIGKILL},
                                           Fault{kBackward, 2, "compressed backward", SIGKILL},
                                           Fault{kBackward, 0, "reduce summaries", SIGKILL},
                                           Fault{kBackward, 1, "compress backward", SIGKILL},
                                           Fault{kBackward, 3, "halo backward", SIGKILL},
                                           Fault{kBackward, 0, "selected backward", SIGSTOP},
                                           Fault{kBackward, 2, "return blocks", SIGSTOP},
                                           Fault{kBackward, 1, "reduce summaries", SIGSTOP},
                                           Fault{kBackward, 3, "halo backward", SIGSTOP}),
                         NameOf);

}  // namespace
}  // namespace nsa::test
