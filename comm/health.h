// The first error of a communicator, which then answers every later call, and the ranks it has
// lost.
#ifndef COMM_HEALTH_H_
#define COMM_HEALTH_H_

#include <atomic>
#include <set>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace nsa::comm {

// Thread-safe.
class Health {
 public:
  // Keeps `error` if it is the first. Returns the first.
  absl::Status Break(absl::Status error) {
    absl::MutexLock lock(&mu_);
    if (first_.ok()) {
      first_ = std::move(error);
      broken_.store(true, std::memory_order_release);
    }
    return first_;
  }

  // `rank` has died or is cut off. Before the Break that this brings, so that whoever sees the
  // error finds the rank.
  void MarkLost(int rank) {
    absl::MutexLock lock(&mu_);
    lost_.insert(rank);
  }
  // Ascending.
  std::vector<int> lost_ranks() const {
    absl::MutexLock lock(&mu_);
    return {lost_.begin(), lost_.end()};
  }

  bool broken() const { return broken_.load(std::memory_order_acquire); }

  // OK or the first error.
  absl::Status status() const {
    absl::MutexLock lock(&mu_);
    return first_;
  }

 private:
  mutable absl::Mutex mu_;
  absl::Status first_ ABSL_GUARDED_BY(mu_);
  std::set<int> lost_ ABSL_GUARDED_BY(mu_);
  std::atomic<bool> broken_{false};
};

}  // namespace nsa::comm

#endif  // COMM_HEALTH_H_
