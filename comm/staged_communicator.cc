#include "comm/staged_communicator.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "comm/checks.h"

namespace nsa::comm {
namespace {

// A Gather is staged in parts of at most this, or one record.
constexpr int64_t kGatherBytes = 64 << 20;
constexpr int64_t kAlignment = 256;

int64_t AlignUp(int64_t num_bytes) {
  return (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
}

// Memory of the host, as large as the largest call has needed.
class Staging {
 public:
  explicit Staging(DeviceMemory& memory) : memory_(memory) {}

  absl::StatusOr<char*> Reserve(int64_t num_bytes) {
    if (num_bytes > capacity_) {
      block_ = nullptr;
      capacity_ = 0;
      absl::StatusOr<DeviceMemory::Block> block = memory_.AllocateHost(num_bytes);
      if (!block.ok()) return block.status();
      block_ = *std::move(block);
      capacity_ = num_bytes;
    }
    return block_.get();
  }

 private:
  DeviceMemory& memory_;
  DeviceMemory::Block block_;
  int64_t capacity_ = 0;
};

// What device memory needs of the communicator below it.
class Base {
 public:
  Base(std::unique_ptr<Communicator> host, std::shared_ptr<DeviceMemory> memory)
      : memory_(std::move(memory)), host_(std::move(host)) {}

  Communicator& host() { return *host_; }
  DeviceMemory& memory() { return *memory_; }

  // The bytes are there when it returns.
  absl::Status CopyNow(void* dst, const void* src, int64_t num_bytes, void* stream) {
    absl::Status status = memory_->Copy(dst, src, num_bytes, stream);
    return status.ok() ? memory_->Synchronize(stream) : status;
  }
  // A rank whose device fails lets the others know, unless it is the arguments that are wrong.
  absl::Status Fail(absl::Status status) {
    if (!status.ok() && !absl::IsInvalidArgument(status)) host_->Abort(status.message());
    return status;
  }

 private:
  const std::shared_ptr<DeviceMemory> memory_;
  const std::unique_ptr<Communicator> host_;
};

// What windows for device memory share, over a window of the communicator below.
class DeviceWindow : public Window {
 public:
  DeviceWindow(Base* base, std::vector<int64_t> window_bytes, std::unique_ptr<Window> inner)
      : base_(*base), inner_(std::move(inner)), window_bytes_(std::move(window_bytes)) {}

  int64_t num_bytes() const override { return inner_->num_bytes(); }
  void* PeerData(int rank) override { return rank == base_.host().rank() ? data() : nullptr; }
  absl::Status BeginWrite(void* stream) override {
    if (absl::Status s = InOrder(&WindowOrder::BeginWrite); !s.ok()) return s;
    return inner_->BeginWrite(stream);
  }
  absl::Status Release(void* stream) override {
    if (absl::Status s = InOrder(&WindowOrder::Release); !s.ok()) return s;
    return inner_->Release(stream);
  }

 protected:
  // A step of the epoch, unless the communicator is broken.
  template <typename Step>
  absl::Status InOrder(Step step) {
    absl::Status status = base_.host().HealthCheck();
    return status.ok() ? (order_.*step)() : status;
  }
  // The list of a Gather whose turn it is.
  absl::StatusOr<HostGatherList> ReadList(const GatherList& list, int64_t record_bytes, void* dst,
                                          void* stream) {
    if (absl::Status s = InOrder(&WindowOrder::Gather); !s.ok()) return s;
    const auto copy = [&](void* to, const void* from, int64_t num_bytes) {
      return base_.CopyNow(to, from, num_bytes, stream);
    };
    absl::StatusOr<HostGatherList> read =
        ReadGatherList(list, record_bytes, dst, window_bytes_, copy);
    if (!read.ok()) return base_.Fail(read.status());
    return read;
  }

  Base& base_;
  const std::unique_ptr<Window> inner_;

 private:
  const std::vector<int64_t> window_bytes_;  // [size]
  WindowOrder order_;
};

// Over a window that lies on the host.
class StagedWindow final : public DeviceWindow {
 public:
  StagedWindow(Base* base, std::vector<int64_t> window_bytes, std::unique_ptr<Window> on_host,
               DeviceMemory::Block data)
      : DeviceWindow(base, std::move(window_bytes), std::move(on_host)),
        data_(std::move(data)),
        staging_(base->memory()) {}

  void* data() override { return data_.get(); }
  absl::Status Publish(void* stream) override;
  absl::Status Gather(const GatherList& list, int64_t record_bytes, void* dst,
                      void* stream) override;

 private:
  const DeviceMemory::Block data_;
  Staging staging_;
};

absl::Status StagedWindow::Publish(void* stream) {
  if (absl::Status s = InOrder(&WindowOrder::Publish); !s.ok()) return s;
  absl::Status status = base_.CopyNow(inner_->data(), data_.get(), num_bytes(), stream);
  return status.ok() ? inner_->Publish(stream) : base_.Fail(std::move(status));
}

absl::Status StagedWindow::Gather(const GatherList& list, int64_t record_bytes, void* dst,
                                  void* stream) {
  const absl::StatusOr<HostGatherList> read = ReadList(list, record_bytes, dst, stream);
  if (!read.ok()) return read.status();

  const int64_t count = static_cast<int64_t>(read->peers.size());
  const int64_t at_once = std::min(std::max<int64_t>(kGatherBytes / record_bytes, 1), count);
  absl::StatusOr<char*> staging = staging_.Reserve(at_once * record_bytes);
  if (!staging.ok()) return base_.Fail(staging.status());
  for (int64_t begin = 0; begin < count; begin += at_once) {
    const int32_t records = static_cast<int32_t>(std::min(at_once, count - begin));
    const GatherList part = {read->peers.data() + begin, read->offsets.data() + begin, &records,
                             records};
    absl::Status status = inner_->Gather(part, record_bytes, *staging, stream);
    if (!status.ok()) return status;
    status = base_.CopyNow(static_cast<char*>(dst) + begin * record_bytes, *staging,
                           records * record_bytes, stream);
    if (!status.ok()) return base_.Fail(std::move(status));
  }
  return absl::OkStatus();
}

// Over a window that lies in device memory.
class DirectWindow final : public DeviceWindow {
 public:
  using DeviceWindow::DeviceWindow;

  void* data() override { return inner_->data(); }
  absl::Status Publish(void* stream) override;
  absl::Status Gather(const GatherList& list, int64_t record_bytes, void* dst,
                      void* stream) override;
};

absl::Status DirectWindow::Publish(void* stream) {
  if (absl::Status s = InOrder(&WindowOrder::Publish); !s.ok()) return s;
  absl::Status status = base_.memory().Synchronize(stream);
  return status.ok() ? inner_->Publish(stream) : base_.Fail(std::move(status));
}

absl::Status DirectWindow::Gather(const GatherList& list, int64_t record_bytes, void* dst,
                                  void* stream) {
  const absl::StatusOr<HostGatherList> read = ReadList(list, record_bytes, dst, stream);
  if (!read.ok()) return read.status();
  const int32_t own = base_.host().rank();
  const int64_t count = static_cast<int64_t>(read->peers.size());
  absl::Status status;
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    char* const to = static_cast<char*>(dst) + begin * record_bytes;
    if (read->peers[begin] == own) {
      end = begin + 1;
      status = base_.memory().Copy(to, static_cast<char*>(data()) + read->offsets[begin],
                                   record_bytes, stream);
      if (!status.ok()) return base_.Fail(std::move(status));
      continue;
    }
    while (end < count && read->peers[end] != own) ++end;
    const int32_t records = static_cast<int32_t>(end - begin);
    status = inner_->Gather({&read->peers[begin], &read->offsets[begin], &records, records},
                            record_bytes, to, stream);
    if (!status.ok()) return status;
  }
  return base_.Fail(base_.memory().Synchronize(stream));
}

class StagedCommunicator final : public Communicator {
 public:
  StagedCommunicator(std::unique_ptr<Communicator> host, std::shared_ptr<DeviceMemory> memory,
                     bool windows_on_device)
      : base_(std::move(host), std::move(memory)),
        windows_on_device_(windows_on_device),
        staging_(base_.memory()) {}

