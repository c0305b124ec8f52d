#include "comm/ucx/worker.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/errors.h"

namespace nsa::comm::ucx {
namespace {

constexpr unsigned kActiveMessageId = 1;
// A broken link is seldom the whole story: the control plane tells within this time whose death it
// was.
constexpr absl::Duration kLinkErrorGrace = absl::Milliseconds(500);
// How long UCP may take to end operations and endpoints on links that are gone.
constexpr absl::Duration kCloseTime = absl::Seconds(2);
// UCP cannot sleep while sends are queued for a peer that does not take them: look again this
// often.
constexpr absl::Duration kBusyPause = absl::Microseconds(200);
constexpr int kArmAttempts = 4;

}  // namespace

Worker::Worker(int rank, int size, const WorkerOptions& options, Health* health)
    : rank_(rank),
      options_(options),
      copies_only_when_driven_(AreHostTransports(options.tls)),
      health_(health),
      peers_(size) {
  for (int peer = 0; peer < size; ++peer) {
    peers_[peer].worker = this;
    peers_[peer].rank = peer;
  }
}

absl::StatusOr<std::unique_ptr<Worker>> Worker::Create(int rank, int size,
                                                       const WorkerOptions& options,
                                                       Health* health) {
  std::unique_ptr<Worker> worker(new Worker(rank, size, options, health));
  absl::StatusOr<Context> context =
      options.cuda ? MakeContext(absl::StrCat(options.tls, ",", kCudaTransports),
                                 options.net_devices, /*copied_sends=*/false)
                   : MakeContext(options.tls, options.net_devices, /*copied_sends=*/true);
  if (options.cuda && context.ok() && MovesCudaMemory(context->get())) {
    worker->moves_cuda_memory_ = true;
    worker->copies_only_when_driven_ = false;
  } else if (options.cuda) {
    context = MakeContext(options.tls, options.net_devices, /*copied_sends=*/true);
  }
  if (!context.ok()) return context.status();
  worker->context_ = *std::move(context);

  ucp_worker_params_t params = {};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  ucp_worker_h handle = nullptr;
  if (ucs_status_t s = ucp_worker_create(worker->context_.get(), &params, &handle); s != UCS_OK) {
    return UcsError("ucp_worker_create", s);
  }
  worker->worker_.reset(handle);
  if (ucs_status_t s = ucp_worker_get_efd(handle, &worker->event_fd_); s != UCS_OK) {
    return UcsError("ucp_worker_get_efd", s);
  }
  worker->wake_fd_ = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  if (worker->wake_fd_ < 0) return absl::ResourceExhaustedError("eventfd: no descriptor left");

  ucp_am_handler_param_t handler = {};
  handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_CB |
                       UCP_AM_HANDLER_PARAM_FIELD_ARG;
  handler.id = kActiveMessageId;
  handler.cb = &Worker::OnActiveMessage;
  handler.arg = worker.get();
  if (ucs_status_t s = ucp_worker_set_am_recv_handler(handle, &handler); s != UCS_OK) {
    return UcsError("ucp_worker_set_am_recv_handler", s);
  }
  return worker;
}

Worker::~Worker() {
  Stop(/*gracefully=*/false);
  if (wake_fd_ >= 0) close(wake_fd_);
}

absl::StatusOr<std::string> Worker::Address() {
  ucp_address_t* address = nullptr;
  size_t length = 0;
  if (ucs_status_t s = ucp_worker_get_address(worker_.get(), &address, &length); s != UCS_OK) {
    return UcsError("ucp_worker_get_address", s);
  }
  std::string bytes(reinterpret_cast<const char*>(address), length);
  ucp_worker_release_address(worker_.get(), address);
  return bytes;
}

absl::Status Worker::Connect(absl::Span<const std::string> addresses, MessageHandler* handler) {
  absl::MutexLock lock(&mu_);
  handler_ = handler;
  for (Peer& peer : peers_) {
    if (peer.rank == rank_) continue;
    ucp_ep_params_t params = {};
    params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                        UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.address = reinterpret_cast<const ucp_address_t*>(addresses[peer.rank].data());
    params.err_mode = UCP_ERR_HANDLING_MODE_PEER;
    params.err_handler.cb = &Worker::OnLinkError;
    params.err_handler.arg = &peer;
    if (ucs_status_t s = ucp_ep_create(worker_.get(), &params, &peer.endpoint); s != UCS_OK) {
      peer.endpoint = nullptr;
      return absl::UnavailableError(absl::StrCat("connecting rank ", rank_, " to rank ", peer.rank,
                                                 ": ucp_ep_create: ", ucs_status_string(s)));
    }
  }
  thread_ = std::thread([this] { RunProgress(); });
  return absl::OkStatus();
}

void Worker::Stop(bool gracefully) {
  if (thread_.joinable()) {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
    }
    WakeProgressThread();
    thread_.join();
  }
  absl::MutexLock lock(&mu_);
  if (worker_ == nullptr) return;
  CloseEndpoints(gracefully);
  worker_.reset();
}

