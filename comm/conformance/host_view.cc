#include "comm/conformance/host_view.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace nsa::comm::conformance {
namespace {

constexpr int64_t kAlignment = 256;

// Device memory that grows with the largest call.
class Staging {
 public:
  explicit Staging(DeviceMemory& memory) : memory_(memory) {}

  // Forgets what was placed, and makes room.
  absl::Status Reset(int64_t num_bytes) {
    used_ = 0;
    if (num_bytes <= capacity_) return absl::OkStatus();
    block_ = nullptr;
    absl::StatusOr<DeviceMemory::Block> block = memory_.Allocate(num_bytes);
    if (!block.ok()) return block.status();
    block_ = *std::move(block);
    capacity_ = num_bytes;
    return absl::OkStatus();
  }
  static int64_t Room(int64_t num_bytes) {
    return (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  // A copy of `num_bytes` at `host`; null stays null.
  void* Place(const void* host, int64_t num_bytes) {
    if (host == nullptr || num_bytes <= 0) return nullptr;
    char* const device = block_.get() + used_;
    used_ += Room(num_bytes);
    return CopyNow(memory_, device, host, num_bytes).ok() ? device : nullptr;
  }

  static absl::Status CopyNow(DeviceMemory& memory, void* dst, const void* src, int64_t num_bytes) {
    absl::Status status = memory.Copy(dst, src, num_bytes, nullptr);
    return status.ok() ? memory.Synchronize(nullptr) : status;
  }

 private:
  DeviceMemory& memory_;
  DeviceMemory::Block block_;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
};

// The communicator and its memory.
struct Device {
  std::shared_ptr<DeviceMemory> memory;
  std::unique_ptr<Communicator> comm;
  ListErrorOf list_error;

  // Waits for the null stream. What went wrong there is the communicator's to say.
  absl::Status Settle(const absl::Status& call) {
    if (!call.ok()) return call;
    const absl::Status settled = memory->Synchronize(nullptr);
    if (absl::Status s = comm->HealthCheck(); !s.ok()) return s;
    return settled;
  }
  absl::Status CopyBack(void* host, const void* device, int64_t num_bytes) {
    if (device == nullptr || num_bytes <= 0) return absl::OkStatus();
    return Staging::CopyNow(*memory, host, device, num_bytes);
  }
};

class HostViewWindow final : public Window {
 public:
  HostViewWindow(Device* device, std::unique_ptr<Window> inner)
      : device_(*device),
        inner_(std::move(inner)),
        shadow_(inner_->num_bytes() + kAlignment),
        data_(shadow_.data() + kAlignment -
              reinterpret_cast<uintptr_t>(shadow_.data()) % kAlignment),
        staging_(*device->memory) {}

  absl::Status Load() {
    return device_.CopyBack(data_, num_bytes() > 0 ? inner_->data() : nullptr, num_bytes());
  }
  void* data() override { return data_; }
  int64_t num_bytes() const override { return inner_->num_bytes(); }
  void* PeerData(int rank) override { return rank == device_.comm->rank() ? data_ : nullptr; }

  absl::Status BeginWrite(void*) override { return device_.Settle(inner_->BeginWrite(nullptr)); }
  absl::Status Publish(void*) override {
    if (device_.comm->HealthCheck().ok() && num_bytes() > 0) {
      absl::Status status = Staging::CopyNow(*device_.memory, inner_->data(), data_, num_bytes());
      if (!status.ok()) return status;
    }
    return device_.Settle(inner_->Publish(nullptr));
  }
  absl::Status Release(void*) override { return device_.Settle(inner_->Release(nullptr)); }

  absl::Status Gather(const GatherList& list, int64_t record_bytes, void* dst, void*) override {
    const int64_t entries = std::max<int64_t>(list.max_count, 0);
    const int64_t count = *list.count >= 0 && *list.count <= entries ? *list.count : 0;
    const int64_t dst_bytes = count * std::max<int64_t>(record_bytes, 0);
    if (absl::Status s = staging_.Reset(Staging::Room(entries * 4) + Staging::Room(entries * 8) +
                                        Staging::Room(4) + Staging::Room(dst_bytes));
        !s.ok()) {
      return s;
    }
    const GatherList on_device = {static_cast<int32_t*>(staging_.Place(list.peers, entries * 4)),
                                  static_cast<int64_t*>(staging_.Place(list.offsets, entries * 8)),
                                  static_cast<int32_t*>(staging_.Place(list.count, 4)),
                                  list.max_count};
    void* const device_dst = staging_.Place(dst, dst_bytes);
    absl::Status status =
        device_.Settle(inner_->Gather(on_device, record_bytes, device_dst, nullptr));
    if (status.ok() && device_.list_error) status = device_.list_error(*inner_);
    if (!status.ok()) return status;
    return device_.CopyBack(dst, device_dst, dst_bytes);
  }

 private:
  Device& device_;
  const std::unique_ptr<Window> inner_;
  std::vector<char> shadow_;
  char* const data_;
  Staging staging_;
};

class HostView final : public Communicator {
 public:
  explicit HostView(Device device) : device_(std::move(device)), staging_(*device_.memory) {}

  int rank() const override { return device_.comm->rank(); }
  int size() const override { return device_.comm->size(); }
  absl::Duration timeout() const override { return device_.comm->timeout(); }

  absl::Status AllGather(void* buffer, absl::Span<const GatherRun> runs, void*) override {
    int64_t num_bytes = 0;
    for (const GatherRun& run : runs) {
      if (run.offset_bytes < 0 || run.num_bytes < 0) continue;
      num_bytes = std::max(num_bytes, run.offset_bytes + run.num_bytes);
    }
    if (absl::Status s = staging_.Reset(num_bytes); !s.ok()) return s;
    void* const device = staging_.Place(buffer, num_bytes);
    absl::Status status = device_.Settle(device_.comm->AllGather(device, runs, nullptr));
    return status.ok() ? device_.CopyBack(buffer, device, num_bytes) : status;
  }

  absl::Status Exchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                        void*) override {
    int64_t room = 0;
    for (const SendOp& send : sends) room += Staging::Room(std::max<int64_t>(send.num_bytes, 0));
    for (const RecvOp& recv : recvs) room += Staging::Room(std::max<int64_t>(recv.num_bytes, 0));
    if (absl::Status s = staging_.Reset(room); !s.ok()) return s;
    std::vector<SendOp> device_sends;
    for (const SendOp& send : sends) {
      device_sends.push_back(
          {send.peer, staging_.Place(send.data, send.num_bytes), send.num_bytes});
    }
    std::vector<RecvOp> device_recvs;
    for (const RecvOp& recv : recvs) {
      device_recvs.push_back(
          {recv.peer, staging_.Place(recv.data, recv.num_bytes), recv.num_bytes});
    }
    const absl::Status call = device_.comm->Exchange(device_sends, device_recvs, nullptr);
    // Messages that match arrive even when others do not.
    absl::Status status = device_.Settle(absl::OkStatus());
    if (!call.ok() && (status.ok() || !absl::IsInvalidArgument(call))) status = call;
    if (!status.ok() && !absl::IsInvalidArgument(status)) return status;
    for (size_t i = 0; i < recvs.size(); ++i) {
      if (absl::Status s =
              device_.CopyBack(recvs[i].data, device_recvs[i].data, recvs[i].num_bytes);
          !s.ok()) {
        return s;
      }
    }
    return status;
  }

  absl::StatusOr<std::unique_ptr<Window>> CreateWindow(int64_t num_bytes) override {
    absl::StatusOr<std::unique_ptr<Window>> window = device_.comm->CreateWindow(num_bytes);
    if (!window.ok()) return window.status();
    auto view = std::make_unique<HostViewWindow>(&device_, *std::move(window));
    if (absl::Status s = view->Load(); !s.ok()) return s;
    return view;
  }

  absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) override {
    return device_.comm->HostAllGather(mine);
  }
  absl::Status Barrier() override { return device_.comm->Barrier(); }
  absl::Status HealthCheck() override { return device_.comm->HealthCheck(); }
  std::vector<int> LostRanks() override { return device_.comm->LostRanks(); }
  void Abort(absl::string_view reason) override { device_.comm->Abort(reason); }

 private:
  Device device_;
  Staging staging_;
};

}  // namespace

std::unique_ptr<Communicator> MakeHostView(std::unique_ptr<Communicator> inner,
                                           std::shared_ptr<DeviceMemory> memory,
                                           ListErrorOf list_error) {
  return std::make_unique<HostView>(
      Device{std::move(memory), std::move(inner), std::move(list_error)});
}

}  // namespace nsa::comm::conformance
