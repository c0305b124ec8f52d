// A long text sharded over ranks: summaries built and gathered, blocks selected globally and
// fetched peer to peer, a planted needle found, and the result equal bit for bit to that of one
// rank.
//
//   mpirun -n 4 demo [--tokens N] [--text FILE] [--depth PERCENT] [--sharding S] [--svg FOLDER]
#include <cstdlib>
#include <iostream>
#include <memory>

#include "absl/flags/flag.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "comm/loopback/loopback.h"
#include "examples/02_demo/haystack.h"
#include "examples/02_demo/report.h"
#include "examples/02_demo/text_tensors.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/engine.h"
#include "nsa/stats.h"
#include "tools/launch/flags.h"
#include "tools/launch/launch.h"

ABSL_FLAG(int64_t, tokens, 65536, "tokens of the text, one a byte");
ABSL_FLAG(std::string, text, "", "text file; default: this system's license texts");
ABSL_FLAG(double, depth, 42, "where the needle is planted, in percent of the text");
ABSL_FLAG(std::string, sharding, "zigzag", "contiguous, zigzag, or tokens per rank: A,B,...");
ABSL_FLAG(double, fetch_budget_mib, 1024, "memory for fetched blocks, per rank");
ABSL_FLAG(bool, compare, true, "compute the whole on one rank too, and compare bits");
ABSL_FLAG(std::string, svg, "", "folder to draw sharding, fetches and selection into");

namespace nsa::demo {
namespace {

// The forward on this rank's part of the text.
absl::StatusOr<RankResult> Compute(const Haystack& haystack, const ShardPlan& plan,
                                   const tools::RankContext& context, bool show_progress) {
  const int rank = context.communicator->rank();
  const NsaConfig config = DemoConfig();
  auto threads = tools::ThreadsFromFlags(context);
  if (!threads.ok()) return threads.status();
  auto kernels = kernels::CpuKernels::Create({.num_threads = *threads});
  if (!kernels.ok()) return kernels.status();
  const absl::Time begin = absl::Now();
  EngineOptions options = {.config = config,
                           .dtype = DType::kBF16,
                           .fetch_budget_bytes = static_cast<int64_t>(
                               absl::GetFlag(FLAGS_fetch_budget_mib) * (1 << 20))};
  if (show_progress) {
    options.on_stage = [begin](absl::string_view stage) {
      std::cout << absl::StrFormat("  %7.3f s  %s\n", absl::ToDoubleSeconds(absl::Now() - begin),
                                   stage)
                << std::flush;
    };
  }
  auto engine = Engine::Create(options, plan, context.communicator, *std::move(kernels));
  if (!engine.ok()) return engine.status();

  const TextTensors tensors(config, haystack.text, plan, rank);
  RankResult result(config, plan.TokensOfRank(rank));
  const absl::Time forward_begin = absl::Now();
  absl::Status status = (*engine)->Forward(tensors.inputs(), result.outputs());
  if (!status.ok()) return status;
  result.seconds = absl::ToDoubleSeconds(absl::Now() - forward_begin);
  auto stats = (*engine)->GatherStats();
  if (!stats.ok()) return stats.status();
  result.stats = *std::move(stats);
  return result;
}

absl::Status RunDemo(const tools::RankContext& context) {
  comm::Communicator& communicator = *context.communicator;
  const bool first = communicator.rank() == 0;
  absl::StatusOr<Haystack> haystack = MakeHaystack(
      absl::GetFlag(FLAGS_text), absl::GetFlag(FLAGS_tokens), absl::GetFlag(FLAGS_depth));
  if (!haystack.ok()) return haystack.status();
  const int64_t tokens = absl::GetFlag(FLAGS_tokens);
  auto plan = ShardPlan::Parse(absl::GetFlag(FLAGS_sharding), tokens, communicator.size());
  if (!plan.ok()) return plan.status();
  if (first) {
    std::cout << absl::StrFormat("%d tokens of text, %s over %d ranks; needle at token %d\n",
                                 tokens, absl::GetFlag(FLAGS_sharding), communicator.size(),
                                 haystack->needle_begin)
              << "stages of rank 0:\n";
  }
  auto result = Compute(*haystack, *plan, context, first);
  if (!result.ok()) return result.status();
  auto whole = GatherOnRank0(communicator, *plan, *result);
  if (!whole.ok()) return whole.status();
  if (!first) return absl::OkStatus();

  std::cout << absl::StrFormat("forward: %.2f s\n\n", result->seconds) << FormatTable(result->stats)
            << "\n"
            << FetchedAgainstAllGather(DemoConfig(), *plan, result->stats) << "\n"
            << LastQueryReport(*haystack, *plan, *whole) << std::flush;
  if (const std::string folder = absl::GetFlag(FLAGS_svg); !folder.empty()) {
    absl::Status drawn = Draw(folder, *plan, result->stats, *whole);
    if (!drawn.ok()) return drawn;
    std::cout << "drawings: " << folder << "/{sharding,fetch_matrix,selection_map}.svg\n";
  }
  if (absl::Status found = CheckRetrieved(*haystack, *whole); !found.ok()) return found;

  if (!absl::GetFlag(FLAGS_compare)) return absl::OkStatus();
  std::cout << "\nthe same on one rank:\n";
  auto group = comm::LoopbackGroup::Create(1);
  if (!group.ok()) return group.status();
  auto one_plan = ShardPlan::Parse("contiguous", tokens, 1);
  if (!one_plan.ok()) return one_plan.status();
  auto one = Compute(*haystack, *one_plan, {.communicator = std::move((*group)[0])}, true);
  if (!one.ok()) return one.status();
  std::cout << absl::StrFormat("forward: %.2f s\n", one->seconds);
  if (!SameBits(*one, *whole)) return absl::InternalError("the result differs from one rank's");
  std::cout << absl::StrFormat(
      "o and block indices of %d ranks and of one rank: equal bit for bit\n", communicator.size());
  return absl::OkStatus();
}

}  // namespace
}  // namespace nsa::demo

int main(int argc, char** argv) {
  absl::Status status = nsa::tools::ParseFlags(
      "Finds a needle in a long text with sharded sparse attention.", argc, argv);
  auto options = nsa::tools::LaunchOptionsFromFlags();
  status.Update(options.status());
  if (status.ok()) status = nsa::tools::RunRanks(*options, std::getenv, nsa::demo::RunDemo);
  if (status.ok()) return 0;
  std::cerr << "demo: " << status << "\n";
  return 1;
}