void Worker::WakeProgressThread() {
  const uint64_t one = 1;
  // Fails only when the counter is full, and then the thread is about to wake anyway.
  (void)!write(wake_fd_, &one, sizeof(one));
}

bool Worker::Progress() {
  if (frozen_) return false;
  const bool worked = ucp_worker_progress(worker_.get()) != 0;
  handler_->AfterProgress();
  return worked;
}

bool Worker::Arm() { return frozen_ || ucp_worker_arm(worker_.get()) == UCS_OK; }

bool Worker::ProgressAndArm(bool& armed) {
  bool worked = false;
  // Arming fails too when an event has just come; only a repeated failure means queued sends.
  for (int failures = 0; failures < kArmAttempts;) {
    if (Progress()) {
      worked = true;
      failures = 0;
    } else if (Arm()) {
      armed = true;
      return worked;
    } else {
      ++failures;
    }
  }
  armed = false;
  return worked;
}

void Worker::Kick() {
  bool armed;
  ProgressAndArm(armed);
  if (!armed) WakeProgressThread();
}

void Worker::RunProgress() {
  while (true) {
    bool armed;
    {
      absl::MutexLock lock(&mu_);
      if (stopping_ || frozen_) return;
      if (ProgressAndArm(armed)) changed_.SignalAll();
    }
    pollfd entries[] = {{event_fd_, POLLIN, 0}, {wake_fd_, POLLIN, 0}};
    if (armed) {
      (void)poll(entries, 2, -1);
    } else {
      const timespec pause = absl::ToTimespec(kBusyPause);
      (void)ppoll(entries + 1, 1, &pause, nullptr);
    }
    if (entries[1].revents != 0) {
      uint64_t count;
      (void)!read(wake_fd_, &count, sizeof(count));
    }
  }
}

void Worker::BeginUnfinished(int peer) {
  ++unfinished_;
  ++peers_[peer].unfinished;
}

void Worker::EndUnfinished(int peer) {
  --unfinished_;
  --peers_[peer].unfinished;
}

Worker::Operation* Worker::NewOperation(int peer, Purpose purpose, int64_t num_bytes) {
  if (free_operations_.empty()) {
    operations_.push_back(std::make_unique<Operation>());
    free_operations_.push_back(operations_.back().get());
  }
  Operation* const operation = free_operations_.back();
  free_operations_.pop_back();
  *operation = {this, peer, purpose, num_bytes, {}};
  if (purpose == Purpose::kSend || purpose == Purpose::kGet) BeginUnfinished(peer);
  if (purpose == Purpose::kGet) ++gets_in_flight_;
  if (purpose != Purpose::kPost) ++outstanding_;
  return operation;
}

void Worker::Started(Operation* operation, ucs_status_ptr_t request) {
  // For a pointer that is neither null nor an error the callback comes later.
  if (request == nullptr) {
    Finished(operation, UCS_OK);
  } else if (UCS_PTR_IS_ERR(request)) {
    Finished(operation, UCS_PTR_STATUS(request));
  }
}

void Worker::Finished(Operation* operation, ucs_status_t status) {
  const Purpose purpose = operation->purpose;
  if (purpose == Purpose::kGet) --gets_in_flight_;
  if (purpose != Purpose::kPost) --outstanding_;
  if (status != UCS_OK) {
    // Stays unfinished, so that the wait for it finds the broken link.
    NoteLinkError(peers_[operation->peer], status);
  } else if (purpose == Purpose::kSend || purpose == Purpose::kGet) {
    EndUnfinished(operation->peer);
  } else if (purpose == Purpose::kChunk) {
    handler_->OnChunkSent(operation->header.memory, operation->num_bytes);
  }
  free_operations_.push_back(operation);
}

