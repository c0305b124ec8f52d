// AllGather and Exchange on a stream: what is small, in the meeting kernel, else over NCCL.
#ifndef COMM_NCCL_COLLECTIVES_H_
#define COMM_NCCL_COLLECTIVES_H_

#include <nccl.h>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "comm/communicator.h"
#include "comm/nccl/group_health.h"
#include "comm/nccl/meeting.h"
#include "comm/nccl/nccl_handle.h"
#include "comm/nccl/operation_log.h"
#include "comm/nccl/signals.h"

namespace nsa::comm::nccl {

// By how much a kernel's own deadline, which can name the ranks it waits for, comes before the
// host's.
inline constexpr absl::Duration kSlack = absl::Seconds(1);
// How long the control plane may take to name the rank behind an error of NCCL's.
inline constexpr absl::Duration kNewsTime = absl::Milliseconds(500);

// Arguments have been checked, and the device is current.
class Collectives {
 public:
  // `nccl` is null for a group of one.
  Collectives(int rank, int size, absl::Duration timeout, GroupHealth* health, OperationLog* log,
              NcclHandle* nccl)
      : rank_(rank), size_(size), timeout_(timeout), health_(*health), log_(*log), nccl_(nccl) {}

  // From now on the streams of all ranks meet in each operation, by MeetingSignals in `memory`: so
  // the device finds out who is late, in graphs too, and moves what is small.
  void MeetBy(const PeerMemory& memory) {
    meeting_ = memory;
    meets_ = true;
  }

  absl::Status AllGather(void* buffer, absl::Span<const GatherRun> runs, cudaStream_t stream);
  // `call` is what errors name.
  absl::Status Exchange(WaitingCall call, absl::Span<const SendOp> sends,
                        absl::Span<const RecvOp> recvs, cudaStream_t stream);

 private:
  // Enqueues a meeting with `copies`, if ranks meet, and what over_nccl(comm, i) does to NCCL for
  // each i in [0, num_groups).
  absl::Status Enqueue(WaitingCall call, const StagedCopies& copies, size_t num_groups,
                       absl::FunctionRef<ncclResult_t(ncclComm_t, size_t)> over_nccl,
                       cudaStream_t stream);

  const int rank_;
  const int size_;
  const absl::Duration timeout_;
  GroupHealth& health_;
  OperationLog& log_;
  NcclHandle* const nccl_;
  PeerMemory meeting_ = {};
  bool meets_ = false;
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_COLLECTIVES_H_
