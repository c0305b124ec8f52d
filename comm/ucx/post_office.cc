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
    worker_.Send(send.peer, header, send.data, send.num_bytes);
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

void PostOffice::OnMessage(const MessageHeader& header, const void* data) {
  switch (inbox_.Offer(header)) {
    case Inbox::Fate::kDeliver: {
      void* const destination = inbox_.Destination(header);
      if (header.num_bytes > 0) std::memcpy(destination, data, header.num_bytes);
      inbox_.Delivered(header);
      return;
    }
    case Inbox::Fate::kEarly:
      kept_.push_back({header, std::string(static_cast<const char*>(data), header.num_bytes)});
      return;
    case Inbox::Fate::kDrop:
      return;
    case Inbox::Fate::kBreak:
      health_.Break(inbox_.violation()).IgnoreError();
      return;
  }
}

void PostOffice::OnOffer(const MessageHeader& header, void* offer) {
  kept_.push_back({header, "", offer});
  new_offers_ = true;
}

void PostOffice::AfterProgress() {
  if (std::exchange(new_offers_, false)) TakeKept();
}

void PostOffice::TakeKept() {
  std::vector<Kept> still_early;
  for (Kept& kept : std::exchange(kept_, {})) {
    if (kept.offer == nullptr) {
      OnMessage(kept.header, kept.data.data());  // may keep it again
      continue;
    }
    switch (inbox_.Offer(kept.header)) {
      case Inbox::Fate::kDeliver:
        worker_.Receive(kept.header, kept.offer, inbox_.Destination(kept.header));
        break;
      case Inbox::Fate::kEarly:
        still_early.push_back(std::move(kept));
        break;
      case Inbox::Fate::kDrop:
        worker_.Refuse(kept.offer);
        break;
      case Inbox::Fate::kBreak:
        worker_.Refuse(kept.offer);
        health_.Break(inbox_.violation()).IgnoreError();
        break;
    }
  }
  for (Kept& kept : still_early) kept_.push_back(std::move(kept));
}

void PostOffice::Close() {
  for (const Kept& kept : kept_) {
    if (kept.offer != nullptr) worker_.Refuse(kept.offer);
  }
  kept_.clear();
}

}  // namespace nsa::comm::ucx
