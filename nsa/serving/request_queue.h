// What a service's callers and its worker share: the queue of requests, the clients and their
// results. Errors are those of nsa/service.h.
#ifndef NSA_SERVING_REQUEST_QUEUE_H_
#define NSA_SERVING_REQUEST_QUEUE_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "nsa/service.h"
#include "nsa/serving/kv_cache.h"

namespace nsa::serving {

constexpr SequenceId kNoSequence = -1;

// All of it is the queue's own.
struct ClientState {
  bool keeps_sequences;
  bool is_gone = false;
  int64_t num_pending = 0;     // requests in the queue or in work
  std::deque<Result> results;  // not read
};

struct Request {
  enum class Kind {
    kStep,        // `decode` becomes rows of a step
    kFunction,    // `function` is run
    kCollective,  // `function` is run when all ranks have come to theirs
  };
  Kind kind = Kind::kStep;
  SequenceId sequence = kNoSequence;
  absl::Time deadline = absl::InfiniteFuture();
  DecodeRequest decode = {};
  std::function<absl::Status(KvCache&)> function = nullptr;

  // The queue's own.
  RequestId id = 0;  // in order of submission
  std::shared_ptr<ClientState> client = nullptr;
  bool has_waiter = false;                            // else the result is one of the client's
  std::optional<absl::Status> status = std::nullopt;  // for the waiter
};
using RequestPtr = std::shared_ptr<Request>;

// What the worker does next.
struct Round {
  bool stops = false;
  std::vector<RequestPtr> functions;  // to run in this order, then
  RequestPtr collective;              // null: none. Still in the queue, see TakeCollective
  std::vector<RequestPtr> batch;      // requests of one step
  int64_t arrivals = 0;               // see WaitForArrival
  bool has_ended_some = false;        // in the queue, by deadline, cancellation or stop

  bool is_idle() const { return functions.empty() && batch.empty() && !has_ended_some; }
};

class RequestQueue {
 public:
  enum class State { kServing, kDraining, kStopping, kStopped };

  RequestQueue(int64_t max_queued, int64_t max_unread, int64_t max_rows)
      : max_queued_(max_queued), max_unread_(max_unread), max_rows_(max_rows) {}

  // For callers.
  absl::StatusOr<std::shared_ptr<ClientState>> Connect(const ClientOptions& options);
  void Disconnect(const std::shared_ptr<ClientState>& client);
  absl::StatusOr<RequestId> Submit(const std::shared_ptr<ClientState>& client, Request request);
  // Submits, and waits until it is done or its deadline has passed in the queue.
  absl::Status Run(const std::shared_ptr<ClientState>& client, Request request);
  bool Cancel(const std::shared_ptr<ClientState>& client, RequestId id);
  absl::StatusOr<Result> Next(const std::shared_ptr<ClientState>& client, absl::Time deadline);
  // Counts a request that was refused before it came here.
  absl::Status Refuse(absl::Status error);
  absl::Status Drain(absl::Time deadline);
  void Stop();
  bool AwaitStopped(absl::Time deadline);
  // The clients' and the queue's part.
  void FillStats(ServiceStats& stats);
  State state();

  // For the worker.
  // At most `max_batch` sequences in the batch. A sequence's requests stay in order: those behind
  // one in the batch, or that found no room there, are left.
  Round Take(int64_t max_batch);
  // False when it is no longer there.
  bool TakeCollective(const Request& request);
  // Returns when there are arrivals that the round did not see, or after `timeout`.
  void WaitForArrival(int64_t seen, absl::Duration timeout);
  void Finish(Request& request, const absl::Status& status);
  // Puts requests that were taken back in their places.
  void Return(const std::vector<RequestPtr>& requests);
  void SetOwner(SequenceId sequence, const std::shared_ptr<ClientState>& client);
  void ForgetOwner(SequenceId sequence);
  void SetStopped();

 private:
  using Queue = std::map<RequestId, RequestPtr>;

  absl::Status Admit(const ClientState& client, const Request& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  RequestPtr Push(const std::shared_ptr<ClientState>& client, Request request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Count(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void End(Request& request, absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WaitUntilDone(const Request& request, absl::Time deadline)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const int64_t max_queued_;
  const int64_t max_unread_;
  const int64_t max_rows_;
  absl::Mutex mu_;
  State state_ ABSL_GUARDED_BY(mu_) = State::kServing;
  RequestId last_id_ ABSL_GUARDED_BY(mu_) = 0;
  Queue queue_ ABSL_GUARDED_BY(mu_);
  int64_t num_in_work_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t arrivals_ ABSL_GUARDED_BY(mu_) = 0;
  int32_t num_clients_ ABSL_GUARDED_BY(mu_) = 0;
  // Whose end closes which sequences.
  absl::flat_hash_map<SequenceId, std::shared_ptr<ClientState>> owners_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, int64_t> requests_by_code_ ABSL_GUARDED_BY(mu_);
};

}  // namespace nsa::serving

#endif  // NSA_SERVING_REQUEST_QUEUE_H_