  int rank() const override { return base_.host().rank(); }
  int size() const override { return base_.host().size(); }
  absl::Duration timeout() const override { return base_.host().timeout(); }
  absl::Status AllGather(void* buffer, absl::Span<const GatherRun> runs, void* stream) override;
  absl::Status Exchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                        void* stream) override;
  absl::StatusOr<std::unique_ptr<Window>> CreateWindow(int64_t num_bytes) override;
  absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) override {
    return base_.host().HostAllGather(mine);
  }
  absl::Status Barrier() override { return base_.host().Barrier(); }
  absl::Status HealthCheck() override { return base_.host().HealthCheck(); }
  std::vector<int> LostRanks() override { return base_.host().LostRanks(); }
  void Abort(absl::string_view reason) override { base_.host().Abort(reason); }

 private:
  mutable Base base_;
  const bool windows_on_device_;
  Staging staging_;
};

absl::Status StagedCommunicator::AllGather(void* buffer, absl::Span<const GatherRun> runs,
                                           void* stream) {
  if (absl::Status s = HealthCheck(); !s.ok()) return s;
  if (absl::Status s = CheckAllGather(buffer, runs, size()); !s.ok()) return s;
  std::vector<GatherRun> packed;
  int64_t num_bytes = 0;
  for (const GatherRun& run : runs) {
    packed.push_back({run.rank, num_bytes, run.num_bytes});
    num_bytes += run.num_bytes;
  }
  absl::StatusOr<char*> staging = staging_.Reserve(num_bytes);
  if (!staging.ok()) return base_.Fail(staging.status());
  char* const bytes = static_cast<char*>(buffer);
  absl::Status status;
  for (size_t i = 0; i < runs.size() && status.ok(); ++i) {
    if (runs[i].rank != rank()) continue;
    status = base_.memory().Copy(*staging + packed[i].offset_bytes, bytes + runs[i].offset_bytes,
                                 runs[i].num_bytes, stream);
  }
  if (status.ok()) status = base_.memory().Synchronize(stream);
  if (!status.ok()) return base_.Fail(std::move(status));
  if (absl::Status s = base_.host().AllGather(*staging, packed, stream); !s.ok()) return s;
  for (size_t i = 0; i < runs.size() && status.ok(); ++i) {
    if (runs[i].rank == rank()) continue;
    status = base_.memory().Copy(bytes + runs[i].offset_bytes, *staging + packed[i].offset_bytes,
                                 runs[i].num_bytes, stream);
  }
  if (status.ok()) status = base_.memory().Synchronize(stream);
  return base_.Fail(std::move(status));
}

