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
          "How ranks talk: loopback (threads of this process, on CPUs), ucx (processes that mpirun "
          "or torchrun started, on CPUs), nccl (the same on GPUs, or one process alone), or auto.");
ABSL_FLAG(std::string, device, "auto",
          "What ranks compute on: cpu, cuda (one GPU a rank), or auto (cuda where there are GPUs, "
          "unless --backend or --ranks ask for CPUs).");
ABSL_FLAG(int32_t, ranks, 0, "Number of ranks; 0: what the environment says, else one.");
ABSL_FLAG(double, timeout_s, 60, "Longest wait of a rank for another, in seconds.");
ABSL_FLAG(int32_t, threads, 0, "Compute threads per rank on CPUs; 0: its share of the cores.");

namespace nsa::tools {
namespace {

constexpr double kMaxTimeoutSeconds = 1e6;

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
                       .device = absl::GetFlag(FLAGS_device),
                       .num_ranks = absl::GetFlag(FLAGS_ranks),
                       .num_threads = absl::GetFlag(FLAGS_threads),
                       .timeout = absl::Seconds(timeout_s),
                       .find_gpus = FindGpus};
}

}  // namespace nsa::tools
