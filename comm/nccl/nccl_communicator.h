// A communicator over NCCL for device memory, one GPU a rank. Calls enqueue on a stream, a
// cudaStream_t (null: the default stream), and can be captured into CUDA graphs. Collectives on
// several streams must be ordered by the caller, with events.
//
// Where ranks load and store each other's memory, a kernel of this library moves what is small: an
// AllGather of up to 16 MiB a rank, and in an Exchange up to 16 MiB / size from one rank to
// another. It takes 32 MiB of device memory. NCCL moves the rest, which costs the host more to
// launch.
#ifndef COMM_NCCL_NCCL_COMMUNICATOR_H_
#define COMM_NCCL_NCCL_COMMUNICATOR_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/bootstrap/bootstrap.h"
#include "comm/communicator.h"

struct ncclComm;

namespace nsa::comm {

struct NcclOptions {
  absl::Duration timeout = absl::Seconds(60);          // of every wait
  absl::Duration connect_timeout = absl::Seconds(60);  // of those in Create

  int device = -1;  // CUDA's number; -1: the current device

  // A communicator of the same ranks, made with blocking = 0, to use instead of an own one for
  // AllGather and Exchange. It is taken: nobody else may use or destroy it from then on.
  ncclComm* adopt = nullptr;

  // Let kernels load and store peers' memory where all ranks can reach each other and the NCCL that
  // runs is the version that was compiled against. False, or elsewhere, reads of windows travel in
  // packs from their owners: a Gather waits for its stream, to read the list, and for all ranks to
  // come to a Gather or Release of the window; a Release, for all to release it. So these calls
  // count as collective there, the number of Gathers aside, and cannot be captured into graphs.
  // A destroyed window is then of no use to the others after the epoch.
  bool use_windows = true;

  // The kernel of Gather: CTAs, and reads under way in each, at 8 KiB of shared memory a read.
  int gather_ctas = 16;
  int gather_warps = 8;

  // Compare the sizes of what is sent and received in Exchange on the host first. False: that sizes
  // are equal is for the caller to see to, and when they are not the deadline tells, or nothing.
  bool check_exchange = false;
};

// The windows of this backend. What the device finds wrong with a Gather's list is known later than
// the call that enqueued it.
class DeviceWindow : public Window {
 public:
  // InvalidArgument about the first record of a Gather that broke a rule, once; that record was not
  // copied. The next call on the window says so too. Local, never waits.
  virtual absl::Status TakeListError() = 0;
};

class NcclCommunicator {
 public:
  // Collective. Windows are DeviceWindows. InvalidArgument when the device's compute capability is
  // below 9.0. FailedPrecondition on all ranks when they run different
  // versions of NCCL, or one that is too old.
  //
  // What is found later than the call that caused it (a peer that does not come, a rank that dies)
  // ends the kernels in flight; HealthCheck and every later call return it. Where ranks load and
  // store each other's memory, kernels keep the deadlines and name the late ranks, in replays of
  // graphs too. Elsewhere the host does, names all other ranks, and does not see into graphs.
  //
  // The end waits, up to `timeout`, for what this rank has enqueued. Graphs must have run to their
  // end, and must be destroyed before, because NCCL waits for them.
  static absl::StatusOr<std::unique_ptr<Communicator>> Create(std::unique_ptr<Bootstrap> bootstrap,
                                                              const NcclOptions& options = {});
};

}  // namespace nsa::comm

#endif  // COMM_NCCL_NCCL_COMMUNICATOR_H_
