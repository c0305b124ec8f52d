// The flags --backend, --device, --ranks, --timeout_s and --threads, for programs that run ranks.
#ifndef TOOLS_LAUNCH_FLAGS_H_
#define TOOLS_LAUNCH_FLAGS_H_

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "tools/launch/launch.h"

namespace nsa::tools {

// Parses the command line. --help prints `usage` and the flags of this library's programs; a flag
// that does not exist ends the process with exit code 1. InvalidArgument when something other than
// flags is given.
absl::Status ParseFlags(absl::string_view usage, int argc, char** argv);

// InvalidArgument when timeout_s is out of its range; RunRanks checks the others.
absl::StatusOr<LaunchOptions> LaunchOptionsFromFlags();

}  // namespace nsa::tools

#endif  // TOOLS_LAUNCH_FLAGS_H_