absl::Status StagedCommunicator::Exchange(absl::Span<const SendOp> sends,
                                          absl::Span<const RecvOp> recvs, void* stream) {
  if (absl::Status s = HealthCheck(); !s.ok()) return s;
  if (absl::Status s = CheckExchange(sends, recvs, rank(), size()); !s.ok()) return s;
  int64_t num_bytes = 0;
  for (const SendOp& send : sends) num_bytes += AlignUp(send.num_bytes);
  for (const RecvOp& recv : recvs) num_bytes += AlignUp(recv.num_bytes);
  absl::StatusOr<char*> staging = staging_.Reserve(num_bytes);
  if (!staging.ok()) return base_.Fail(staging.status());
  char* next = *staging;
  std::vector<SendOp> host_sends;
  absl::Status status;
  for (const SendOp& send : sends) {
    if (status.ok()) status = base_.memory().Copy(next, send.data, send.num_bytes, stream);
    host_sends.push_back({send.peer, next, send.num_bytes});
    next += AlignUp(send.num_bytes);
  }
  std::vector<RecvOp> host_recvs;
  for (const RecvOp& recv : recvs) {
    host_recvs.push_back({recv.peer, next, recv.num_bytes});
    next += AlignUp(recv.num_bytes);
  }
  if (status.ok()) status = base_.memory().Synchronize(stream);
  if (!status.ok()) return base_.Fail(std::move(status));
  // Messages that match arrive even when others do not.
  const absl::Status moved = base_.host().Exchange(host_sends, host_recvs, stream);
  if (!moved.ok() && !absl::IsInvalidArgument(moved)) return moved;
  for (size_t i = 0; i < recvs.size() && status.ok(); ++i) {
    status = base_.memory().Copy(recvs[i].data, host_recvs[i].data, recvs[i].num_bytes, stream);
  }
  if (status.ok()) status = base_.memory().Synchronize(stream);
  return status.ok() ? moved : base_.Fail(std::move(status));
}

absl::StatusOr<std::unique_ptr<Window>> StagedCommunicator::CreateWindow(int64_t num_bytes) {
  absl::StatusOr<std::unique_ptr<Window>> on_host = base_.host().CreateWindow(num_bytes);
  if (!on_host.ok()) return on_host.status();
  // All ranks fail when one has no memory, and the group goes on.
  absl::StatusOr<DeviceMemory::Block> data = DeviceMemory::Block();
  if (!windows_on_device_) data = base_.memory().Allocate(std::max<int64_t>(num_bytes, 1));
  absl::StatusOr<std::vector<std::string>> all =
      HostAllGather(absl::StrCat(data.ok() ? "" : "-", num_bytes));
  if (!all.ok()) return all.status();
  if (!data.ok()) return data.status();
  std::vector<int64_t> window_bytes;
  for (int peer = 0; peer < size(); ++peer) {
    absl::string_view theirs = (*all)[peer];
    const bool failed = absl::ConsumePrefix(&theirs, "-");
    if (failed) {
      return absl::ResourceExhaustedError(
          absl::StrCat("CreateWindow: num_bytes: rank ", peer, " could not allocate ", theirs));
    }
    int64_t bytes = 0;
    if (!absl::SimpleAtoi(theirs, &bytes)) {
      return base_.Fail(absl::InternalError(
          absl::StrCat("CreateWindow: what rank ", peer, " sent cannot be read")));
    }
    window_bytes.push_back(bytes);
  }
  if (windows_on_device_) {
    return std::make_unique<DirectWindow>(&base_, std::move(window_bytes), *std::move(on_host));
  }
  return std::make_unique<StagedWindow>(&base_, std::move(window_bytes), *std::move(on_host),
                                        *std::move(data));
}

}  // namespace

std::unique_ptr<Communicator> StageThroughHost(std::unique_ptr<Communicator> host,
                                               std::shared_ptr<DeviceMemory> memory,
                                               bool windows_on_device) {
  return std::make_unique<StagedCommunicator>(std::move(host), std::move(memory),
                                              windows_on_device);
}

}  // namespace nsa::comm
