#include "comm/nccl/host_view.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "comm/nccl/cuda_status.h"
#include "comm/nccl/nccl_communicator.h"

namespace nsa::comm::nccl {
namespace {

constexpr int64_t kAlignment = 256;

// Device memory that grows with the largest call.
class Staging {
 public:
  // Forgets what was placed, and makes room.
  absl::Status Reset(int64_t num_bytes) {
    used_ = 0;
    if (num_bytes <= capacity_) return absl::OkStatus();
    memory_ = nullptr;
    absl::StatusOr<DevicePtr<char>> memory = AllocateDevice<char>(num_bytes);
    if (!memory.ok()) return memory.status();
    memory_ = *std::move(memory);
    capacity_ = num_bytes;
    return absl::OkStatus();
  }
  static int64_t Room(int64_t num_bytes) {
    return (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  // A copy of `num_bytes` at `host`; null stays null.
  void* Place(const void* host, int64_t num_bytes) {
    if (host == nullptr || num_bytes <= 0) return nullptr;
    char* const device = memory_.get() + used_;
    used_ += Room(num_bytes);
    return cudaMemcpy(device, host, num_bytes, cudaMemcpyHostToDevice) == cudaSuccess ? device
                                                                                      : nullptr;
  }

 private:
  DevicePtr<char> memory_;
  int64_t capacity_ = 0;
  int64_t used_ = 0;
};

// Waits for the default stream. What went wrong there is the communicator's to say.
absl::Status Settle(Communicator& inner, const absl::Status& call) {
  if (!call.ok()) return call;
  const cudaError_t e = cudaStreamSynchronize(nullptr);
  if (absl::Status s = inner.HealthCheck(); !s.ok()) return s;
  return CudaStatus(e, "cudaStreamSynchronize");
}

absl::Status CopyBack(void* host, const void* device, int64_t num_bytes) {
  if (device == nullptr) return absl::OkStatus();
  return CudaStatus(cudaMemcpy(host, device, num_bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}

class HostViewWindow final : public Window {
 public:
  HostViewWindow(Communicator& comm, std::unique_ptr<Window> inner)
      : comm_(comm),
        inner_(std::move(inner)),
        shadow_(inner_->num_bytes() + kAlignment),
        data_(shadow_.data() + kAlignment -
              reinterpret_cast<uintptr_t>(shadow_.data()) % kAlignment) {}

  absl::Status Load() {
    return CopyBack(data_, num_bytes() > 0 ? inner_->data() : nullptr, num_bytes());
  }
  void* data() override { return data_; }
  int64_t num_bytes() const override { return inner_->num_bytes(); }

  absl::Status BeginWrite(void*) override { return Settle(comm_, inner_->BeginWrite(nullptr)); }
  absl::Status Publish(void*) override {
    if (comm_.HealthCheck().ok() && num_bytes() > 0) {
      NSA_NCCL_CUDA_OK(cudaMemcpy(inner_->data(), data_, num_bytes(), cudaMemcpyHostToDevice));
    }
    return Settle(comm_, inner_->Publish(nullptr));
  }
  absl::Status Release(void*) override { return Settle(comm_, inner_->Release(nullptr)); }

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
        Settle(comm_, inner_->Gather(on_device, record_bytes, device_dst, nullptr));
    if (status.ok()) status = static_cast<DeviceWindow&>(*inner_).TakeListError();
    if (!status.ok()) return status;
    return CopyBack(dst, device_dst, dst_bytes);
  }

 private:
  Communicator& comm_;
  const std::unique_ptr<Window> inner_;
  std::vector<char> shadow_;
  char* const data_;
  Staging staging_;
};

class HostView final : public Communicator {
 public:
  explicit HostView(std::unique_ptr<Communicator> inner) : inner_(std::move(inner)) {}

  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  absl::Duration timeout() const override { return inner_->timeout(); }

  absl::Status AllGather(void* buffer, absl::Span<const GatherRun> runs, void*) override {
    int64_t num_bytes = 0;
    for (const GatherRun& run : runs) {
      if (run.offset_bytes < 0 || run.num_bytes < 0) continue;
      num_bytes = std::max(num_bytes, run.offset_bytes + run.num_bytes);
    }
    if (absl::Status s = staging_.Reset(num_bytes); !s.ok()) return s;
    void* const device = staging_.Place(buffer, num_bytes);
    absl::Status status = Settle(*inner_, inner_->AllGather(device, runs, nullptr));
    return status.ok() ? CopyBack(buffer, device, num_bytes) : status;
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
    const absl::Status call = inner_->Exchange(device_sends, device_recvs, nullptr);
    // Messages that match arrive even when others do not.
    absl::Status status = Settle(*inner_, absl::OkStatus());
    if (!call.ok() && (status.ok() || !absl::IsInvalidArgument(call))) status = call;
    if (!status.ok() && !absl::IsInvalidArgument(status)) return status;
    for (size_t i = 0; i < recvs.size(); ++i) {
      if (absl::Status s = CopyBack(recvs[i].data, device_recvs[i].data, recvs[i].num_bytes);
          !s.ok()) {
        return s;
      }
    }
    return status;
  }

  absl::StatusOr<std::unique_ptr<Window>> CreateWindow(int64_t num_bytes) override {
    absl::StatusOr<std::unique_ptr<Window>> window = inner_->CreateWindow(num_bytes);
    if (!window.ok()) return window.status();
    auto view = std::make_unique<HostViewWindow>(*inner_, *std::move(window));
    if (absl::Status s = view->Load(); !s.ok()) return s;
    return view;
  }

  absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) override {
    return inner_->HostAllGather(mine);
  }
  absl::Status Barrier() override { return inner_->Barrier(); }
  absl::Status HealthCheck() override { return inner_->HealthCheck(); }
  void Abort(absl::string_view reason) override { inner_->Abort(reason); }

 private:
  const std::unique_ptr<Communicator> inner_;
  Staging staging_;
};

}  // namespace

std::unique_ptr<Communicator> MakeHostView(std::unique_ptr<Communicator> inner) {
  return std::make_unique<HostView>(std::move(inner));
}

}  // namespace nsa::comm::nccl
