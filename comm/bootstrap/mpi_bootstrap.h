// A Bootstrap for programs started by mpirun. MPI only hands round the address of rank 0; after
// that the ranks are connected by TCP as everywhere else, so errors and deadlines are the same.
#ifndef COMM_BOOTSTRAP_MPI_BOOTSTRAP_H_
#define COMM_BOOTSTRAP_MPI_BOOTSTRAP_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/bootstrap/bootstrap.h"

namespace nsa::comm {

// MPI for the life of a main() that does not use MPI itself.
class MpiSession {
 public:
  // MPI_Init, which has no deadline: when a rank does not start, it is for mpirun to end the job.
  // FailedPrecondition when MPI is, or was, initialised: then it belongs to whoever did that.
  static absl::StatusOr<std::unique_ptr<MpiSession>> Start();
  // Without a Finish MPI is left as it is: MPI_Finalize would wait for ranks that may be dead.
  // mpirun then takes this rank's exit for a failure, which it is.
  ~MpiSession() = default;

  // Collective, at the end of a run that went well: MPI_Finalize, once all ranks are there.
  // DeadlineExceeded, and MPI left as it is, when one does not come.
  absl::Status Finish(absl::Duration timeout);

  int rank() const { return rank_; }
  int size() const { return size_; }

 private:
  MpiSession(int rank, int size) : rank_(rank), size_(size) {}

  const int rank_;
  const int size_;
};

struct MpiBootstrapOptions {
  absl::Duration timeout = absl::Seconds(300);
};

// Collective over MPI_COMM_WORLD, whose ranks are the group's. MPI must be initialised and is not
// used any more when this returns. One thread of a rank may be in here at a time.
//   DeadlineExceeded   a rank did not come
//   Unavailable        rank 0 cannot listen, or a rank died meanwhile: told to all
//   FailedPrecondition MPI is not initialised
absl::StatusOr<std::unique_ptr<Bootstrap>> CreateMpiBootstrap(
    const MpiBootstrapOptions& options = {});

}  // namespace nsa::comm

#endif  // COMM_BOOTSTRAP_MPI_BOOTSTRAP_H_
