// What travels before the bytes of every message between two workers.
#ifndef COMM_UCX_WIRE_HEADER_H_
#define COMM_UCX_WIRE_HEADER_H_

#include <cstdint>

#include "comm/inbox.h"

namespace nsa::comm::ucx {

enum class MessageType : uint32_t {
  kData,          // of a collective call: `data`, and its bytes
  kOffer,         // of a collective call: `data`, whose bytes are to be read from `memory`
  kRefusal,       // the bytes of the offer `memory` are not wanted
  kReadRequest,   // asks for `num_bytes` at `offset` of `memory`, as `request`
  kReadChunk,     // bytes for `request`, at `offset` of what it asked for
  kPublished,     // the sender has published `epoch` of window `memory`
  kReleased,      // the sender has released `epoch` of window `memory`
  kFarewell,      // the sender leaves in good order; nothing of it comes after this
  kFarewellSeen,  // the answer: everything that came before the farewell is here
};

struct WireHeader {
  MessageType type;
  int32_t sender;
  int64_t memory = 0;  // a window's number, or below 0 an offer's; of the sender or the receiver
  int64_t epoch = 0;
  int64_t request = 0;
  int64_t offset = 0;
  int64_t num_bytes = 0;
  MessageHeader data = {};
};

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_WIRE_HEADER_H_
