#include "comm/ucx/ucx_window.h"

#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/wire.h"

namespace nsa::comm::ucx {

UcxWindow::UcxWindow(int rank, int size, const Health* health, Worker* worker, WindowBoard* board,
                     RemoteReads* reads, int max_reads_in_flight, int64_t id,
                     std::unique_ptr<MappedMemory> memory)
    : HostWindow(rank, health),
      rank_(rank),
      worker_(*worker),
      board_(*board),
      reads_(*reads),
      max_reads_in_flight_(max_reads_in_flight),
      id_(id),
      everyone_(size),
      memory_(std::move(memory)),
      remotes_(size) {
  std::iota(everyone_.begin(), everyone_.end(), 0);
  reads_.AddWindow(id_, memory_->data(), memory_->num_bytes());
}

UcxWindow::~UcxWindow() {
  absl::MutexLock lock(&worker_.mu());
  remotes_.clear();
  board_.Retire(id_, published_epoch(), std::move(memory_), /*tell=*/!broken());
}

std::string UcxWindow::Export() const {
  void* buffer = nullptr;
  size_t length = 0;
  WireWriter writer;
  writer.PutInt64(static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory_->data())));
  if (ucp_rkey_pack(worker_.context(), memory_->handle(), &buffer, &length) == UCS_OK) {
    const PackedRkey packed(buffer);
    writer.PutString(absl::string_view(static_cast<const char*>(buffer), length));
  }
  return writer.bytes();
}

absl::Status UcxWindow::Connect(absl::Span<const std::string> exported) {
  absl::MutexLock lock(&worker_.mu());
  for (int peer : everyone_) {
    if (peer == rank_) continue;
    WireReader reader(exported[peer]);
    remotes_[peer].address = static_cast<uint64_t>(reader.GetInt64());
    const std::string packed = reader.GetString();
    if (!reader.ok()) {
      return absl::InternalError(absl::StrCat("CreateWindow: rank ", peer, " sent no key"));
    }
    if (worker_.endpoint(peer) == nullptr) continue;  // broken meanwhile; no read will come
    ucp_rkey_h rkey = nullptr;
    if (ucs_status_t s = ucp_ep_rkey_unpack(worker_.endpoint(peer), packed.data(), &rkey);
        s != UCS_OK) {
      return absl::InternalError(absl::StrCat("CreateWindow: ucp_ep_rkey_unpack for rank ", peer,
                                              ": ", ucs_status_string(s)));
    }
    remotes_[peer].rkey.reset(rkey);
    void* mapped = nullptr;
    if (ucp_rkey_ptr(rkey, remotes_[peer].address, &mapped) == UCS_OK) {
      remotes_[peer].mapped = mapped;
    }
    // Of the host transports only shared memory can read by itself, and that it maps.
    remotes_[peer].by_get = !worker_.copies_only_when_driven() || remotes_[peer].mapped != nullptr;
  }
  return absl::OkStatus();
}

absl::Status UcxWindow::AwaitReleased(int64_t epoch) {
  absl::MutexLock lock(&worker_.mu());
  const auto awaited = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(worker_.mu()) {
    std::vector<int> ranks;
    for (int peer : everyone_) {
      if (!board_.HasReleased(id_, peer, epoch)) ranks.push_back(peer);
    }
    return ranks;
  };
  return worker_.Wait(
      "BeginWrite", [&] { return awaited().empty(); }, awaited);
}

absl::Status UcxWindow::AwaitPublished(absl::Span<const int> peers, int64_t epoch) {
  absl::MutexLock lock(&worker_.mu());
  const auto awaited = [&] {
    std::vector<int> ranks;
    for (int peer : peers) {
      if (!board_.HasPublished(id_, peer, epoch)) ranks.push_back(peer);
    }
    return ranks;
  };
  return worker_.Wait(
      "Gather", [&] { return awaited().empty(); }, awaited);
}

absl::Status UcxWindow::SignalPublished(int64_t epoch) {
  // UCP's send puts what was written before it, here the window, before the message.
  absl::MutexLock lock(&worker_.mu());
  board_.Publish(id_, epoch);
  return absl::OkStatus();
}

absl::Status UcxWindow::SignalReleased(int64_t epoch) {
  absl::MutexLock lock(&worker_.mu());
  board_.Release(id_, epoch);
  return absl::OkStatus();
}

absl::Status UcxWindow::Read(absl::Span<const WindowRead> reads, void* dst) {
  absl::MutexLock lock(&worker_.mu());
  const auto unfinished = [this] { return worker_.UnfinishedRanks(); };
  for (const WindowRead& read : reads) {
    const Remote& remote = remotes_[read.peer];
    char* const to = static_cast<char*>(dst) + read.dst_offset;
    if (!remote.by_get) {
      // Keeps to the limit by itself.
      reads_.Read(read.peer, id_, read.window_offset, read.num_bytes, to, nullptr);
      continue;
    }
    worker_.Get(read.peer, to, read.num_bytes, remote.address + read.window_offset,
                remote.rkey.get());
    if (worker_.gets_in_flight() < max_reads_in_flight_) continue;
    if (absl::Status s = worker_.Wait(
            "Gather", [this] { return worker_.gets_in_flight() < max_reads_in_flight_; },
            unfinished);
        !s.ok()) {
      return s;
    }
  }
  return worker_.Wait(
      "Gather", [this] { return worker_.unfinished() == 0; }, unfinished);
}

}  // namespace nsa::comm::ucx
