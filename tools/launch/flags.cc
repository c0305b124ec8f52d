#include "tools/launch/flags.h"

#include <cmath>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"

ABSL_FLAG(std::string, backend, "auto",
          "How ranks talk: loopback (threads of this process), ucx (processes that mpirun or "
          "torchrun started), or auto (ucx when they did, else loopback).");
ABSL_FLAG(int32_t, ranks, 0, "Number of ranks; 0: what the environment says, else one.");
ABSL_FLAG(double, timeout_s, 60, "Longest wait of a rank for another, in seconds.");
ABSL_FLAG(int32_t, threads, 0, "Compute threads per rank; 0: a rank's share of the cores.");

namespace nsa::tools {
namespace {

constexpr double kMaxTimeoutSeconds = 1e6;
constexpr int kMaxThreads = 4096;

}  // namespace

absl::Status ParseFlags(absl::string_view usage, int argc, char** argv) {
  absl::SetProgramUsageMessage(usage);
  absl::FlagsUsageConfig config;
  // By default --help shows the flags of the file with main() alone.
  config.contains_help_flags = [](absl::string_view file) {
    return absl::StrContains(file, "tools/") || absl::StrContains(file, "examples/");
  };
  absl::SetFlagsUsageConfig(config);
  const std::vector<char*> rest = absl::ParseCommandLine(argc, argv);
  if (rest.size() <= 1) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("\"", rest[1], "\": only flags are taken, see --help"));
}

absl::StatusOr<LaunchOptions> LaunchOptionsFromFlags() {
  const double timeout_s = absl::GetFlag(FLAGS_timeout_s);
  if (!(timeout_s > 0 && timeout_s <= kMaxTimeoutSeconds)) {
    return absl::InvalidArgumentError(
        absl::StrCat("timeout_s = ", timeout_s, ": must lie in (0, ", kMaxTimeoutSeconds, "]"));
  }
  return LaunchOptions{.backend = absl::GetFlag(FLAGS_backend),
                       .num_ranks = absl::GetFlag(FLAGS_ranks),
                       .timeout = absl::Seconds(timeout_s)};
}

absl::StatusOr<int> ThreadsFromFlags(const RankContext& context) {
  const int threads = absl::GetFlag(FLAGS_threads);
  if (threads < 0 || threads > kMaxThreads) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads = ", threads, ": must lie in [0, ", kMaxThreads, "]"));
  }
  return ThreadsPerRank(threads, context.num_ranks_on_host);
}

}  // namespace nsa::tools
