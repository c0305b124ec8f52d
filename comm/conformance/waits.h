// Every kind of wait in a communicator, so that fault tests can go through all of them.
#ifndef COMM_CONFORMANCE_WAITS_H_
#define COMM_CONFORMANCE_WAITS_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/communicator.h"

namespace nsa::comm::conformance {

// State of one rank for one kind of wait.
class PreparedWait {
 public:
  virtual ~PreparedWait() = default;
  // Waits for rank `absent`, which does not make this call.
  virtual absl::Status Run(int absent) = 0;
};

struct Wait {
  std::string name;
  std::string call;           // as error messages name it
  bool satisfied_by_leaving;  // a rank that destroys its communicator is not needed any more
  // Collective: what must be done while all ranks are well. Ends before its communicator does.
  std::function<absl::StatusOr<std::unique_ptr<PreparedWait>>(Communicator&)> prepare;
};

std::vector<Wait> Waits();

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_WAITS_H_
