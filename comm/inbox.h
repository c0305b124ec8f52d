// Pairing of incoming messages with the receives of a collective call.
//
// A rank counts its collective calls; a message carries its call's number and kind, its place among
// the messages of that call to the same receiver, and how many those are. So a message that comes
// before its call is known to be early, and ranks that make different calls are found out.
#ifndef COMM_INBOX_H_
#define COMM_INBOX_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace nsa::comm {

enum class CallKind : uint8_t {
  kAllGather,
  kExchange,
  kHostAllGather,
  kBarrier,
  kCreateWindow,
  kWindowRound,  // of windows that are read when all ranks are in a Gather or Release
};
absl::string_view CallName(CallKind kind);

struct MessageHeader {
  int64_t call;  // counts from 1
  int64_t num_bytes;
  int32_t sender;
  int32_t index;  // among the sender's messages to this rank in this call
  int32_t count;  // of those messages
  CallKind kind;
};

// One receive. With `blob` set a message of any size is taken into it, else num_bytes into data.
struct Incoming {
  int32_t peer;
  void* data;
  int64_t num_bytes;
  std::string* blob;
};

// Not thread-safe.
class Inbox {
 public:
  Inbox(int rank, int size) : rank_(rank), slots_(size), mismatched_call_(size, 0) {}

  // Starts call number `call`, larger than every one before.
  void Begin(int64_t call, CallKind kind, absl::Span<const Incoming> receives);

  enum class Fate {
    kDeliver,  // put its bytes at Destination, then call Delivered
    kEarly,    // keep it and offer it again after the next Begin
    kDrop,     // its arguments do not match: drop the bytes; Finish will say why
    kBreak,    // the ranks have lost step, see violation(): break the communicator
  };
  Fate Offer(const MessageHeader& header);
  void* Destination(const MessageHeader& header);
  void Delivered(const MessageHeader& header);

  // All receives of the call are done.
  bool done() const { return missing_ == 0; }
  // Ranks with messages still missing, ascending.
  std::vector<int> Awaited() const;
  // Ends the call: OK or the first InvalidArgument.
  absl::Status Finish();

  const absl::Status& violation() const { return violation_; }

 private:
  struct Slot {
    Incoming receive;
    bool done = false;
  };
  Fate Mismatch(const MessageHeader& header, std::string message);
  void MarkDone(Slot& slot);

  const int rank_;
  int64_t call_ = 0;
  bool active_ = false;
  CallKind kind_ = CallKind::kBarrier;
  int64_t missing_ = 0;
  std::vector<std::vector<Slot>> slots_;  // [size][receives from that rank]
  // [size] the last call in which a rank's messages did not match: the rest of them are dropped.
  std::vector<int64_t> mismatched_call_;
  absl::Status invalid_;
  absl::Status violation_;
};

}  // namespace nsa::comm

#endif  // COMM_INBOX_H_
