// Ranks for a program: threads of one process, or this process as one of those that mpirun or
// torchrun started.
#ifndef TOOLS_LAUNCH_LAUNCH_H_
#define TOOLS_LAUNCH_LAUNCH_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "comm/communicator.h"
#include "tools/launch/environment.h"

namespace nsa::tools {

struct LaunchOptions {
  std::string backend = "auto";                // loopback; auto takes what the environment asks for
  int num_ranks = 0;                           // 0: what the environment says, else one
  absl::Duration timeout = absl::Seconds(60);  // of every wait for another rank
};

// What the function of a rank is given.
struct RankContext {
  std::shared_ptr<comm::Communicator> communicator;
  int num_ranks_on_host = 1;  // to share its cores
};

// Runs `function` as every rank of this process and returns when all have. When a rank fails, it
// aborts the group, so that the others' waits end too; the result is what made it fail.
absl::Status RunRanks(const LaunchOptions& options, const Environment& environment,
                      const std::function<absl::Status(const RankContext&)>& function);

// Compute threads for a rank: `requested`, or when that is 0 this rank's share of the host's cores.
int ThreadsPerRank(int requested, int num_ranks_on_host);

}  // namespace nsa::tools

#endif  // TOOLS_LAUNCH_LAUNCH_H_
