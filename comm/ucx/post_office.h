// The messages of collective calls over a Worker: what came early waits here for its call.
#ifndef COMM_UCX_POST_OFFICE_H_
#define COMM_UCX_POST_OFFICE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "comm/communicator.h"
#include "comm/health.h"
#include "comm/inbox.h"
#include "comm/ucx/remote_reads.h"
#include "comm/ucx/worker.h"

namespace nsa::comm::ucx {

// All methods but Transfer are called with the worker's mutex held.
class PostOffice {
 public:
  PostOffice(int rank, int size, Worker* worker, RemoteReads* reads, Health* health)
      : rank_(rank),
        size_(size),
        worker_(*worker),
        reads_(*reads),
        health_(*health),
        inbox_(rank, size) {}

  // As HostCommunicator::Transfer.
  absl::Status Transfer(CallKind kind, absl::Span<const SendOp> sends,
                        absl::Span<const Incoming> receives);

  // From the MessageHandler.
  void OnMessage(const WireHeader& header, const void* data);
  void AfterProgress();

 private:
  // A message without its call, or an offer that could not be answered from inside UCP.
  struct Kept {
    WireHeader header;
    std::string data;  // empty for an offer
  };
  // Takes those of `kept_` whose call is under way.
  void TakeKept();
  void TakeMessage(const WireHeader& header, const void* data);
  void TakeOffer(const WireHeader& header);

  const int rank_;
  const int size_;
  Worker& worker_;
  RemoteReads& reads_;
  Health& health_;
  Inbox inbox_;
  int64_t calls_ = 0;
  std::vector<Kept> kept_;
  bool new_offers_ = false;
};

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_POST_OFFICE_H_
