// One forward from file to file, as every rank of a group takes part in it.
#ifndef TOOLS_NSA_RUN_RUN_FILE_H_
#define TOOLS_NSA_RUN_RUN_FILE_H_

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "nsa/config.h"
#include "tools/launch/launch.h"

namespace nsa::tools {

struct RunOptions {
  NsaConfig config;
  std::string input;   // safetensors, read by every rank; names: see input_file.h
  std::string output;  // safetensors, written by rank 0: o, and with all_outputs the rest
  std::string sharding = "zigzag";
  int64_t fetch_budget_bytes = int64_t{1} << 30;
  bool all_outputs = false;  // also o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, block_indices
  bool print_stats = false;
  std::string stats_proto;  // file for the statistics as text-proto; empty: none
  std::string trace;        // file for when the stages ran, as a Chrome trace; empty: none
  std::string svg_folder;   // folder for drawings; empty: none

  // Called on rank 0 with text for the user.
  std::function<void(absl::string_view)> print;
};

// Collective; all ranks pass the same options. The output appears whole, after everything else has
// succeeded, or not at all.
absl::Status RunFile(const RunOptions& options, const RankContext& context);

}  // namespace nsa::tools

#endif  // TOOLS_NSA_RUN_RUN_FILE_H_
