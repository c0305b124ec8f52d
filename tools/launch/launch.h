// Ranks for a program: threads of one process, or this process as one of those that mpirun or
// torchrun started; on CPUs, or on one GPU each.
#ifndef TOOLS_LAUNCH_LAUNCH_H_
#define TOOLS_LAUNCH_LAUNCH_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "tools/launch/environment.h"
#include "tools/launch/gpus.h"

namespace nsa::tools {

struct LaunchOptions {
  // loopback: threads of this process, on CPUs. ucx: processes, on CPUs. nccl: processes, or one
  // alone, with a GPU each. auto: what device and environment ask for.
  std::string backend = "auto";
  // cpu, or cuda: a rank takes the GPU of its number among the ranks of its host, or the only one
  // that its process sees. auto: cuda where there are GPUs and neither the backend nor several
  // ranks in one process ask for CPUs.
  std::string device = "auto";
  int num_ranks = 0;                           // 0: what the environment says, else one
  int num_threads = 0;                         // of a rank on a CPU; 0: its share of the cores
  absl::Duration timeout = absl::Seconds(60);  // of every wait for another rank
  // FindGpus, for programs that can use GPUs.
  std::function<absl::StatusOr<std::shared_ptr<Gpus>>()> find_gpus = nullptr;
};

// What the function of a rank is given.
struct RankContext {
  std::shared_ptr<comm::Communicator> communicator;
  std::shared_ptr<kernels::Kernels> kernels;  // their memory is what the communicator moves
  std::string device;                         // cpu or cuda
  std::string device_name;                    // for people: "NVIDIA H200", "2 CPU threads"
  // This rank as a group of its own, on the same device; on CPUs with the cores of all ranks.
  std::function<absl::StatusOr<RankContext>()> alone;

  // Waits for what is enqueued on the default stream, and returns what went wrong with it.
  absl::Status Wait() const;
};

// Runs `function` as every rank of this process and returns when all have. When a rank fails, it
// aborts the group, so that the others' waits end too; the result is what made it fail.
// InvalidArgument, naming flag, value and rule, when options contradict each other or what there
// is: GPUs of this host, processes, devices of other ranks.
absl::Status RunRanks(const LaunchOptions& options, const Environment& environment,
                      const std::function<absl::Status(const RankContext&)>& function);

}  // namespace nsa::tools

#endif  // TOOLS_LAUNCH_LAUNCH_H_
