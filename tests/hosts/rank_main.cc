// One rank of a forward over several hosts, started as a user starts it. Computes the same on one
// rank by itself and compares its rows bit for bit.
//
// With --forwards=N it says "forward I" before each of N forwards, and with --backwards=N "backward
// I" in each of N backwards, so that a test may cut a link in the middle. The last line of output
// is "rank R: OK" or "rank R: <status>".
#include <cstdlib>
#include <cstring>
#include <iostream>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "tests/testing/sharded.h"
#include "tests/testing/sharded_backward.h"
#include "tools/launch/flags.h"
#include "tools/launch/launch.h"

ABSL_FLAG(int, forwards, 1, "how many forwards to run");
ABSL_FLAG(int, backwards, 0, "how many backwards to run, after the forwards have been compared");
ABSL_FLAG(std::string, sharding, "zigzag", "see ShardPlan::Parse");

namespace nsa::test {
namespace {

// The rows of other ranks are not here: those of `expected` stand in for them.
void CopyRowsOfOthers(const ShardPlan& plan, int rank, const GlobalOutputs& expected,
                      GlobalOutputs& actual) {
  for (const Chunk& chunk : plan.chunks()) {
    if (chunk.rank == rank) continue;
    for (int i = 0; i < GlobalOutputs::kNumFields; ++i) {
      const auto field = static_cast<GlobalOutputs::Field>(i);
      const int64_t row_bytes = expected.row_bytes(field);
      std::memcpy(actual.data(field) + chunk.begin * row_bytes,
                  expected.data(field) + chunk.begin * row_bytes, chunk.num_tokens * row_bytes);
    }
  }
}

absl::Status RunAndCompare(const tools::RankContext& context) {
  const int rank = context.communicator->rank();
  const std::vector<int64_t> cu_seqlens = {0, 900, 4000};
  const Problem problem =
      RandomProblem({.num_q_heads = 8, .num_kv_heads = 2, .head_dim_qk = 64, .head_dim_v = 64},
                    cu_seqlens, {.dtype = DType::kBF16}, 11);
  auto plan = ShardPlan::Parse(absl::GetFlag(FLAGS_sharding), problem.num_tokens(),
                               context.communicator->size(), cu_seqlens);
  if (!plan.ok()) return plan.status();
  RunOptions options;
  options.num_forwards = absl::GetFlag(FLAGS_forwards);
  int forwards = 0;
  options.on_stage = [&forwards](absl::string_view stage) {
    if (stage == "agree") std::cout << absl::StrCat("forward ", forwards++, "\n") << std::flush;
  };
  GlobalOutputs actual(problem);
  absl::Status status =
      RunRank(problem, *plan, options, context.communicator, context.kernels, &actual);
  if (!status.ok()) return status;

  GlobalOutputs expected(problem);
  status = RunLoopback(
      problem, *ShardPlan::Parse("contiguous", problem.num_tokens(), 1, cu_seqlens), {}, &expected);
  if (!status.ok()) return status;
  CopyRowsOfOthers(*plan, rank, expected, actual);
  const auto same = SameOutputs(problem, expected, actual);
  if (!same) return absl::DataLossError(same.message());

  const int num_backwards = absl::GetFlag(FLAGS_backwards);
  if (num_backwards == 0) return absl::OkStatus();
  RunOptions backward_options;
  int backwards = 0;
  backward_options.on_stage = [&backwards](absl::string_view stage) {
    if (stage == "gate backward") {
      std::cout << absl::StrCat("backward ", backwards++, "\n") << std::flush;
    }
  };
  GlobalGradients gradients(problem, context.communicator->size(), DType::kF32);
  // Any numbers will do for d_o: q has its shape.
  return RunRankBackward(problem, /*d_o=*/problem.inputs.q, *plan, backward_options,
                         {.num_accumulated = num_backwards}, context.communicator, context.kernels,
                         &actual, &gradients);
}

absl::Status Run(const tools::RankContext& context) {
  const absl::Status status = RunAndCompare(context);
  std::cout << absl::StrCat("rank ", context.communicator->rank(), ": ", status.ToString(), "\n")
            << std::flush;
  return status;
}

}  // namespace
}  // namespace nsa::test

int main(int argc, char** argv) {
  absl::Status status =
      nsa::tools::ParseFlags("One rank of a test over several hosts.", argc, argv);
  auto options = nsa::tools::LaunchOptionsFromFlags();
  status.Update(options.status());
  if (options.ok()) {
    options->device = "cpu";
    options->num_threads = 1;
  }
  if (status.ok()) status = nsa::tools::RunRanks(*options, std::getenv, nsa::test::Run);
  if (status.ok()) return 0;
  std::cerr << status << "\n";
  return 1;
}