void Worker::NoteLinkError(Peer& peer, ucs_status_t status) {
  if (peer.link_error != UCS_OK) return;
  peer.link_error = status;
  peer.link_error_time = absl::Now();
  changed_.SignalAll();
}

void Worker::OnSent(void* request, ucs_status_t status,
                    void* user_data) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  auto* operation = static_cast<Operation*>(user_data);
  operation->worker->Finished(operation, status);
  ucp_request_free(request);
}

void Worker::OnLinkError(void* arg, ucp_ep_h /*endpoint*/,
                         ucs_status_t status) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  auto* peer = static_cast<Peer*>(arg);
  peer->worker->NoteLinkError(*peer, status);
}

ucs_status_t Worker::OnActiveMessage(
    void* arg, const void* header_bytes, size_t header_length, void* data, size_t length,
    const ucp_am_recv_param_t* /*param*/) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  auto* const worker = static_cast<Worker*>(arg);
  const int size = static_cast<int>(worker->peers_.size());
  WireHeader header;
  if (header_length != sizeof(header)) return UCS_OK;  // none of ours
  std::memcpy(&header, header_bytes, sizeof(header));
  const MessageHeader& message = header.data;
  if (header.sender < 0 || header.sender >= size) return UCS_OK;
  if (header.type == MessageType::kData || header.type == MessageType::kOffer) {
    if (message.sender != header.sender || message.index < 0 || message.index >= message.count) {
      return UCS_OK;
    }
    if (header.type == MessageType::kData && message.num_bytes != static_cast<int64_t>(length)) {
      return UCS_OK;
    }
  }
  worker->handler_->OnMessage(header, data, length);
  return UCS_OK;
}

void Worker::SendMessage(Operation* operation, const WireHeader& header, const void* data) {
  operation->header = header;
  const Peer& peer = peers_[operation->peer];
  if (frozen_ || peer.endpoint == nullptr || peer.link_error != UCS_OK) {
    Finished(operation, UCS_ERR_NOT_CONNECTED);
    return;
  }
  ucp_request_param_t param = {};
  param.op_attr_mask =
      UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.cb.send = &Worker::OnSent;
  param.user_data = operation;
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  Started(operation, ucp_am_send_nbx(peer.endpoint, kActiveMessageId, &operation->header,
                                     sizeof(WireHeader), data, operation->num_bytes, &param));
}

void Worker::Send(int peer, const WireHeader& header, const void* data, int64_t num_bytes) {
  SendMessage(NewOperation(peer, Purpose::kSend, num_bytes), header, data);
}

void Worker::SendChunk(int peer, const WireHeader& header, const void* data, int64_t num_bytes) {
  SendMessage(NewOperation(peer, Purpose::kChunk, num_bytes), header, data);
}

void Worker::Post(int peer, const WireHeader& header) {
  SendMessage(NewOperation(peer, Purpose::kPost, 0), header, nullptr);
}

void Worker::Get(int peer, void* dst, int64_t num_bytes, uint64_t remote_address, ucp_rkey_h rkey) {
  Operation* const operation = NewOperation(peer, Purpose::kGet, num_bytes);
  if (frozen_ || peers_[peer].endpoint == nullptr || rkey == nullptr) {
    Finished(operation, UCS_ERR_NOT_CONNECTED);
    return;
  }
  ucp_request_param_t param = {};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &Worker::OnSent;
  param.user_data = operation;
  Started(operation,
          ucp_get_nbx(peers_[peer].endpoint, dst, num_bytes, remote_address, rkey, &param));
}

std::vector<int> Worker::UnfinishedRanks() const {
  std::vector<int> ranks;
  for (const Peer& peer : peers_) {
    if (peer.unfinished > 0) ranks.push_back(peer.rank);
  }
  return ranks;
}

void Worker::MarkLeft(int rank) {
  peers_[rank].left = true;
  changed_.SignalAll();
}

