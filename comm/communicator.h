// Moving bytes between the ranks of one context-parallel group. Knows nothing of attention.
//
// Every rank makes the same collective calls in the same order. A call with a `stream` enqueues its
// work there and returns OK when enqueued; host backends ignore `stream` and have finished when
// they return. One thread of a rank calls at a time; Abort, HealthCheck and LostRanks may
// come from any thread.
//
// Errors. Every wait has the communicator's deadline (`timeout`):
//   DeadlineExceeded  a peer did not arrive; the message names who waited for whom, in which call;
//                     a rank may hear of it from the one that waited first
//   Unavailable       a peer died or a link broke; the message names its rank
//   InvalidArgument   the arguments break a rule; nothing was sent
//   Aborted           some rank called Abort; the message carries its rank and reason
//   FailedPrecondition  ranks are in different calls; the message names both
//   ResourceExhausted   CreateWindow: some rank has no memory; the group goes on
// After any of these but InvalidArgument and CreateWindow's the communicator is broken for good:
// waiting and later calls on this rank return the same first error at once, and peers learn of it
// or run into their deadline.
#ifndef COMM_COMMUNICATOR_H_
#define COMM_COMMUNICATOR_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace nsa::comm {

// A range of an all-gathered buffer and the rank that provides it.
struct GatherRun {
  int32_t rank;
  int64_t offset_bytes;
  int64_t num_bytes;
};

struct SendOp {
  int32_t peer;
  const void* data;
  int64_t num_bytes;
};

struct RecvOp {
  int32_t peer;
  void* data;
  int64_t num_bytes;
};

// Equal-sized records to read from peers' windows. The arrays lie in the backend's memory (device
// memory where peers are load/store reachable), so that a kernel can make them without a host wait.
// They must stay as they are until what Gather has enqueued is done.
struct GatherList {
  const int32_t* peers;    // [max_count] rank to read from; the own rank is allowed
  const int64_t* offsets;  // [max_count] byte offset in that rank's window
  const int32_t* count;    // scalar, at most max_count
  int64_t max_count;
};

// A piece of memory of every rank, readable by all, used in epochs:
//   BeginWrite   waits until every rank released the epoch before; local memory may now be written
//   Publish      what this rank wrote may now be read
//   Gather       waits for the Publish of the ranks it reads, copies their records
//   Release      this rank reads no more in this epoch
// Each rank goes through the four in this order (any number of Gathers, also none); a call out of
// order is InvalidArgument. Between its Publish and its Release a rank makes no collective call,
// nor begins an epoch of another window: where ranks cannot load each other's memory, Gather and
// Release are where it serves others. A window must be destroyed before its communicator.
// Destruction is local and counts as Release, of this epoch and of all that others go on to.
class Window {
 public:
  virtual ~Window() = default;
  virtual void* data() = 0;               // this rank's memory, 256-byte aligned
  virtual int64_t num_bytes() const = 0;  // of this rank; may differ between ranks, may be 0
  // Where this rank's threads, or its device's kernels, load and store `rank`'s memory, outside of
  // epochs as in them; null where they cannot. Valid as long as the window, also when `rank` has
  // died. In order with that rank's own use only by other means (such as a Barrier).
  virtual void* PeerData(int rank) = 0;

  virtual absl::Status BeginWrite(void* stream) = 0;
  virtual absl::Status Publish(void* stream) = 0;
  // Record i goes to dst + i * record_bytes. An offset outside the peer's window is
  // InvalidArgument.
  virtual absl::Status Gather(const GatherList& list, int64_t record_bytes, void* dst,
                              void* stream) = 0;
  virtual absl::Status Release(void* stream) = 0;
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  // The deadline of every wait.
  virtual absl::Duration timeout() const = 0;

  // In place: each rank has filled its own runs of `buffer`; afterwards all runs are filled. All
  // ranks pass the same runs; runs do not overlap; any number a rank, also none.
  virtual absl::Status AllGather(void* buffer, absl::Span<const GatherRun> runs, void* stream) = 0;

  // Grouped point-to-point. The i-th send from a to b meets the i-th receive of b from a, whose
  // size must be equal (else InvalidArgument on the receiver). Self-sends are allowed.
  virtual absl::Status Exchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                                void* stream) = 0;

  // Collective: `num_bytes` of this rank's own memory (allocated here, zeroed) becomes readable by
  // all. ResourceExhausted, on all ranks when one has too little, names bytes asked.
  virtual absl::StatusOr<std::unique_ptr<Window>> CreateWindow(int64_t num_bytes) = 0;

  // Collective on the host, for small control data of any size per rank: element r of the result is
  // what rank r passed.
  virtual absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) = 0;
  // Collective on the host: returns when all ranks have called it.
  virtual absl::Status Barrier() = 0;

  // OK, or the error that broke the communicator. Local, never waits.
  virtual absl::Status HealthCheck() = 0;
  // Ranks that this rank knows to have died or to be cut off. Local, never waits.
  virtual std::vector<int> LostRanks() = 0;
  // Breaks the communicator on every reachable rank: waits in progress and later calls return
  // Aborted with this rank and `reason`. Never waits for a peer.
  virtual void Abort(absl::string_view reason) = 0;
};

}  // namespace nsa::comm

#endif  // COMM_COMMUNICATOR_H_
