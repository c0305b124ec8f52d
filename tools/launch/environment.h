// Whether this process is one of several, from what mpirun or torchrun leave in the environment.
#ifndef TOOLS_LAUNCH_ENVIRONMENT_H_
#define TOOLS_LAUNCH_ENVIRONMENT_H_

#include <functional>

#include "absl/status/statusor.h"

namespace nsa::tools {

// The value of a variable, or null; programs pass std::getenv.
using Environment = std::function<const char*(const char*)>;

// How the ranks of a group come about.
enum class Origin {
  kThreads,     // this process makes them all
  kMpi,         // mpirun started one process each (OMPI_COMM_WORLD_SIZE is set)
  kRendezvous,  // something else did, as torchrun: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
};

struct ProcessPlace {
  Origin origin = Origin::kThreads;
  int size = 1;  // ranks, of which this process is one unless it makes them
  int rank = 0;  // of this process
  int num_ranks_on_host = 1;
  int local_rank = 0;  // among those
};

// OMPI_COMM_WORLD_SIZE comes first, then RANK and WORLD_SIZE. Without LOCAL_WORLD_SIZE all ranks
// are taken to be on one host, without LOCAL_RANK consecutive ones. InvalidArgument, naming
// variable, value and rule, when what is set is incomplete or contradicts itself.
absl::StatusOr<ProcessPlace> FindProcessPlace(const Environment& environment);

}  // namespace nsa::tools

#endif  // TOOLS_LAUNCH_ENVIRONMENT_H_
