// What the backends for host memory have in common: argument checks, collectives built on one
// grouped transfer, and windows built on counters and reads. A backend adds the transfer, the
// memory and the signals.
#ifndef COMM_HOST_COMMUNICATOR_H_
#define COMM_HOST_COMMUNICATOR_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "comm/checks.h"
#include "comm/communicator.h"
#include "comm/health.h"
#include "comm/inbox.h"

namespace nsa::comm {

class HostWindow : public Window {
 public:
  absl::Status BeginWrite(void* stream) final;
  absl::Status Publish(void* stream) final;
  absl::Status Gather(const GatherList& list, int64_t record_bytes, void* dst, void* stream) final;
  absl::Status Release(void* stream) final;

 protected:
  explicit HostWindow(int rank, const Health* health) : rank_(rank), health_(health) {}

  bool broken() const { return health_->broken(); }
  int64_t published_epoch() const { return order_.published_epoch(); }
  absl::Span<const int64_t> window_bytes() const { return window_bytes_; }

  // What peers need to reach this rank's memory.
  virtual std::string Export() const = 0;
  // Takes every rank's Export, after all ranks have made their memory.
  virtual absl::Status Connect(absl::Span<const std::string> exported) = 0;

  // Waits until every rank has released `epoch`.
  virtual absl::Status AwaitReleased(int64_t epoch) = 0;
  // Waits until `peers`, which may hold the own rank, have published `epoch`.
  virtual absl::Status AwaitPublished(absl::Span<const int> peers, int64_t epoch) = 0;
  virtual absl::Status SignalPublished(int64_t epoch) = 0;
  virtual absl::Status SignalReleased(int64_t epoch) = 0;
  // Copies from the windows of peers, never from the own one.
  virtual absl::Status Read(absl::Span<const WindowRead> reads, void* dst) = 0;

 private:
  friend class HostCommunicator;

  const int rank_;
  const Health* const health_;
  WindowOrder order_;
  std::vector<int64_t> window_bytes_;  // [size], set when created
};

class HostCommunicator : public Communicator {
 public:
  int rank() const final { return rank_; }
  int size() const final { return size_; }
  absl::Duration timeout() const final { return timeout_; }

  absl::Status AllGather(void* buffer, absl::Span<const GatherRun> runs, void* stream) final;
  absl::Status Exchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                        void* stream) final;
  absl::StatusOr<std::unique_ptr<Window>> CreateWindow(int64_t num_bytes) final;
  absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) final;
  absl::Status Barrier() final;
  absl::Status HealthCheck() final { return health_.status(); }
  std::vector<int> LostRanks() final { return health_.lost_ranks(); }

 protected:
  HostCommunicator(int rank, int size, absl::Duration timeout)
      : rank_(rank), size_(size), timeout_(timeout) {}

  // Moves the messages of one collective call, none of them to or from the own rank. Returns when
  // all are received and the sent buffers are free again, or when the communicator is broken.
  virtual absl::Status Transfer(CallKind kind, absl::Span<const SendOp> sends,
                                absl::Span<const Incoming> receives) = 0;
  // Makes this rank's memory, zeroed; local. ResourceExhausted names the bytes asked.
  virtual absl::StatusOr<std::unique_ptr<HostWindow>> AllocateWindow(int64_t num_bytes) = 0;

  Health& health() { return health_; }
  const Health& health() const { return health_; }

 private:
  absl::StatusOr<std::vector<std::string>> GatherBlobs(CallKind kind, absl::string_view mine);

  const int rank_;
  const int size_;
  const absl::Duration timeout_;
  Health health_;
};

}  // namespace nsa::comm

#endif  // COMM_HOST_COMMUNICATOR_H_
