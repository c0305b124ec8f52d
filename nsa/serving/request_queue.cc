#include "nsa/serving/request_queue.h"

#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "nsa/serving/step_buffers.h"

namespace nsa::serving {
namespace {

absl::Status ShutDown() { return absl::UnavailableError("the service is shut down"); }

// Waits until `holds`, a callable, is true under the mutex; false when `deadline` came first.
template <typename Holds>
bool AwaitUntil(absl::Mutex& mu, const Holds& holds, absl::Time deadline)
    ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
  return mu.AwaitWithDeadline(absl::Condition(&holds), deadline);
}

}  // namespace

absl::StatusOr<std::shared_ptr<ClientState>> RequestQueue::Connect(const ClientOptions& options) {
  absl::MutexLock lock(&mu_);
  if (state_ == State::kDraining) return absl::UnavailableError("the service is draining");
  if (state_ != State::kServing) return ShutDown();
  ++num_clients_;
  auto client = std::make_shared<ClientState>();
  client->keeps_sequences = options.keeps_sequences;
  return client;
}

void RequestQueue::Disconnect(const std::shared_ptr<ClientState>& client) {
  absl::MutexLock lock(&mu_);
  client->is_gone = true;
  for (auto it = queue_.begin(); it != queue_.end();) {
    const RequestPtr request = it->second;
    if (request->client != client) {
      ++it;
      continue;
    }
    it = queue_.erase(it);
    End(*request, absl::CancelledError("the client went away"));
  }
  AwaitUntil(
      mu_, [&] { return client->num_pending == 0; }, absl::InfiniteFuture());

  std::vector<RequestPtr> closings;
  for (const auto& [sequence, owner] : owners_) {
    if (owner != client || state_ >= State::kStopping) continue;
    const SequenceId id = sequence;
    Request closing = {.kind = Request::Kind::kFunction, .sequence = id};
    closing.function = [id](KvCache& cache) { return cache.Close(id); };
    closing.has_waiter = true;
    closings.push_back(Push(client, std::move(closing)));
  }
  for (const RequestPtr& closing : closings) {
    WaitUntilDone(*closing, absl::InfiniteFuture());
    owners_.erase(closing->sequence);
  }
  --num_clients_;
}

absl::StatusOr<RequestId> RequestQueue::Submit(const std::shared_ptr<ClientState>& client,
                                               Request request) {
  absl::MutexLock lock(&mu_);
  if (absl::Status refused = Admit(*client, request); !refused.ok()) return Count(refused);
  return Push(client, std::move(request))->id;
}

absl::Status RequestQueue::Run(const std::shared_ptr<ClientState>& client, Request request) {
  request.has_waiter = true;
  absl::MutexLock lock(&mu_);
  if (absl::Status refused = Admit(*client, request); !refused.ok()) return Count(refused);
  const RequestPtr pushed = Push(client, std::move(request));
  WaitUntilDone(*pushed, pushed->deadline);
  return *pushed->status;
}

bool RequestQueue::Cancel(const std::shared_ptr<ClientState>& client, RequestId id) {
  absl::MutexLock lock(&mu_);
  const auto it = queue_.find(id);
  if (it == queue_.end() || it->second->client != client) return false;
  const RequestPtr request = it->second;
  queue_.erase(it);
  End(*request, absl::CancelledError("the client cancelled it"));
  return true;
}

absl::StatusOr<Result> RequestQueue::Next(const std::shared_ptr<ClientState>& client,
                                          absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  auto has_news = [&] {
    mu_.AssertHeld();
    return !client->results.empty() || (state_ == State::kStopped && client->num_pending == 0);
  };
  if (!AwaitUntil(mu_, has_news, deadline)) {
    return absl::DeadlineExceededError(
        absl::StrCat("no result, of ", client->num_pending, " requests that are to have one"));
  }
  if (client->results.empty()) return ShutDown();
  Result result = std::move(client->results.front());
  client->results.pop_front();
  return result;
}

absl::Status RequestQueue::Refuse(absl::Status error) {
  absl::MutexLock lock(&mu_);
  return Count(std::move(error));
}

absl::Status RequestQueue::Drain(absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  if (state_ == State::kServing) state_ = State::kDraining;
  auto is_empty = [&] {
    mu_.AssertHeld();
    return queue_.empty() && num_in_work_ == 0;
  };
  if (AwaitUntil(mu_, is_empty, deadline)) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat("requests left: ", queue_.size(), " in the queue, ", num_in_work_, " in work"));
}

void RequestQueue::Stop() {
  absl::MutexLock lock(&mu_);
  if (state_ < State::kStopping) state_ = State::kStopping;
  ++arrivals_;
}

bool RequestQueue::AwaitStopped(absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  auto is_stopped = [&] {
    mu_.AssertHeld();
    return state_ == State::kStopped;
  };
  return AwaitUntil(mu_, is_stopped, deadline);
}

void RequestQueue::FillStats(ServiceStats& stats) {
  absl::MutexLock lock(&mu_);
  stats.set_clients(num_clients_);
  stats.set_queue_depth(static_cast<int64_t>(queue_.size()));
  for (const auto& [code, count] : requests_by_code_) {
    (*stats.mutable_requests_by_code())[code] = count;
  }
}

RequestQueue::State RequestQueue::state() {
  absl::MutexLock lock(&mu_);
  return state_;
}

