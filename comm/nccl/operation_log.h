// The operations of NCCL that are enqueued and not known to have finished, for their deadlines.
#ifndef COMM_NCCL_OPERATION_LOG_H_
#define COMM_NCCL_OPERATION_LOG_H_

#include <deque>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "comm/cuda_status.h"
#include "comm/nccl/signals.h"

namespace nsa::comm::nccl {

// Thread-safe. Operations that are captured into a graph are not logged: their events cannot be
// asked.
class OperationLog {
 public:
  struct Late {
    WaitingCall call;
    absl::Duration running;
  };

  // Marks the begin of an operation of `stream`, then its end. One thread at a time.
  absl::Status Begin(WaitingCall call, cudaStream_t stream);
  absl::Status End(cudaStream_t stream);

  // Drops what has finished and counts what is left. A CUDA error is the device's.
  absl::StatusOr<int> Poll();
  // The operation that has been running longest, if any has begun.
  std::optional<Late> Oldest();

 private:
  struct Operation {
    WaitingCall call;
    Event begin;
    Event end;  // null until End
    bool ended = false;
    absl::Time begun = absl::InfiniteFuture();  // when it was first seen to have begun
  };
  absl::StatusOr<Event> TakeEvent() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  absl::Mutex mu_;
  std::deque<Operation> operations_ ABSL_GUARDED_BY(mu_);
  std::vector<Event> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_OPERATION_LOG_H_
