// What kernels, peers and the host tell each other. Plain data, seen by .cu and .cc files alike.
#ifndef COMM_NCCL_SIGNALS_H_
#define COMM_NCCL_SIGNALS_H_

#include <cstdint>

namespace nsa::comm::nccl {

// Of a group whose ranks load and store each other's memory.
inline constexpr int kMaxRanks = 128;

// Which call a kernel waits in.
enum class WaitingCall : uint32_t { kAllGather, kExchange, kBeginWrite, kGather };

enum class FaultKind : uint32_t { kNone, kTimeout, kPeerLeft };

// In host memory that the device maps. A kernel that waits looks here now and then, so that the
// host can end the wait; a kernel that gives up writes why.
struct FaultBoard {
  // By the host.
  uint32_t broken;           // 1: every wait ends
  uint32_t left[kMaxRanks];  // 1: that rank destroyed its communicator in good order
  // By the device, `fault` last.
  uint32_t fault;  // FaultKind
  uint32_t call;   // WaitingCall
  uint32_t awaited[kMaxRanks];
};

enum class ListFaultKind : uint32_t { kNone, kCount, kPeer, kOffset, kNull };

// In host memory that the device maps: the first bad record of a Gather, `kind` last.
struct ListFault {
  int64_t index;
  int64_t value;
  int64_t record_bytes;
  int32_t peer;
  uint32_t kind;  // ListFaultKind
};

// At the end of every rank's window. Peers write here, the owner polls its own memory.
struct WindowSignals {
  int64_t published[kMaxRanks];  // the last epoch that rank has published
  int64_t released[kMaxRanks];   // the last epoch that rank has released
  int64_t epoch;                 // of the owner; counted here so that graphs replay
};

// Of the communicator. Behind it lie two staging areas, of meetings of odd and even number.
struct MeetingSignals {
  int64_t met[kMaxRanks];  // the number of the last meeting that rank has come to
  // Of the owner.
  int64_t count;    // of meetings; counted here so that graphs replay
  uint32_t staged;  // how many CTAs of the meeting under way have copied what the rank provides
};

// Memory of all ranks, as kernels see it.
struct PeerMemory {
  char* const* bases;      // [size] device array: where each rank's memory lies for this one
  int64_t signals_offset;  // of WindowSignals or MeetingSignals in each rank's memory
  int32_t rank;
  int32_t size;
  FaultBoard* board;
  uint64_t limit_ns;  // of one wait
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_SIGNALS_H_
