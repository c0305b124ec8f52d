// The GPUs that this process sees, and what computes and communicates on them.
#ifndef TOOLS_LAUNCH_GPUS_H_
#define TOOLS_LAUNCH_GPUS_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/bootstrap/bootstrap.h"
#include "comm/communicator.h"
#include "comm/device_memory.h"
#include "kernels/kernels.h"

namespace nsa::tools {

class Gpus {
 public:
  virtual ~Gpus() = default;
  virtual int count() const = 0;                  // at least 1
  virtual std::string NameOf(int gpu) const = 0;  // of the model; gpu in [0, count)
  // The same in every process that sees this GPU, and that of no other GPU of any host.
  virtual absl::StatusOr<std::string> UuidOf(int gpu) const = 0;
  virtual absl::StatusOr<std::unique_ptr<kernels::Kernels>> CreateKernels(int gpu) = 0;
  // The GPU's memory, for communicators over the host.
  virtual absl::StatusOr<std::shared_ptr<comm::DeviceMemory>> CreateMemory(int gpu) = 0;
  // Collective over the ranks of `bootstrap`; each rank's memory is that of its GPU. `adopt`: an
  // ncclComm_t, as NcclOptions::adopt; or null.
  virtual absl::StatusOr<std::unique_ptr<comm::Communicator>> CreateCommunicator(
      std::unique_ptr<comm::Bootstrap> bootstrap, int gpu, absl::Duration timeout, void* adopt) = 0;
};

// NotFound, saying why, when this build or this host has no GPUs.
absl::StatusOr<std::shared_ptr<Gpus>> FindGpus();

}  // namespace nsa::tools

#endif  // TOOLS_LAUNCH_GPUS_H_
