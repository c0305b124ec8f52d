// A group whose ranks are threads of one process. Bytes are copied between the ranks' buffers.
#ifndef COMM_LOOPBACK_LOOPBACK_H_
#define COMM_LOOPBACK_LOOPBACK_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/communicator.h"

namespace nsa::comm {

struct LoopbackOptions {
  absl::Duration timeout = absl::Seconds(60);  // of every wait
};

class LoopbackGroup {
 public:
  // Element r is the communicator of rank r; each is used by a thread of its own.
  // A rank that needs one whose communicator is already destroyed gets Unavailable.
  static absl::StatusOr<std::vector<std::unique_ptr<Communicator>>> Create(
      int size, const LoopbackOptions& options = {});
};

}  // namespace nsa::comm

#endif  // COMM_LOOPBACK_LOOPBACK_H_
