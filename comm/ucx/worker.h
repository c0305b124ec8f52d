// One UCP worker with an endpoint to every peer: sending, reading, waiting.
//
// One mutex guards the worker and everything its callbacks touch. Two threads drive it. A caller
// that waits first polls for some microseconds, then sleeps on a condition variable. A progress
// thread sleeps on the worker's event descriptor, so that peers are served while the rank computes
// (over TCP a read of a window is a message that somebody must answer) and sleeping callers are
// woken.
#ifndef COMM_UCX_WORKER_H_
#define COMM_UCX_WORKER_H_

#include <ucp/api/ucp.h>

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "comm/health.h"
#include "comm/ucx/context.h"
#include "comm/ucx/handles.h"
#include "comm/ucx/wire_header.h"

namespace nsa::comm::ucx {

struct WorkerOptions {
  // As ChooseTransports gives them, and UCX_NET_DEVICES.
  std::string tls;
  std::string net_devices;
  absl::Duration poll_time;
  // Use the transports for CUDA memory too, if UCX has them.
  bool cuda = false;
};

// Takes what arrives. Called with the worker's mutex held.
class MessageHandler {
 public:
  virtual ~MessageHandler() = default;
  // `data` is gone afterwards. From inside UCP: must not send.
  virtual void OnMessage(const WireHeader& header, const void* data, size_t num_bytes) = 0;
  // A chunk of `memory` is on its way and its bytes are no longer needed. From inside UCP likewise.
  virtual void OnChunkSent(int64_t memory, int64_t num_bytes) = 0;
  // Outside of UCP, when something may have arrived: what the others had to put off.
  virtual void AfterProgress() = 0;
  // The communicator is broken: the caller's memory must not be touched any more.
  virtual void OnAbandon() = 0;
};

class Worker {
 public:
  static absl::StatusOr<std::unique_ptr<Worker>> Create(int rank, int size,
                                                        const WorkerOptions& options,
                                                        Health* health);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  absl::StatusOr<std::string> Address();
  // Makes the endpoints and starts the progress thread. `handler` must outlive Stop.
  absl::Status Connect(absl::Span<const std::string> addresses, MessageHandler* handler);
  // Ends the endpoints and the progress thread: no call of the handler is made afterwards. In good
  // order when `gracefully`, within a bounded time; else at once.
  void Stop(bool gracefully);

  absl::Mutex& mu() ABSL_LOCK_RETURNED(mu_) { return mu_; }
  // True if a worker that is not driven leaves the caller's memory alone.
  bool copies_only_when_driven() const { return copies_only_when_driven_; }
  // True if peers can read CUDA memory of this rank, and reads can go there.
  bool moves_cuda_memory() const { return moves_cuda_memory_; }
  ucp_context_h context() const { return context_.get(); }
  ucp_ep_h endpoint(int peer) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return peers_[peer].endpoint;
  }