absl::Status Worker::CheckAwaited(absl::string_view call, absl::Span<const int> awaited,
                                  absl::Time deadline, absl::Time& wake) {
  const absl::Time now = absl::Now();
  for (int rank : awaited) {
    const Peer& peer = peers_[rank];
    if (peer.left) return PeerLeft(call, rank_, rank);
    if (peer.link_error == UCS_OK) continue;
    const absl::Time grace_end = peer.link_error_time + kLinkErrorGrace;
    if (now >= grace_end) {
      health_->MarkLost(rank);
      return LinkBroke(rank, ucs_status_string(peer.link_error));
    }
    wake = std::min(wake, grace_end);
  }
  if (now >= deadline) return WaitTimedOut(call, rank_, awaited, timeout_);
  wake = std::min(wake, deadline);
  return absl::OkStatus();
}

absl::Status Worker::Wait(absl::string_view call, absl::FunctionRef<bool()> done,
                          absl::FunctionRef<std::vector<int>()> awaited) {
  const absl::Time start = absl::Now();
  const absl::Time deadline = start + timeout_;
  const absl::Time poll_end = std::min(start + options_.poll_time, deadline);
  absl::Status error;
  while (true) {
    const bool worked = Progress();
    if (health_->broken()) {
      error = health_->status();
      break;
    }
    if (done()) return absl::OkStatus();
    const absl::Time now = absl::Now();
    if ((worked && now < deadline) || now < poll_end) continue;
    absl::Time wake = absl::InfiniteFuture();
    error = CheckAwaited(call, awaited(), deadline, wake);
    if (!error.ok()) {
      error = health_->Break(std::move(error));
      break;
    }
    bool armed;
    if (ProgressAndArm(armed)) continue;
    if (!armed) wake = std::min(wake, now + kBusyPause);
    changed_.WaitWithDeadline(&mu_, wake);
  }
  Abandon();
  return error;
}

void Worker::SetTimeout(absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  timeout_ = timeout;
}

bool Worker::WaitUntil(absl::Time deadline, absl::FunctionRef<bool()> done) {
  while (true) {
    const bool worked = Progress();
    if (done()) return true;
    if (health_->broken() || absl::Now() >= deadline) return false;
    bool armed;
    if (ProgressAndArm(armed) || worked) continue;
    absl::Time wake = deadline;
    if (!armed) wake = std::min(wake, absl::Now() + kBusyPause);
    changed_.WaitWithDeadline(&mu_, wake);
  }
}

void Worker::CloseEndpoints(bool gracefully) {
  std::vector<void*> closing;
  for (Peer& peer : peers_) {
    if (peer.endpoint == nullptr) continue;
    ucp_request_param_t param = {};
    if (!gracefully || peer.link_error != UCS_OK) {
      param.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
      param.flags = UCP_EP_CLOSE_FLAG_FORCE;
    }
    void* const request = ucp_ep_close_nbx(std::exchange(peer.endpoint, nullptr), &param);
    if (UCS_PTR_IS_PTR(request)) closing.push_back(request);
  }
  const absl::Time deadline = absl::Now() + kCloseTime;
  for (void* request : closing) {
    while (!frozen_ && ucp_request_check_status(request) == UCS_INPROGRESS &&
           absl::Now() < deadline) {
      if (ucp_worker_progress(worker_.get()) == 0) absl::SleepFor(kBusyPause);
    }
    ucp_request_free(request);
  }
}

void Worker::Freeze() {
  frozen_ = true;
  WakeProgressThread();
}

void Worker::Abandon() {
  handler_->OnAbandon();
  if (outstanding_ == 0 || frozen_) return;
  if (!copies_only_when_driven_) {
    // A network card may copy at any time: it lets go of the memory when its endpoints are closed.
    CloseEndpoints(/*gracefully=*/false);
    const absl::Time deadline = absl::Now() + kCloseTime;
    while (outstanding_ > 0 && absl::Now() < deadline) {
      if (ucp_worker_progress(worker_.get()) == 0) absl::SleepFor(kBusyPause);
    }
  }
  // Driven on, UCP would take the bytes of queued sends from memory that may be gone. And closing
  // endpoints in the middle of transfers is no way out for TCP: UCX then uses freed connections.
  Freeze();
}

}  // namespace nsa::comm::ucx
