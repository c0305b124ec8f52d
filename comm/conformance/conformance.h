// What every backend of communicator.h must do, as functions that each rank of a group runs.
#ifndef COMM_CONFORMANCE_CONFORMANCE_H_
#define COMM_CONFORMANCE_CONFORMANCE_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/communicator.h"

namespace nsa::comm::conformance {

// One rank's view of a launch.
struct Context {
  int rank;
  int size;
  // Collective: a new communicator of all ranks. May be called any number of times.
  std::function<absl::StatusOr<std::unique_ptr<Communicator>>(absl::Duration timeout)> create;
};

struct Test {
  std::string name;
  int min_size;
  std::function<absl::Status(const Context&)> run;
};

// Collectives and windows on healthy groups.
std::vector<Test> CollectiveTests();
std::vector<Test> WindowTests();
// Groups that break: aborts, deadlines, ranks that leave.
std::vector<Test> ErrorTests();

// All of the above.
std::vector<Test> AllTests();

// Makes communicator `group` of a rank.
using CreateGroup = std::function<absl::StatusOr<std::unique_ptr<Communicator>>(
    const std::string& group, int rank, absl::Duration timeout)>;

// Runs `tests` one after the other in one set of processes, for where a process takes seconds to
// start. Returns all that failed.
absl::Status RunTestsOnProcesses(const std::vector<Test>& tests, int size,
                                 const CreateGroup& create);

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_CONFORMANCE_H_
