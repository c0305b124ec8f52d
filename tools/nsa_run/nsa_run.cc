// Runs one forward of Native Sparse Attention from file to file: see kUsage.

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/flags/flag.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "nsa/config.h"
#include "tools/launch/flags.h"
#include "tools/launch/launch.h"
#include "tools/nsa_run/run_file.h"

ABSL_FLAG(std::string, config, "",
          "File with the config: JSON when it ends in .json, else text-proto. Without it, the "
          "defaults of nsa/config.h.");
ABSL_FLAG(std::string, input, "", "Safetensors file with the inputs; every rank reads it.");
ABSL_FLAG(std::string, output, "", "Safetensors file for the results; rank 0 writes it.");
ABSL_FLAG(std::string, sharding, "zigzag",
          "contiguous, zigzag, zigzag-per-document, or the tokens of each rank: 100,200,50.");
ABSL_FLAG(int64_t, fetch_budget_mib, 1024, "Most memory for fetched blocks, per rank.");
ABSL_FLAG(bool, all, false,
          "Also write o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win and block_indices.");
ABSL_FLAG(bool, stats, false, "Print what each rank moved, kept and took.");
ABSL_FLAG(std::string, stats_proto, "", "File for the same as a ForwardStats text-proto.");
ABSL_FLAG(std::string, trace, "",
          "File for when each rank's stages ran, as a Chrome trace (chrome://tracing, Perfetto).");
ABSL_FLAG(std::string, svg, "",
          "Folder to draw sharding.svg, fetch_matrix.svg and selection_map.svg into.");

namespace {

constexpr char kUsage[] =
    "Runs one forward of Native Sparse Attention on tensors from a safetensors file, over any "
    "number of ranks, on CPUs or on one GPU each (bf16 and fp16); the result does not depend on "
    "their number.\n\n"
    "  nsa_run --config layer.json --input in.safetensors --output out.safetensors --ranks 4\n"
    "  mpirun -n 4 nsa_run --config layer.json --input in.safetensors --output out.safetensors\n\n"
    "Input tensors, in global token order: q [S,Hq,Dk]; k [S,Hkv,Dk] and v [S,Hkv,Dv], or k_cmp, "
    "v_cmp, k_slc, v_slc, k_win, v_win; gate [S,Hq,3]; cu_seqlens [documents + 1] (I32, optional); "
    "compress_k.weight, ... and compress_v.weight, ... as the compressor needs them.";

absl::StatusOr<nsa::tools::RunOptions> OptionsFromFlags() {
  nsa::tools::RunOptions options;
  if (const std::string path = absl::GetFlag(FLAGS_config); !path.empty()) {
    absl::StatusOr<nsa::NsaConfig> config = nsa::LoadConfig(path);
    if (!config.ok()) return config.status();
    options.config = *config;
  }
  options.input = absl::GetFlag(FLAGS_input);
  if (options.input.empty()) return absl::InvalidArgumentError("input: must name a file");
  options.output = absl::GetFlag(FLAGS_output);
  if (options.output.empty()) return absl::InvalidArgumentError("output: must name a file");
  options.sharding = absl::GetFlag(FLAGS_sharding);
  const int64_t budget_mib = absl::GetFlag(FLAGS_fetch_budget_mib);
  if (budget_mib < 0 || budget_mib > (int64_t{1} << 40)) {
    return absl::InvalidArgumentError(
        absl::StrCat("fetch_budget_mib = ", budget_mib, ": must lie in [0, 2^40]"));
  }
  options.fetch_budget_bytes = budget_mib << 20;
  options.all_outputs = absl::GetFlag(FLAGS_all);
  options.print_stats = absl::GetFlag(FLAGS_stats);
  options.stats_proto = absl::GetFlag(FLAGS_stats_proto);
  options.trace = absl::GetFlag(FLAGS_trace);
  options.svg_folder = absl::GetFlag(FLAGS_svg);
  options.print = [](absl::string_view text) { std::fwrite(text.data(), 1, text.size(), stdout); };
  return options;
}

absl::Status Run(int argc, char** argv) {
  if (absl::Status status = nsa::tools::ParseFlags(kUsage, argc, argv); !status.ok()) return status;
  absl::StatusOr<nsa::tools::RunOptions> options = OptionsFromFlags();
  if (!options.ok()) return options.status();
  absl::StatusOr<nsa::tools::LaunchOptions> launch = nsa::tools::LaunchOptionsFromFlags();
  if (!launch.ok()) return launch.status();
  return nsa::tools::RunRanks(*launch, std::getenv, [&](const nsa::tools::RankContext& context) {
    return nsa::tools::RunFile(*options, context);
  });
}

}  // namespace

int main(int argc, char** argv) {
  absl::Status status = Run(argc, argv);
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
    status.Update(absl::ErrnoToStatus(errno, "can't print to stdout"));
  }
  if (status.ok()) return 0;
  std::fprintf(stderr, "nsa_run: %s\n", status.ToString().c_str());
  return 1;
}
