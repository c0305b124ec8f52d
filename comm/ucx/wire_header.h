// What travels before the bytes of every message between two workers.
#ifndef COMM_UCX_WIRE_HEADER_H_
#define COMM_UCX_WIRE_HEADER_H_

#include <cstdint>

#include "comm/inbox.h"

namespace nsa::comm::ucx {

enum class MessageType : uint32_t {
  kData,          // of a collective call
  kPublished,     // the sender has published `epoch` of `window`
  kReleased,      // the sender has released `epoch` of `window`
  kFarewell,      // the sender leaves in good order; nothing of it comes after this
  kFarewellSeen,  // the answer: everything that came before the farewell is here
};

struct WireHeader {
  MessageType type;
  int32_t sender;
  int64_t window = 0;
  int64_t epoch = 0;
  MessageHeader data = {};  // of kData
};

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_WIRE_HEADER_H_
