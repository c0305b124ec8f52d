// The Bootstrap of a group whose ranks are connected to rank 0 by TCP: a star.
//
// A killed process loses its sockets at once, so its end of a link tells of its death within
// milliseconds. Rank 0 passes on what it learns. A stopped process and a cut link keep their
// sockets: those are found by deadlines.
#ifndef COMM_BOOTSTRAP_CONTROL_PLANE_H_
#define COMM_BOOTSTRAP_CONTROL_PLANE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "comm/bootstrap/bootstrap.h"
#include "comm/bootstrap/socket.h"

namespace nsa::comm {

class ControlPlane final : public Bootstrap {
 public:
  // `links`: of rank 0, one to each rank, its own invalid; of others, element 0 alone.
  static absl::StatusOr<std::unique_ptr<Bootstrap>> Create(int rank, int size,
                                                           std::vector<Fd> links);
  ~ControlPlane() override;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  absl::StatusOr<std::vector<std::string>> AllGather(absl::string_view mine, absl::Duration timeout,
                                                     absl::string_view call) override;
  void SetPeerHandler(std::function<void(const PeerEvent&)> handler) override;
  void Abort(absl::string_view reason) override;
  void Leave(const absl::Status& why) override;

 private:
  enum class FrameType : uint32_t {
    kContribution,  // to rank 0: a rank's part of an all-gather
    kGathered,      // from rank 0: all parts
    kWhoIsMissing,  // to rank 0: asked by a rank whose deadline has passed
    kMissing,       // from rank 0: the answer
    kDied,          // from rank 0
    kAborted,       // both ways, as are the rest
    kFailed,
    kLeft,
  };
  struct Frame {
    FrameType type;
    int32_t rank;    // whom it is about
    int64_t number;  // of the all-gather; of a kFailed, the status code
    std::string payload;
  };
  struct Link {
    int peer;
    Fd socket;
    std::string incoming;   // bytes not yet a whole frame; of the thread alone
    std::string outgoing;   // bytes not yet sent
    bool farewell = false;  // one side has said that it leaves: no more frames but those queued
    bool write_closed = false;
  };
  struct Gather {
    std::vector<std::optional<std::string>> parts;  // [size], at rank 0
    int num_parts = 0;
    std::vector<int> missing;  // answer of rank 0
    bool answered = false;
    bool complete = false;
    std::vector<std::string> result;
  };

  ControlPlane(int rank, int size, std::vector<Fd> links, Fd wake);

  void Run();
  void ReadLink(Link& link);
  void WriteLink(Link& link) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndLink(Link& link, absl::string_view how);

  void Handle(Link& link, Frame frame);
  void HandleContribution(Frame frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Announce(const PeerEvent& event) ABSL_LOCKS_EXCLUDED(mu_, handler_mu_);

  void Queue(Link& link, const Frame& frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // To every link but that of rank `except`.
  void QueueToAll(const Frame& frame, int except) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Wake();
  std::vector<int> MissingParts(const Gather& gather) const;
  Gather& GatherNumber(int64_t number) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int rank_;
  const int size_;
  const Fd wake_;  // an eventfd
  // The thread alone closes sockets and reads; others queue under mu_.
  std::vector<Link> links_;

  absl::Mutex mu_;
  absl::CondVar changed_;
  int64_t gathers_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<int64_t, Gather> pending_ ABSL_GUARDED_BY(mu_);
  absl::Status failure_ ABSL_GUARDED_BY(mu_);  // why no all-gather can complete any more
  int first_left_ ABSL_GUARDED_BY(mu_) = -1;   // likewise: a rank that left in good order
  bool said_farewell_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time close_by_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();  // set by the destructor

  absl::Mutex handler_mu_;
  std::vector<PeerEvent> events_ ABSL_GUARDED_BY(handler_mu_);
  std::function<void(const PeerEvent&)> handler_ ABSL_GUARDED_BY(handler_mu_);

  std::thread thread_;
};

}  // namespace nsa::comm

#endif  // COMM_BOOTSTRAP_CONTROL_PLANE_H_
