// A thread that looks after what is enqueued: deadlines, errors of NCCL's threads, faults that
// kernels report. When the group is broken, it ends the kernels in flight.
#ifndef COMM_NCCL_WATCHDOG_H_
#define COMM_NCCL_WATCHDOG_H_

#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "comm/nccl/group_health.h"
#include "comm/nccl/nccl_handle.h"
#include "comm/nccl/operation_log.h"

namespace nsa::comm::nccl {

class Watchdog {
 public:
  Watchdog(int rank, int size, absl::Duration timeout, GroupHealth* health, OperationLog* log)
      : rank_(rank), size_(size), timeout_(timeout), health_(*health), log_(*log) {}
  // Looks once more, so that a broken group has no kernels in flight.
  ~Watchdog();

  // `nccl` may be null.
  void Start(int device, NcclHandle* nccl);
  // Of operations, as far as the host has to see to them.
  void SetLimit(absl::Duration limit);
  // A rank left in good order: what needs it will not finish. Thread-safe.
  void OnLeft(int rank);
  // Look at once. Thread-safe.
  void Wake();

 private:
  void Run(int device);
  void Look();
  void CheckOperations();

  const int rank_;
  const int size_;
  const absl::Duration timeout_;
  GroupHealth& health_;
  OperationLog& log_;
  NcclHandle* nccl_ = nullptr;

  absl::Mutex mu_;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;
  bool look_ ABSL_GUARDED_BY(mu_) = false;
  absl::Duration limit_ ABSL_GUARDED_BY(mu_) = timeout_;
  int left_rank_ ABSL_GUARDED_BY(mu_) = -1;  // the first that left
  absl::Time left_at_ ABSL_GUARDED_BY(mu_);

  // Of the thread alone.
  bool aborted_ = false;
  absl::Time next_async_check_ = absl::InfinitePast();
  absl::Time async_error_at_ = absl::InfiniteFuture();
  std::thread thread_;
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_WATCHDOG_H_
