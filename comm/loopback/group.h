// What the ranks of a loopback group share. All of it is guarded by one mutex; only bytes are
// copied outside of it.
#ifndef COMM_LOOPBACK_GROUP_H_
#define COMM_LOOPBACK_GROUP_H_

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "comm/communicator.h"
#include "comm/health.h"
#include "comm/inbox.h"

namespace nsa::comm::loopback {

// Zeroed pages.
class PageMemory {
 public:
  static absl::StatusOr<std::shared_ptr<PageMemory>> Allocate(int64_t num_bytes);
  ~PageMemory();
  PageMemory(const PageMemory&) = delete;
  PageMemory& operator=(const PageMemory&) = delete;

  char* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  PageMemory(char* data, int64_t num_bytes) : data_(data), num_bytes_(num_bytes) {}

  char* const data_;  // never null
  const int64_t num_bytes_;
};

// One window of all ranks.
struct WindowBoard {
  std::vector<std::shared_ptr<PageMemory>> memory;  // [size]
  std::vector<int64_t> published;                   // [size] last epoch published
  std::vector<int64_t> released;                    // [size] last epoch released
  int destroyed = 0;                                // ranks that no longer have it
};

class Group {
 public:
  Group(int size, absl::Duration timeout);

  int size() const { return size_; }
  absl::Duration timeout() const { return timeout_; }

  // A rank hands in where the first error is to be kept.
  void Register(int rank, Health* health);
  // No rank may wait for `rank` any more; `why` is what had broken it, or OK.
  void Leave(int rank, const absl::Status& why);
  void AbortAll(int rank, absl::string_view reason);

  absl::Status Transfer(int rank, int64_t call, CallKind kind, absl::Span<const SendOp> sends,
                        absl::Span<const Incoming> receives);

  // Windows are numbered by each rank in the order of creation, which is the same on all.
  void AddWindow(int rank, int64_t window, std::shared_ptr<PageMemory> memory);
  // Also for a rank that had no memory to add.
  void RemoveWindow(int rank, int64_t window);
  std::vector<std::shared_ptr<PageMemory>> WindowMemory(int64_t window);
  void Signal(int rank, int64_t window, std::vector<int64_t> WindowBoard::*counters, int64_t epoch);
  // Waits until counters[peer] >= epoch for all `peers`.
  absl::Status Await(int rank, int64_t window, std::vector<int64_t> WindowBoard::*counters,
                     int64_t epoch, absl::Span<const int> peers, absl::string_view call);

 private:
  struct Message {
    enum class State { kPosted, kCopying, kDone };
    MessageHeader header;
    int receiver;
    const void* data;
    State state = State::kPosted;
  };
  struct Rank {
    Health* health = nullptr;
    std::unique_ptr<Inbox> inbox;
    std::list<Message*> arrived;  // owned by their senders, who wait until they are done
    bool left = false;
  };

  WindowBoard& Board(int64_t window) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Takes what `rank` can take now. Unlocks while it copies.
  void Receive(int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // OK to go on waiting for `awaited`, or the error that ends the wait.
  absl::Status CheckWait(int rank, absl::string_view call, absl::Span<const int> awaited,
                         absl::Time deadline) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int size_;
  const absl::Duration timeout_;
  absl::Mutex mu_;
  absl::CondVar changed_;
  std::vector<Rank> ranks_ ABSL_GUARDED_BY(mu_);
  std::map<int64_t, WindowBoard> windows_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nsa::comm::loopback

#endif  // COMM_LOOPBACK_GROUP_H_
