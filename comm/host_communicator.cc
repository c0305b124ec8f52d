#include "comm/host_communicator.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/wire.h"

namespace nsa::comm {

absl::Status HostWindow::BeginWrite(void* /*stream*/) {
  if (health_->broken()) return health_->status();
  if (absl::Status s = order_.BeginWrite(); !s.ok()) return s;
  return AwaitReleased(order_.epoch() - 1);
}

absl::Status HostWindow::Publish(void* /*stream*/) {
  if (health_->broken()) return health_->status();
  if (absl::Status s = order_.Publish(); !s.ok()) return s;
  return SignalPublished(order_.epoch());
}

absl::Status HostWindow::Gather(const GatherList& list, int64_t record_bytes, void* dst,
                                void* /*stream*/) {
  if (health_->broken()) return health_->status();
  if (absl::Status s = order_.Gather(); !s.ok()) return s;
  if (absl::Status s = CheckGather(list, record_bytes, dst, window_bytes_); !s.ok()) return s;
  std::vector<WindowRead> remote;
  std::vector<bool> is_source(window_bytes_.size());
  for (const WindowRead& read : MergeRecords(list, record_bytes)) {
    if (read.peer == rank_) {
      std::memcpy(static_cast<char*>(dst) + read.dst_offset,
                  static_cast<const char*>(data()) + read.window_offset, read.num_bytes);
    } else {
      remote.push_back(read);
      is_source[read.peer] = true;
    }
  }
  if (remote.empty()) return absl::OkStatus();
  std::vector<int> sources;
  for (size_t peer = 0; peer < is_source.size(); ++peer) {
    if (is_source[peer]) sources.push_back(static_cast<int>(peer));
  }
  if (absl::Status s = AwaitPublished(sources, order_.epoch()); !s.ok()) return s;
  return Read(remote, dst);
}

absl::Status HostWindow::Release(void* /*stream*/) {
  if (health_->broken()) return health_->status();
  if (absl::Status s = order_.Release(); !s.ok()) return s;
  return SignalReleased(order_.epoch());
}

absl::Status HostCommunicator::AllGather(void* buffer, absl::Span<const GatherRun> runs,
                                         void* /*stream*/) {
  if (health_.broken()) return health_.status();
  if (absl::Status s = CheckAllGather(buffer, runs, size_); !s.ok()) return s;
  std::vector<SendOp> sends;
  std::vector<Incoming> receives;
  char* const bytes = static_cast<char*>(buffer);
  const std::vector<GatherRun> merged = MergeRuns(runs);
  // Each rank starts with its right neighbour, so that not all begin by sending to rank 0.
  for (int step = 1; step < size_; ++step) {
    const int peer = (rank_ + step) % size_;
    for (const GatherRun& run : merged) {
      char* const data = bytes + run.offset_bytes;
      if (run.rank == rank_) sends.push_back({peer, data, run.num_bytes});
      if (run.rank == peer) receives.push_back({peer, data, run.num_bytes, nullptr});
    }
  }
  return Transfer(CallKind::kAllGather, sends, receives);
}

absl::Status HostCommunicator::Exchange(absl::Span<const SendOp> sends,
                                        absl::Span<const RecvOp> recvs, void* /*stream*/) {
  if (health_.broken()) return health_.status();
  if (absl::Status s = CheckExchange(sends, recvs, rank_, size_); !s.ok()) return s;
  std::vector<SendOp> remote_sends;
  std::vector<SendOp> own_sends;
  for (const SendOp& send : sends) {
    (send.peer == rank_ ? own_sends : remote_sends).push_back(send);
  }
  std::vector<Incoming> receives;
  size_t own = 0;
  for (const RecvOp& recv : recvs) {
    if (recv.peer != rank_) {
      receives.push_back({recv.peer, recv.data, recv.num_bytes, nullptr});
    } else if (const SendOp& send = own_sends[own++]; recv.num_bytes > 0) {
      std::memcpy(recv.data, send.data, recv.num_bytes);
    }
  }
  return Transfer(CallKind::kExchange, remote_sends, receives);
}

absl::StatusOr<std::vector<std::string>> HostCommunicator::GatherBlobs(CallKind kind,
                                                                       absl::string_view mine) {
  if (health_.broken()) return health_.status();
  std::vector<std::string> all(size_);
  std::vector<SendOp> sends;
  std::vector<Incoming> receives;
  for (int step = 1; step < size_; ++step) {
    const int peer = (rank_ + step) % size_;
    sends.push_back({peer, mine.data(), static_cast<int64_t>(mine.size())});
    receives.push_back({peer, nullptr, 0, &all[peer]});
  }
  if (absl::Status s = Transfer(kind, sends, receives); !s.ok()) return s;
  all[rank_].assign(mine.data(), mine.size());
  return all;
}

absl::StatusOr<std::vector<std::string>> HostCommunicator::HostAllGather(absl::string_view mine) {
  return GatherBlobs(CallKind::kHostAllGather, mine);
}

absl::Status HostCommunicator::Barrier() { return GatherBlobs(CallKind::kBarrier, "").status(); }

absl::StatusOr<std::unique_ptr<Window>> HostCommunicator::CreateWindow(int64_t num_bytes) {
  if (health_.broken()) return health_.status();
  if (absl::Status s = CheckWindowBytes(num_bytes); !s.ok()) return s;
  // A rank that has no memory says so in the exchange, so that all ranks fail and none waits.
  absl::StatusOr<std::unique_ptr<HostWindow>> window = AllocateWindow(num_bytes);
  WireWriter mine;
  mine.PutInt64(num_bytes);
  mine.PutInt64(window.ok() ? 1 : 0);
  mine.PutString(window.ok() ? (*window)->Export() : std::string());
  absl::StatusOr<std::vector<std::string>> all = GatherBlobs(CallKind::kCreateWindow, mine.bytes());
  if (!all.ok()) return all.status();
  if (!window.ok()) return window.status();

  std::vector<std::string> exported(size_);
  for (int peer = 0; peer < size_; ++peer) {
    WireReader reader((*all)[peer]);
    const int64_t peer_bytes = reader.GetInt64();
    const bool allocated = reader.GetInt64() == 1;
    exported[peer] = reader.GetString();
    if (!reader.ok()) {
      return health_.Break(absl::InternalError(
          absl::StrCat("CreateWindow: what rank ", peer, " sent cannot be read")));
    }
    if (!allocated) {
      return absl::ResourceExhaustedError(
          absl::StrCat("CreateWindow: num_bytes: rank ", peer, " could not allocate ", peer_bytes));
    }
    (*window)->window_bytes_.push_back(peer_bytes);
  }
  if (absl::Status s = (*window)->Connect(exported); !s.ok()) return health_.Break(std::move(s));
  // Nobody destroys a window that another has yet to find.
  all = GatherBlobs(CallKind::kCreateWindow, "");
  if (!all.ok()) return all.status();
  return *std::move(window);
}

}  // namespace nsa::comm
