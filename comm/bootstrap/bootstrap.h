// How the ranks of a group first find each other, and how they learn that one is gone.
//
// A Bootstrap is made by one of the functions of this folder (TCP rendezvous, MPI), collectively.
// It then belongs to one communicator, which uses AllGather to hand round what its transport needs.
#ifndef COMM_BOOTSTRAP_BOOTSTRAP_H_
#define COMM_BOOTSTRAP_BOOTSTRAP_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace nsa::comm {

struct PeerEvent {
  enum class Kind {
    kDied,     // its process ended, or its host cannot be reached, without a word
    kAborted,  // it called Abort
    kFailed,   // it left because it was broken
    kLeft,     // it left in good order
  };
  Kind kind;
  int rank;
  absl::Status error;  // what the event means to this rank; OK for kLeft
};

class Bootstrap {
 public:
  // Leaves in good order unless Leave was called. Takes a second at most.
  virtual ~Bootstrap() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;

  // Collective: element r of the result is what rank r passed. For small data: all of it passes
  // through rank 0. `call` names the caller in errors. One thread of a rank calls at a time.
  //   DeadlineExceeded  names the ranks that did not come
  //   else              the error of the event that keeps a rank from coming
  virtual absl::StatusOr<std::vector<std::string>> AllGather(absl::string_view mine,
                                                             absl::Duration timeout,
                                                             absl::string_view call) = 0;

  // `handler` is called for every event of a peer, earlier ones first, one at a time, from a thread
  // of the bootstrap, before an AllGather ends by the event; it must not call the bootstrap. With
  // nullptr no call is in progress when this returns, nor will there be one.
  //
  // Events pass through rank 0. Once rank 0 has left in good order no more come: the others then
  // notice a death by their transport or their deadlines.
  virtual void SetPeerHandler(std::function<void(const PeerEvent&)> handler) = 0;

  // Tells all peers that this rank aborts, or leaves because of `why` (OK: in good order).
  // Thread-safe and without waiting. After Leave nothing is sent any more.
  virtual void Abort(absl::string_view reason) = 0;
  virtual void Leave(const absl::Status& why) = 0;
};

}  // namespace nsa::comm

#endif  // COMM_BOOTSTRAP_BOOTSTRAP_H_
