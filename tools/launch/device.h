// What a rank computes on, and what moves memory of that kind between ranks.
#ifndef TOOLS_LAUNCH_DEVICE_H_
#define TOOLS_LAUNCH_DEVICE_H_

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "comm/bootstrap/bootstrap.h"
#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "tools/launch/gpus.h"

namespace nsa::tools {

struct Device {
  std::shared_ptr<Gpus> gpus;  // null: the host's cores
  int gpu = 0;
  std::string gpu_uuid = "";
  int num_threads = 1;  // where there are no GPUs
  // Of a GPU's memory, for Connect: bytes go through the host, or over this ncclComm_t (see
  // NcclOptions::adopt), or by default over a communicator of NCCL that is made.
  bool over_ucx = false;
  void* adopted_nccl = nullptr;

  const char* kind() const { return gpus == nullptr ? "cpu" : "cuda"; }
  std::string name() const;  // for people

  absl::StatusOr<std::unique_ptr<kernels::Kernels>> CreateKernels() const;
  // Collective over processes: the ranks of `bootstrap`.
  absl::StatusOr<std::unique_ptr<comm::Communicator>> Connect(
      std::unique_ptr<comm::Bootstrap> bootstrap, absl::Duration timeout) const;
  // A group of one.
  absl::StatusOr<std::unique_ptr<comm::Communicator>> ConnectAlone(absl::Duration timeout) const;
};

// Collective. The ranks compute all on CPUs or each on a GPU of its own, or each learns why not.
// `device` is this rank's, unless `ready` says why it has none. `requested` is what the user asked
// for, as errors name it.
absl::Status AgreeOnDevice(const absl::Status& ready, const Device& device,
                           comm::Bootstrap& bootstrap, absl::string_view requested,
                           absl::Duration timeout);

// Compute threads for a rank: `requested`, or when that is 0 this rank's share of the host's cores.
int ThreadsPerRank(int requested, int num_ranks_on_host);

}  // namespace nsa::tools

#endif  // TOOLS_LAUNCH_DEVICE_H_
