// A long text sharded over ranks: summaries built and gathered, blocks selected globally and
// fetched peer to peer, a planted needle found, and the result equal bit for bit to that of one
// rank.
//
//   mpirun -n 4 demo [--device cpu|cuda] [--tokens N] [--text FILE] [--depth PERCENT]
//                    [--sharding S] [--svg FOLDER]
#include <cstdlib>
#include <iostream>
#include <string>

#include "absl/flags/flag.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "examples/02_demo/haystack.h"
#include "examples/02_demo/report.h"
#include "examples/text/device_tensors.h"
#include "examples/text/text_tensors.h"
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

namespace nsa::examples {
namespace {

// The forward over the text, of which this rank computes its part; the whole result on rank 0.
absl::StatusOr<Result> Compute(const Haystack& haystack, const ShardPlan& plan,
                               const tools::RankContext& context) {
  const int rank = context.communicator->rank();
  const absl::Time begin = absl::Now();
  Result result;
  result.config = DemoConfig();
  result.num_tokens = plan.num_tokens();
  EngineOptions options = {
      .config = result.config,
      .dtype = DType::kBF16,
      .fetch_budget_bytes = static_cast<int64_t>(absl::GetFlag(FLAGS_fetch_budget_mib) * (1 << 20)),
      .time_stages = true};
  bool shows_stages = false;
  options.on_stage = [&](absl::string_view stage) {
    if (!shows_stages) return;
    std::cout << absl::StrFormat("  %7.3f s  %s\n", absl::ToDoubleSeconds(absl::Now() - begin),
                                 stage)
              << std::flush;
  };
  auto engine = Engine::Create(options, plan, context.communicator, context.kernels);
  if (!engine.ok()) return engine.status();
  const TextTensors text(result.config, haystack.text, TokensOfRank(plan, rank));
  auto tensors = DeviceTensors::Create(text.inputs(), result.config, *context.kernels);
  if (!tensors.ok()) return tensors.status();

  // The first forward on GPUs connects them and loads the kernels; the second is like all others.
  for (int forwards = context.device == "cpu" ? 1 : 2; forwards > 0; --forwards) {
    shows_stages = rank == 0 && forwards == 1;
    const absl::Time forward_begin = absl::Now();
    absl::Status status = (*engine)->Forward(tensors->inputs(), tensors->outputs());
    if (status.ok()) status = context.Wait();
    if (!status.ok()) return status;
    result.seconds = absl::ToDoubleSeconds(absl::Now() - forward_begin);
  }

  auto stats = (*engine)->GatherStats();
  if (!stats.ok()) return stats.status();
  result.stats = *std::move(stats);
  absl::Status status = GatherOnRank0(context, plan, tensors->outputs(), &result);
  if (!status.ok()) return status;
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
    std::cout << absl::StrFormat(
        "%d tokens of text, %s over %d ranks, each on %s; needle at token %d\n"
        "stages of rank 0, as they %s:\n",
        tokens, absl::GetFlag(FLAGS_sharding), communicator.size(), context.device_name,
        haystack->needle_begin, context.device == "cpu" ? "begin" : "are enqueued");
  }
  auto whole = Compute(*haystack, *plan, context);
  if (!whole.ok()) return whole.status();
  if (!first) return absl::OkStatus();

  std::cout << absl::StrFormat("forward: %.3f s\n\n", whole->seconds) << FormatTable(whole->stats)
            << "\n"
            << FetchedAgainstAllGather(DemoConfig(), *plan, whole->stats) << "\n"
            << LastQueryReport(*haystack, *plan, *whole) << std::flush;
  if (const std::string folder = absl::GetFlag(FLAGS_svg); !folder.empty()) {
    absl::Status drawn = Draw(folder, *plan, *whole);
    if (!drawn.ok()) return drawn;
    std::cout << "drawings: " << folder << "/{sharding,fetch_matrix,selection_map}.svg\n";
  }
  if (absl::Status found = CheckRetrieved(*haystack, *whole); !found.ok()) return found;

  if (!absl::GetFlag(FLAGS_compare)) return absl::OkStatus();
  auto alone = context.alone();
  if (!alone.ok()) return alone.status();
  std::cout << absl::StrFormat("\nthe same on one rank, on %s:\n", alone->device_name);
  auto one_plan = ShardPlan::Parse("contiguous", tokens, 1);
  if (!one_plan.ok()) return one_plan.status();
  auto one = Compute(*haystack, *one_plan, *alone);
  if (!one.ok()) return one.status();
  std::cout << absl::StrFormat("forward: %.3f s\n", one->seconds);
  if (!SameBits(*one, *whole)) return absl::InternalError("the result differs from one rank's");
  std::cout << absl::StrFormat(
      "o and block indices of %d ranks and of one rank: equal bit for bit\n", communicator.size());
  return absl::OkStatus();
}

}  // namespace
}  // namespace nsa::examples

int main(int argc, char** argv) {
  absl::Status status = nsa::tools::ParseFlags(
      "Finds a needle in a long text with sharded sparse attention.", argc, argv);
  auto options = nsa::tools::LaunchOptionsFromFlags();
  status.Update(options.status());
  if (status.ok()) status = nsa::tools::RunRanks(*options, std::getenv, nsa::examples::RunDemo);
  if (status.ok()) return 0;
  std::cerr << "demo: " << status << "\n";
  return 1;
}
