// The first error of a communicator, wherever it is found: on the host or by a waiting kernel.
#ifndef COMM_NCCL_GROUP_HEALTH_H_
#define COMM_NCCL_GROUP_HEALTH_H_

#include <atomic>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "comm/cuda_status.h"
#include "comm/health.h"
#include "comm/nccl/signals.h"

namespace nsa::comm::nccl {

absl::string_view WaitingCallName(WaitingCall call);

// Thread-safe after Start.
class GroupHealth {
 public:
  GroupHealth(int rank, int size, absl::Duration timeout)
      : rank_(rank), size_(size), timeout_(timeout) {}

  // Makes the board. Before it there are no kernels to talk to.
  absl::Status Start();

  // Keeps `error` if it is the first, ends the waits of kernels, returns the first.
  absl::Status Break(absl::Status error);
  // A rank that waits for `rank` from now on waits in vain.
  void MarkLeft(int rank);

  // Takes up what kernels have found. Then OK or the first error.
  absl::Status Check();
  bool broken() const { return health_.broken(); }

  // As those of Health.
  void MarkLost(int rank) { health_.MarkLost(rank); }
  std::vector<int> lost_ranks() const { return health_.lost_ranks(); }

  // As the device sees it.
  FaultBoard* device_board() const { return device_board_; }

 private:
  absl::Status FaultOfDevice() const;

  const int rank_;
  const int size_;
  const absl::Duration timeout_;
  Health health_;
  std::atomic<bool> started_{false};
  HostPtr<FaultBoard> board_;
  FaultBoard* device_board_ = nullptr;
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_GROUP_HEALTH_H_
