#include "comm/ucx/post_office.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace nsa::comm::ucx {

absl::Status PostOffice::Transfer(CallKind kind, absl::Span<const SendOp> sends,
                                  absl::Span<const Incoming> receives) {
  std::vector<int32_t> sent(size_, 0);
  std::vector<int32_t> total(size_, 0);
  for (const SendOp& send : sends) ++total[send.peer];

  absl::MutexLock lock(&worker_.mu());
  if (health_.broken()) return health_.status();
  inbox_.Begin(++calls_, kind, receives);
  TakeKept();
  for (const SendOp& send : sends) {
    WireHeader header = {MessageType::kData, rank_};
    header.data = {calls_, send.num_bytes, rank_, sent[send.peer]++, total[send.peer], kind};
    if (send.num_bytes <= kSegmentBytes) {
      worker_.Send(send.peer, header, send.data, send.num_bytes);
    } else {
      header.type = MessageType::kOffer;
      header.memory = reads_.Offer(send.peer, send.data, send.num_bytes);
      worker_.Post(send.peer, header);
    }
  }
  const absl::Status status = worker_.Wait(
      CallName(kind), [this] { return inbox_.done() && worker_.unfinished() == 0; },
      [this] {
        std::vector<int> ranks = inbox_.Awaited();
        for (int rank : worker_.UnfinishedRanks()) ranks.push_back(rank);
        std::sort(ranks.begin(), ranks.end());
        ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
        return ranks;
      });
  const absl::Status invalid = inbox_.Finish();
  return status.ok() ? invalid : status;
}

void PostOffice::OnMessage(const WireHeader& header, const void* data) {
  if (header.type == MessageType::kOffer) {
    kept_.push_back({header, ""});
    new_offers_ = true;
  } else {
    TakeMessage(header, data);
  }
}

void PostOffice::TakeMessage(const WireHeader& header, const void* data) {
  const MessageHeader& message = header.data;
  switch (inbox_.Offer(message)) {
    case Inbox::Fate::kDeliver: {
      void* const destination = inbox_.Destination(message);
      if (message.num_bytes > 0) std::memcpy(destination, data, message.num_bytes);
      inbox_.Delivered(message);
      return;
    }
    case Inbox::Fate::kEarly:
      kept_.push_back({header, std::string(static_cast<const char*>(data), message.num_bytes)});
      return;
    case Inbox::Fate::kDrop:
      return;
    case Inbox::Fate::kBreak:
      health_.Break(inbox_.violation()).IgnoreError();
      return;
  }
}

void PostOffice::TakeOffer(const WireHeader& header) {
  const MessageHeader message = header.data;
  switch (inbox_.Offer(message)) {
    case Inbox::Fate::kDeliver:
      reads_.Read(header.sender, header.memory, 0, message.num_bytes, inbox_.Destination(message),
                  [this, message] { inbox_.Delivered(message); });
      return;
    case Inbox::Fate::kEarly:
      kept_.push_back({header, ""});
      return;
    case Inbox::Fate::kDrop:
      reads_.Refuse(header.sender, header.memory);
      return;
    case Inbox::Fate::kBreak:
      health_.Break(inbox_.violation()).IgnoreError();
      return;
  }
}

void PostOffice::AfterProgress() {
  if (std::exchange(new_offers_, false)) TakeKept();
}

void PostOffice::TakeKept() {
  // What is still early is kept again.
  for (const Kept& kept : std::exchange(kept_, {})) {
    if (kept.header.type == MessageType::kOffer) {
      TakeOffer(kept.header);
    } else {
      TakeMessage(kept.header, kept.data.data());
    }
  }
}

}  // namespace nsa::comm::ucx
