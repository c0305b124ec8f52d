#include "comm/inbox.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace nsa::comm {

absl::string_view CallName(CallKind kind) {
  switch (kind) {
    case CallKind::kAllGather:
      return "AllGather";
    case CallKind::kExchange:
      return "Exchange";
    case CallKind::kHostAllGather:
      return "HostAllGather";
    case CallKind::kBarrier:
      return "Barrier";
    case CallKind::kCreateWindow:
      return "CreateWindow";
    case CallKind::kWindowRound:
      return "Gather or Release";
  }
  return "unknown call";
}

void Inbox::Begin(int64_t call, CallKind kind, absl::Span<const Incoming> receives) {
  call_ = call;
  kind_ = kind;
  active_ = true;
  invalid_ = absl::OkStatus();
  missing_ = static_cast<int64_t>(receives.size());
  for (auto& slots : slots_) slots.clear();
  for (const Incoming& receive : receives) slots_[receive.peer].push_back(Slot{receive});
}

Inbox::Fate Inbox::Offer(const MessageHeader& header) {
  if (header.call > call_) return Fate::kEarly;
  if (header.call == mismatched_call_[header.sender]) return Fate::kDrop;
  if (header.call < call_ || !active_) {
    violation_ = absl::FailedPreconditionError(
        absl::StrCat(CallName(header.kind), ": rank ", header.sender, " sent rank ", rank_,
                     " a message in call ", header.call, " that rank ", rank_,
                     " did not receive; every rank must make the same calls in the same order"));
    return Fate::kBreak;
  }
  if (header.kind != kind_) {
    violation_ = absl::FailedPreconditionError(absl::StrCat(
        "call ", call_, ": rank ", rank_, " is in ", CallName(kind_), ", rank ", header.sender,
        " in ", CallName(header.kind), "; every rank must make the same calls in the same order"));
    return Fate::kBreak;
  }
  auto& slots = slots_[header.sender];
  if (header.count != static_cast<int64_t>(slots.size())) {
    return Mismatch(header,
                    absl::StrCat(CallName(kind_), ": rank ", header.sender, " sent ", header.count,
                                 " messages to rank ", rank_, ", which receives ", slots.size(),
                                 " from it; the numbers must be equal"));
  }
  const Incoming& receive = slots[header.index].receive;
  if (receive.blob == nullptr && receive.num_bytes != header.num_bytes) {
    // The other messages of this sender pair up, so only this one is dropped.
    if (invalid_.ok()) {
      invalid_ = absl::InvalidArgumentError(
          absl::StrCat(CallName(kind_), ": rank ", header.sender, " sent ", header.num_bytes,
                       " bytes as message ", header.index, " to rank ", rank_, ", which receives ",
                       receive.num_bytes, "; the sizes must be equal"));
    }
    MarkDone(slots[header.index]);
    return Fate::kDrop;
  }
  return Fate::kDeliver;
}

Inbox::Fate Inbox::Mismatch(const MessageHeader& header, std::string message) {
  if (invalid_.ok()) invalid_ = absl::InvalidArgumentError(std::move(message));
  mismatched_call_[header.sender] = header.call;
  for (Slot& slot : slots_[header.sender]) MarkDone(slot);
  return Fate::kDrop;
}

void Inbox::MarkDone(Slot& slot) {
  if (slot.done) return;
  slot.done = true;
  --missing_;
}

void* Inbox::Destination(const MessageHeader& header) {
  const Incoming& receive = slots_[header.sender][header.index].receive;
  if (receive.blob == nullptr) return receive.data;
  receive.blob->resize(header.num_bytes);
  return receive.blob->data();
}

void Inbox::Delivered(const MessageHeader& header) {
  MarkDone(slots_[header.sender][header.index]);
}

std::vector<int> Inbox::Awaited() const {
  std::vector<int> ranks;
  for (size_t rank = 0; rank < slots_.size(); ++rank) {
    for (const Slot& slot : slots_[rank]) {
      if (slot.done) continue;
      ranks.push_back(static_cast<int>(rank));
      break;
    }
  }
  return ranks;
}

absl::Status Inbox::Finish() {
  active_ = false;
  missing_ = 0;
  for (auto& slots : slots_) slots.clear();
  return std::exchange(invalid_, absl::OkStatus());
}

}  // namespace nsa::comm
