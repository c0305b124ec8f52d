#include "comm/loopback/group.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/errors.h"
#include "comm/host_memory.h"

namespace nsa::comm::loopback {

absl::StatusOr<std::shared_ptr<PageMemory>> PageMemory::Allocate(int64_t num_bytes) {
  if (absl::Status s = CheckMemoryFor(num_bytes); !s.ok()) return s;
  // An empty window still has an address.
  const size_t mapped = static_cast<size_t>(std::max<int64_t>(num_bytes, 1));
  void* data = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return OutOfMemory(num_bytes, "mmap failed");
  return std::shared_ptr<PageMemory>(new PageMemory(static_cast<char*>(data), num_bytes));
}

PageMemory::~PageMemory() { munmap(data_, std::max<int64_t>(num_bytes_, 1)); }

Group::Group(int size, absl::Duration timeout) : size_(size), timeout_(timeout), ranks_(size) {
  for (int rank = 0; rank < size; ++rank) {
    ranks_[rank].inbox = std::make_unique<Inbox>(rank, size);
  }
}

void Group::Register(int rank, Health* health) {
  absl::MutexLock lock(&mu_);
  ranks_[rank].health = health;
}

void Group::Leave(int rank, const absl::Status& why) {
  absl::MutexLock lock(&mu_);
  ranks_[rank].left = true;
  ranks_[rank].health = nullptr;
  if (!why.ok()) {
    for (Rank& other : ranks_) {
      if (other.health != nullptr) other.health->Break(PeerFailed(rank, why)).IgnoreError();
    }
  }
  changed_.SignalAll();
}

void Group::AbortAll(int rank, absl::string_view reason) {
  absl::MutexLock lock(&mu_);
  for (Rank& each : ranks_) {
    if (each.health != nullptr) each.health->Break(AbortedBy(rank, reason)).IgnoreError();
  }
  changed_.SignalAll();
}

absl::Status Group::CheckWait(int rank, absl::string_view call, absl::Span<const int> awaited,
                              absl::Time deadline) {
  Health& health = *ranks_[rank].health;
  if (health.broken()) return health.status();
  for (int peer : awaited) {
    if (ranks_[peer].left) return health.Break(PeerLeft(call, rank, peer));
  }
  if (absl::Now() >= deadline) {
    return health.Break(WaitTimedOut(call, rank, awaited, timeout_));
  }
  return absl::OkStatus();
}

void Group::Receive(int rank) {
  Inbox& inbox = *ranks_[rank].inbox;
  std::list<Message*>& arrived = ranks_[rank].arrived;
  for (auto it = arrived.begin(); it != arrived.end();) {
    Message* const message = *it;
    const Inbox::Fate fate = inbox.Offer(message->header);
    if (fate == Inbox::Fate::kEarly) {
      ++it;
      continue;
    }
    if (fate == Inbox::Fate::kBreak) {
      ranks_[rank].health->Break(inbox.violation()).IgnoreError();
      return;
    }
    it = arrived.erase(it);
    if (fate == Inbox::Fate::kDeliver) {
      message->state = Message::State::kCopying;
      void* const destination = inbox.Destination(message->header);
      mu_.Unlock();
      if (message->header.num_bytes > 0) {
        std::memcpy(destination, message->data, message->header.num_bytes);
      }
      mu_.Lock();
      inbox.Delivered(message->header);
      // Others may have posted while the mutex was free.
      it = arrived.begin();
    }
    message->state = Message::State::kDone;
    changed_.SignalAll();
  }
}

absl::Status Group::Transfer(int rank, int64_t call, CallKind kind, absl::Span<const SendOp> sends,
                             absl::Span<const Incoming> receives) {
  std::vector<int> sent(size_, 0);
  std::vector<int> total(size_, 0);
  for (const SendOp& send : sends) ++total[send.peer];
  std::vector<Message> outbox;
  outbox.reserve(sends.size());
  for (const SendOp& send : sends) {
    outbox.push_back({{call, send.num_bytes, rank, sent[send.peer]++, total[send.peer], kind},
                      send.peer,
                      send.data});
  }

  absl::MutexLock lock(&mu_);
  const absl::Time deadline = absl::Now() + timeout_;
  Inbox& inbox = *ranks_[rank].inbox;
  inbox.Begin(call, kind, receives);
  for (Message& message : outbox) ranks_[message.receiver].arrived.push_back(&message);
  if (!outbox.empty()) changed_.SignalAll();

  absl::Status status;
  while (true) {
    Receive(rank);
    std::set<int> awaited;
    for (int peer : inbox.Awaited()) awaited.insert(peer);
    for (const Message& message : outbox) {
      if (message.state != Message::State::kDone) awaited.insert(message.receiver);
    }
    if (awaited.empty()) {
      status = ranks_[rank].health->status();
      break;
    }
    status =
        CheckWait(rank, CallName(kind), std::vector<int>(awaited.begin(), awaited.end()), deadline);
    if (!status.ok()) break;
    changed_.WaitWithDeadline(&mu_, deadline);
  }
  // On an error, take back what nobody has begun to copy and let the rest finish: the caller's
  // buffers are free when this returns.
  for (Message& message : outbox) {
    if (message.state == Message::State::kPosted) ranks_[message.receiver].arrived.remove(&message);
    while (message.state == Message::State::kCopying) changed_.Wait(&mu_);
  }
  const absl::Status invalid = inbox.Finish();
  return status.ok() ? invalid : status;
}

WindowBoard& Group::Board(int64_t window) {
  auto [it, is_new] = windows_.try_emplace(window);
  if (is_new) {
    it->second.memory.resize(size_);
    it->second.published.resize(size_, 0);
    it->second.released.resize(size_, 0);
  }
  return it->second;
}

void Group::AddWindow(int rank, int64_t window, std::shared_ptr<PageMemory> memory) {
  absl::MutexLock lock(&mu_);
  Board(window).memory[rank] = std::move(memory);
}

void Group::RemoveWindow(int rank, int64_t window) {
  absl::MutexLock lock(&mu_);
  WindowBoard& board = Board(window);
  board.released[rank] = std::numeric_limits<int64_t>::max();
  board.memory[rank] = nullptr;
  if (++board.destroyed == size_) windows_.erase(window);
  changed_.SignalAll();
}

std::vector<std::shared_ptr<PageMemory>> Group::WindowMemory(int64_t window) {
  absl::MutexLock lock(&mu_);
  return Board(window).memory;
}

void Group::Signal(int rank, int64_t window, std::vector<int64_t> WindowBoard::*counters,
                   int64_t epoch) {
  absl::MutexLock lock(&mu_);
  (Board(window).*counters)[rank] = epoch;
  changed_.SignalAll();
}

absl::Status Group::Await(int rank, int64_t window, std::vector<int64_t> WindowBoard::*counters,
                          int64_t epoch, absl::Span<const int> peers, absl::string_view call) {
  absl::MutexLock lock(&mu_);
  const absl::Time deadline = absl::Now() + timeout_;
  while (true) {
    std::vector<int> awaited;
    for (int peer : peers) {
      if ((Board(window).*counters)[peer] < epoch) awaited.push_back(peer);
    }
    if (awaited.empty()) return ranks_[rank].health->status();
    if (absl::Status s = CheckWait(rank, call, awaited, deadline); !s.ok()) return s;
    changed_.WaitWithDeadline(&mu_, deadline);
  }
}

}  // namespace nsa::comm::loopback