  // What a wait is for. Send and Get are unfinished until they have gone well; the handler counts
  // its own undertakings with a peer.
  void Send(int peer, const WireHeader& header, const void* data, int64_t num_bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Get(int peer, void* dst, int64_t num_bytes, uint64_t remote_address, ucp_rkey_h rkey)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void BeginUnfinished(int peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndUnfinished(int peer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  int64_t unfinished() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return unfinished_; }
  int64_t gets_in_flight() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return gets_in_flight_; }
  std::vector<int> UnfinishedRanks() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Sends a header alone and forgets it.
  void Post(int peer, const WireHeader& header) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Sends bytes of `header.memory`, and reports OnChunkSent.
  void SendChunk(int peer, const WireHeader& header, const void* data, int64_t num_bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // After the last of some of these outside of Wait: what could not go at once is left to the
  // progress thread.
  void Kick() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Waits until done(). Else breaks the communicator: with what broke it meanwhile; for a rank
  // among awaited() that has left or whose link is broken; at the deadline. After an error no
  // operation touches the caller's memory any more.
  absl::Status Wait(absl::string_view call, absl::FunctionRef<bool()> done,
                    absl::FunctionRef<std::vector<int>()> awaited)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The deadline of later waits.
  void SetTimeout(absl::Duration timeout) ABSL_LOCKS_EXCLUDED(mu_);
  // The same up to `deadline`, for ends: false instead of an error.
  bool WaitUntil(absl::Time deadline, absl::FunctionRef<bool()> done)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // `rank` has left in good order: waits for it are in vain, errors on its link are expected.
  void MarkLeft(int rank) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool has_left(int rank) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return peers_[rank].left; }
  // Wakes waits, after a change from outside, such as an error put into Health.
  void WakeAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { changed_.SignalAll(); }

 private:
  struct Peer {
    Worker* worker = nullptr;
    int rank = -1;
    ucp_ep_h endpoint = nullptr;
    int64_t unfinished = 0;
    bool left = false;
    ucs_status_t link_error = UCS_OK;
    absl::Time link_error_time;
  };
  enum class Purpose { kSend, kGet, kPost, kChunk };
  // What a request needs while it is under way. Recycled.
  struct Operation {
    Worker* worker;
    int peer;
    Purpose purpose;
    int64_t num_bytes;
    WireHeader header;  // sent from here
  };

  Worker(int rank, int size, const WorkerOptions& options, Health* health);

  void RunProgress();
  // Lets UCP work. True if anything happened.
  bool Progress() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // True if everything is handled and the next event will wake the progress thread.
  bool Arm() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Progress until there is no more to do. True if any work was done; `armed` as Arm, false only
  // when sends are queued for a peer that does not take them.
  bool ProgressAndArm(bool& armed) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WakeProgressThread();

  Operation* NewOperation(int peer, Purpose purpose, int64_t num_bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SendMessage(Operation* operation, const WireHeader& header, const void* data)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Looks at what a UCP call returned.
  void Started(Operation* operation, ucs_status_ptr_t request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Finished(Operation* operation, ucs_status_t status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NoteLinkError(Peer& peer, ucs_status_t status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // OK to go on waiting; lowers `wake` to when this must be asked again.
  absl::Status CheckAwaited(absl::string_view call, absl::Span<const int> awaited,
                            absl::Time deadline, absl::Time& wake)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CloseEndpoints(bool gracefully) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Stops driving UCP for good.
  void Freeze() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Takes the caller's memory back from UCP.
  void Abandon() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // UCP's callbacks; they run inside Progress and calls to UCP, with the mutex held.
  static void OnSent(void* request, ucs_status_t status, void* operation);
  static ucs_status_t OnActiveMessage(void* worker, const void* header, size_t header_length,
                                      void* data, size_t length, const ucp_am_recv_param_t* param);
  static void OnLinkError(void* peer, ucp_ep_h endpoint, ucs_status_t status);

  const int rank_;
  const WorkerOptions options_;
  bool copies_only_when_driven_;
  bool moves_cuda_memory_ = false;
  Health* const health_;
  MessageHandler* handler_ = nullptr;

  Context context_;
  int event_fd_ = -1;  // of the worker, owned by it
  int wake_fd_ = -1;   // an eventfd
  std::thread thread_;

  absl::Mutex mu_;
  absl::CondVar changed_;
  WorkerHandle worker_;
  absl::Duration timeout_ ABSL_GUARDED_BY(mu_);
  std::vector<Peer> peers_ ABSL_GUARDED_BY(mu_);  // [size]; addresses are handed to UCP
  std::vector<std::unique_ptr<Operation>> operations_ ABSL_GUARDED_BY(mu_);
  std::vector<Operation*> free_operations_ ABSL_GUARDED_BY(mu_);
  int64_t unfinished_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t gets_in_flight_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t outstanding_ ABSL_GUARDED_BY(mu_) = 0;  // UCP may still touch their memory
  bool frozen_ ABSL_GUARDED_BY(mu_) = false;      // UCP is not to be driven any more
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_WORKER_H_