Round RequestQueue::Take(int64_t max_batch) {
  absl::MutexLock lock(&mu_);
  Round round;
  round.stops = state_ >= State::kStopping;
  round.arrivals = arrivals_;
  const absl::Time now = absl::Now();
  absl::flat_hash_set<SequenceId> held;  // whose further requests wait for a later round
  int64_t num_rows = 0;
  for (auto it = queue_.begin(); it != queue_.end();) {
    const RequestPtr request = it->second;
    const bool is_late = request->deadline <= now;
    if (round.stops || is_late) {
      it = queue_.erase(it);
      End(*request, is_late ? absl::DeadlineExceededError("the deadline passed in the queue")
                            : absl::CancelledError("the service shuts down"));
      round.has_ended_some = true;
      continue;
    }
    bool is_taken = false;
    if (request->kind == Request::Kind::kCollective) {
      if (round.collective == nullptr) round.collective = request;
    } else if (!held.contains(request->sequence)) {
      if (request->kind == Request::Kind::kFunction) {
        round.functions.push_back(request);
        is_taken = true;
      } else {
        held.insert(request->sequence);
        const int64_t new_rows = NumTokens(request->decode);
        is_taken = static_cast<int64_t>(round.batch.size()) < max_batch &&
                   num_rows + new_rows <= max_rows_;
        if (is_taken) {
          round.batch.push_back(request);
          num_rows += new_rows;
        }
      }
    }
    if (is_taken) ++num_in_work_;
    it = is_taken ? queue_.erase(it) : std::next(it);
  }
  return round;
}

bool RequestQueue::TakeCollective(const Request& request) {
  absl::MutexLock lock(&mu_);
  if (queue_.erase(request.id) == 0) return false;
  ++num_in_work_;
  return true;
}

void RequestQueue::WaitForArrival(int64_t seen, absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  auto has_more = [&] {
    mu_.AssertHeld();
    return arrivals_ != seen;
  };
  AwaitUntil(mu_, has_more, absl::Now() + timeout);
}

void RequestQueue::Finish(Request& request, const absl::Status& status) {
  absl::MutexLock lock(&mu_);
  --num_in_work_;
  End(request, status);
}

void RequestQueue::Return(const std::vector<RequestPtr>& requests) {
  absl::MutexLock lock(&mu_);
  for (const RequestPtr& request : requests) {
    --num_in_work_;
    if (request->client->is_gone) {
      End(*request, absl::CancelledError("the client went away"));
    } else {
      queue_.emplace(request->id, request);
    }
  }
}

void RequestQueue::SetOwner(SequenceId sequence, const std::shared_ptr<ClientState>& client) {
  absl::MutexLock lock(&mu_);
  if (!client->keeps_sequences) owners_[sequence] = client;
}

void RequestQueue::ForgetOwner(SequenceId sequence) {
  absl::MutexLock lock(&mu_);
  owners_.erase(sequence);
}

void RequestQueue::SetStopped() {
  absl::MutexLock lock(&mu_);
  state_ = State::kStopped;
}

absl::Status RequestQueue::Admit(const ClientState& client, const Request& request) {
  if (state_ == State::kDraining) return absl::UnavailableError("the service is draining");
  if (state_ != State::kServing) return ShutDown();
  // A collective must not fail on one rank alone.
  const bool is_limited = request.kind != Request::Kind::kCollective;
  if (is_limited && static_cast<int64_t>(queue_.size()) >= max_queued_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the queue is full: max_queued = ", max_queued_, " requests"));
  }
  const int64_t num_unread = client.num_pending + static_cast<int64_t>(client.results.size());
  if (!request.has_waiter && num_unread >= max_unread_) {
    return absl::ResourceExhaustedError(absl::StrCat("the client has ", client.results.size(),
                                                     " results to read and ", client.num_pending,
                                                     " to come: max_unread = ", max_unread_));
  }
  return absl::OkStatus();
}

RequestPtr RequestQueue::Push(const std::shared_ptr<ClientState>& client, Request request) {
  request.id = ++last_id_;
  request.client = client;
  ++client->num_pending;
  ++arrivals_;
  auto pushed = std::make_shared<Request>(std::move(request));
  queue_.emplace(pushed->id, pushed);
  return pushed;
}

absl::Status RequestQueue::Count(absl::Status status) {
  ++requests_by_code_[absl::StatusCodeToString(status.code())];
  return status;
}

void RequestQueue::End(Request& request, absl::Status status) {
  Count(status).IgnoreError();
  --request.client->num_pending;
  if (request.has_waiter) {
    request.status = std::move(status);
  } else if (!request.client->is_gone) {
    request.client->results.push_back({request.id, std::move(status)});
  }
}

void RequestQueue::WaitUntilDone(const Request& request, absl::Time deadline) {
  auto is_done = [&] { return request.status.has_value(); };
  if (AwaitUntil(mu_, is_done, deadline)) return;
  if (const auto it = queue_.find(request.id); it != queue_.end()) {
    const RequestPtr late = it->second;
    queue_.erase(it);
    End(*late, absl::DeadlineExceededError("the deadline passed in the queue"));
    return;
  }
  AwaitUntil(mu_, is_done, absl::InfiniteFuture());  // it is in work
}

}  // namespace nsa::serving
