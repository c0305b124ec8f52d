// FindGpus of builds without a CUDA toolkit or without NCCL.
#include "absl/status/status.h"
#include "tools/launch/gpus.h"

namespace nsa::tools {

absl::StatusOr<std::shared_ptr<Gpus>> FindGpus() {
  return absl::NotFoundError("this program was built without CUDA and NCCL");
}

}  // namespace nsa::tools
