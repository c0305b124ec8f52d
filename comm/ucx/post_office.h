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
#include "comm/ucx/worker.h"

namespace nsa::comm::ucx {

// All methods but Transfer are called with the worker's mutex held.
class PostOffice {
 public:
  PostOffice(int rank, int size, Worker* worker, Health* health)
      : rank_(rank), size_(size), worker_(*worker), health_(*health), inbox_(rank, size) {}

  // As HostCommunicator::Transfer.
  absl::Status Transfer(CallKind kind, absl::Span<const SendOp> sends,
                        absl::Span<const Incoming> receives);

  // From the MessageHandler.
  void OnMessage(const MessageHeader& header, const void* data);
  void OnOffer(const MessageHeader& header, void* offer);
  void OnReceived(const MessageHeader& header) { inbox_.Delivered(header); }
  void AfterProgress();

  // Refuses what has been offered and not received. Before the worker stops.
  void Close();

 private:
  // A message without its call, or an offer that could not be answered from inside UCP.
  struct Kept {
    MessageHeader header;
    std::string data;
    void* offer = nullptr;  // if set, the bytes are still at the sender
  };
  // Takes those of `kept_` whose call is under way.
  void TakeKept();

  const int rank_;
  const int size_;
  Worker& worker_;
  Health& health_;
  Inbox inbox_;
  int64_t calls_ = 0;
  std::vector<Kept> kept_;
  bool new_offers_ = false;
};

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_POST_OFFICE_H_
