#include "comm/bootstrap/control_plane.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/errors.h"
#include "comm/wire.h"

namespace nsa::comm {
namespace {

// How long the end of a rank may take while a peer does not answer.
constexpr absl::Duration kLinger = absl::Seconds(1);
// How long rank 0 may take to say who was missing at a deadline.
constexpr absl::Duration kAnswerTime = absl::Seconds(1);
// A frame larger than this is no frame.
constexpr int64_t kMaxPayload = int64_t{1} << 32;

struct FrameHeader {
  uint32_t type;
  int32_t rank;
  int64_t number;
  int64_t payload_bytes;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Bootstrap>> ControlPlane::Create(int rank, int size,
                                                                std::vector<Fd> links) {
  Fd wake(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake.valid()) {
    return absl::ResourceExhaustedError(absl::StrCat("eventfd: ", ErrnoText(errno)));
  }
  return std::unique_ptr<Bootstrap>(
      new ControlPlane(rank, size, std::move(links), std::move(wake)));
}

ControlPlane::ControlPlane(int rank, int size, std::vector<Fd> links, Fd wake)
    : rank_(rank), size_(size), wake_(std::move(wake)) {
  for (size_t peer = 0; peer < links.size(); ++peer) {
    if (!links[peer].valid()) continue;
    Link& link = links_.emplace_back();
    link.peer = static_cast<int>(peer);
    link.socket = std::move(links[peer]);
  }
  thread_ = std::thread([this] { Run(); });
}

ControlPlane::~ControlPlane() {
  Leave(absl::OkStatus());
  {
    absl::MutexLock lock(&mu_);
    close_by_ = absl::Now() + kLinger;
  }
  Wake();
  thread_.join();
}

void ControlPlane::Wake() {
  const uint64_t one = 1;
  // Fails only when the counter is full, and then the thread is about to wake anyway.
  (void)!write(wake_.get(), &one, sizeof(one));
}

void ControlPlane::Queue(Link& link, const Frame& frame) {
  if (link.farewell || !link.socket.valid()) return;
  const FrameHeader header = {static_cast<uint32_t>(frame.type), frame.rank, frame.number,
                              static_cast<int64_t>(frame.payload.size())};
  link.outgoing.append(reinterpret_cast<const char*>(&header), sizeof(header));
  link.outgoing.append(frame.payload);
}

void ControlPlane::QueueToAll(const Frame& frame, int except) {
  for (Link& link : links_) {
    if (link.peer != except) Queue(link, frame);
  }
  Wake();
}

void ControlPlane::Abort(absl::string_view reason) {
  absl::MutexLock lock(&mu_);
  if (said_farewell_) return;
  QueueToAll({FrameType::kAborted, rank_, 0, std::string(reason)}, rank_);
  // An all-gather of this rank, in another thread, ends too.
  if (failure_.ok()) failure_ = AbortedBy(rank_, reason);
  changed_.SignalAll();
}

void ControlPlane::Leave(const absl::Status& why) {
  absl::MutexLock lock(&mu_);
  if (std::exchange(said_farewell_, true)) return;
  if (why.ok()) {
    QueueToAll({FrameType::kLeft, rank_, 0, ""}, rank_);
  } else {
    QueueToAll(
        {FrameType::kFailed, rank_, static_cast<int64_t>(why.code()), std::string(why.message())},
        rank_);
  }
  for (Link& link : links_) link.farewell = true;
}

void ControlPlane::SetPeerHandler(std::function<void(const PeerEvent&)> handler) {
  absl::MutexLock lock(&handler_mu_);
  handler_ = std::move(handler);
  if (handler_ == nullptr) return;
  for (const PeerEvent& event : events_) handler_(event);
}

void ControlPlane::Announce(const PeerEvent& event) {
  {
    absl::MutexLock lock(&handler_mu_);
    events_.push_back(event);
    if (handler_ != nullptr) handler_(event);
  }
  absl::MutexLock lock(&mu_);
  if (event.kind == PeerEvent::Kind::kLeft) {
    if (first_left_ < 0) first_left_ = event.rank;
  } else if (failure_.ok()) {
    failure_ = event.error;
  }
  changed_.SignalAll();
}

ControlPlane::Gather& ControlPlane::GatherNumber(int64_t number) {
  Gather& gather = pending_[number];
  gather.parts.resize(size_);
  return gather;
}

std::vector<int> ControlPlane::MissingParts(const Gather& gather) const {
  std::vector<int> missing;
  for (int rank = 0; rank < size_; ++rank) {
    if (!gather.parts[rank].has_value()) missing.push_back(rank);
  }
  return missing;
}

void ControlPlane::HandleContribution(Frame frame) {
  Gather& gather = GatherNumber(frame.number);
  gather.parts[frame.rank] = std::move(frame.payload);
  if (++gather.num_parts < size_) return;
  WireWriter all;
  for (std::optional<std::string>& part : gather.parts) {
    all.PutString(*part);
    gather.result.push_back(*std::move(part));
  }
  gather.complete = true;
  QueueToAll({FrameType::kGathered, 0, frame.number, all.bytes()}, rank_);
  changed_.SignalAll();
}

absl::StatusOr<std::vector<std::string>> ControlPlane::AllGather(absl::string_view mine,
                                                                 absl::Duration timeout,
                                                                 absl::string_view call) {
  absl::MutexLock lock(&mu_);
  const absl::Time deadline = absl::Now() + timeout;
  const int64_t number = ++gathers_;
  Frame part = {FrameType::kContribution, rank_, number, std::string(mine)};
  if (rank_ == 0) {
    HandleContribution(std::move(part));
  } else {
    QueueToAll(part, rank_);
  }
  bool asked = false;
  while (true) {
    Gather& gather = GatherNumber(number);
    if (gather.complete) {
      std::vector<std::string> result = std::move(gather.result);
      pending_.erase(number);
      return result;
    }
    if (!failure_.ok()) return failure_;
    // Who leaves in good order has completed its calls, so it will not come to this one.
    if (first_left_ >= 0) return PeerLeft(call, rank_, first_left_);
    const absl::Time now = absl::Now();
    if (rank_ == 0) {
      if (now >= deadline) return WaitTimedOut(call, rank_, MissingParts(gather), timeout);
      changed_.WaitWithDeadline(&mu_, deadline);
    } else if (now < deadline) {
      changed_.WaitWithDeadline(&mu_, deadline);
    } else {
      if (!std::exchange(asked, true)) {
        QueueToAll({FrameType::kWhoIsMissing, rank_, number, ""}, rank_);
      }
      if (gather.answered) return WaitTimedOut(call, rank_, gather.missing, timeout);
      if (now >= deadline + kAnswerTime) return WaitTimedOut(call, rank_, {0}, timeout);
      changed_.WaitWithDeadline(&mu_, deadline + kAnswerTime);
    }
  }
}

void ControlPlane::Handle(Link& link, Frame frame) {
  // Rank 0 speaks for all, others for themselves.
  if (link.peer != 0) frame.rank = link.peer;
  switch (frame.type) {
    case FrameType::kContribution: {
      absl::MutexLock lock(&mu_);
      HandleContribution(std::move(frame));
      return;
    }
    case FrameType::kGathered: {
      absl::MutexLock lock(&mu_);
      Gather& gather = GatherNumber(frame.number);
      WireReader reader(frame.payload);
      for (int rank = 0; rank < size_; ++rank) gather.result.push_back(reader.GetString());
      gather.complete = true;
      changed_.SignalAll();
      return;
    }
    case FrameType::kWhoIsMissing: {
      absl::MutexLock lock(&mu_);
      WireWriter missing;
      for (int rank : MissingParts(GatherNumber(frame.number))) missing.PutInt64(rank);
      Queue(link, {FrameType::kMissing, 0, frame.number, missing.bytes()});
      Wake();
      return;
    }
    case FrameType::kMissing: {
      absl::MutexLock lock(&mu_);
      Gather& gather = GatherNumber(frame.number);
      WireReader reader(frame.payload);
      while (true) {
        const int64_t rank = reader.GetInt64();
        if (!reader.ok()) break;
        gather.missing.push_back(static_cast<int>(rank));
      }
      gather.answered = true;
      changed_.SignalAll();
      return;
    }
    case FrameType::kDied:
    case FrameType::kAborted:
    case FrameType::kFailed:
    case FrameType::kLeft: {
      {
        absl::MutexLock lock(&mu_);
        if (rank_ == 0) QueueToAll(frame, link.peer);
        if (frame.rank == link.peer &&
            (frame.type == FrameType::kFailed || frame.type == FrameType::kLeft)) {
          link.farewell = true;
        }
      }
      if (frame.type == FrameType::kDied) {
        Announce({PeerEvent::Kind::kDied, frame.rank, PeerDied(frame.rank, frame.payload)});
      } else if (frame.type == FrameType::kAborted) {
        Announce({PeerEvent::Kind::kAborted, frame.rank, AbortedBy(frame.rank, frame.payload)});
      } else if (frame.type == FrameType::kLeft) {
        Announce({PeerEvent::Kind::kLeft, frame.rank, absl::OkStatus()});
      } else {
        const auto code = static_cast<absl::StatusCode>(frame.number);
        Announce({PeerEvent::Kind::kFailed, frame.rank,
                  PeerFailed(frame.rank, absl::Status(code, frame.payload))});
      }
      return;
    }
  }
}

void ControlPlane::ReadLink(Link& link) {
  char buffer[1 << 16];
  while (true) {
    const ssize_t n = recv(link.socket.get(), buffer, sizeof(buffer), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
      EndLink(link, n == 0 ? "its control connection closed"
                           : absl::StrCat("its control connection: ", ErrnoText(errno)));
      return;
    }
    link.incoming.append(buffer, n);
    FrameHeader header;
    size_t used = 0;
    while (link.incoming.size() - used >= sizeof(header)) {
      std::memcpy(&header, link.incoming.data() + used, sizeof(header));
      if (header.payload_bytes < 0 || header.payload_bytes > kMaxPayload || header.rank < 0 ||
          header.rank >= size_ || header.type > static_cast<uint32_t>(FrameType::kLeft)) {
        EndLink(link, "its control connection carries no frames of ours");
        return;
      }
      const size_t frame_bytes = sizeof(header) + header.payload_bytes;
      if (link.incoming.size() - used < frame_bytes) break;
      Frame frame = {static_cast<FrameType>(header.type), header.rank, header.number,
                     link.incoming.substr(used + sizeof(header), header.payload_bytes)};
      used += frame_bytes;
      Handle(link, std::move(frame));
    }
    link.incoming.erase(0, used);
  }
}

void ControlPlane::WriteLink(Link& link) {
  while (!link.outgoing.empty()) {
    const ssize_t n =
        send(link.socket.get(), link.outgoing.data(), link.outgoing.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) return;
    // The end of the link is found by reading, after what the peer said before.
    if (n < 0) link.outgoing.clear();
    if (n > 0) link.outgoing.erase(0, n);
  }
  if (link.farewell && !std::exchange(link.write_closed, true)) {
    (void)shutdown(link.socket.get(), SHUT_WR);
  }
}

void ControlPlane::EndLink(Link& link, absl::string_view how) {
  bool expected;
  {
    absl::MutexLock lock(&mu_);
    link.socket.Reset(-1);
    link.outgoing.clear();
    expected = link.farewell;
    if (!expected && rank_ == 0) {
      QueueToAll({FrameType::kDied, link.peer, 0, std::string(how)}, link.peer);
    }
  }
  if (!expected) Announce({PeerEvent::Kind::kDied, link.peer, PeerDied(link.peer, how)});
}

void ControlPlane::Run() {
  std::vector<pollfd> entries;
  std::vector<Link*> polled;
  while (true) {
    entries.assign(1, {wake_.get(), POLLIN, 0});
    polled.clear();
    absl::Time close_by;
    {
      absl::MutexLock lock(&mu_);
      for (Link& link : links_) {
        if (!link.socket.valid()) continue;
        WriteLink(link);
        const short out = link.outgoing.empty() ? 0 : POLLOUT;
        entries.push_back({link.socket.get(), static_cast<short>(POLLIN | out), 0});
        polled.push_back(&link);
      }
      close_by = close_by_;
    }
    const bool closing = close_by != absl::InfiniteFuture();
    if (closing && (polled.empty() || absl::Now() >= close_by)) return;
    const int ready = poll(entries.data(), entries.size(), closing ? PollTimeout(close_by) : -1);
    if (ready <= 0) continue;
    if (entries[0].revents != 0) {
      uint64_t count;
      (void)!read(wake_.get(), &count, sizeof(count));
    }
    for (size_t i = 0; i < polled.size(); ++i) {
      if ((entries[i + 1].revents & (POLLIN | POLLHUP | POLLERR)) != 0) ReadLink(*polled[i]);
    }
  }
}

}  // namespace nsa::comm
