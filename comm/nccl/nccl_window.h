// A window that kernels of all ranks load and store.
#ifndef COMM_NCCL_NCCL_WINDOW_H_
#define COMM_NCCL_NCCL_WINDOW_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/checks.h"
#include "comm/cuda_status.h"
#include "comm/nccl/nccl_communicator.h"
#include "comm/nccl/peer_memory.h"
#include "comm/nccl/signals.h"
#include "comm/nccl/window_context.h"

namespace nsa::comm::nccl {

class NcclWindow final : public DeviceWindow {
 public:
  // Peers load and store `buffer`, which ends in WindowSignals at `signals_offset`.
  static absl::StatusOr<std::unique_ptr<Window>> Create(const WindowContext* context, int64_t id,
                                                        std::vector<int64_t> window_bytes,
                                                        std::unique_ptr<PeerBuffer> buffer,
                                                        int64_t signals_offset);
  // Of a group of one: `memory` is all there is.
  static absl::StatusOr<std::unique_ptr<Window>> CreateAlone(const WindowContext* context,
                                                             int64_t window_bytes,
                                                             DevicePtr<char> memory);
  ~NcclWindow() override;

  void* data() override { return data_; }
  int64_t num_bytes() const override { return window_bytes_[context_.rank]; }
  void* PeerData(int rank) override { return alone() ? data_ : buffer_->peer_data(rank); }
  absl::Status BeginWrite(void* stream) override;
  absl::Status Publish(void* stream) override;
  absl::Status Gather(const GatherList& list, int64_t record_bytes, void* dst,
                      void* stream) override;
  absl::Status Release(void* stream) override;
  absl::Status TakeListError() override;

 private:
  NcclWindow(const WindowContext* context, int64_t id, std::vector<int64_t> window_bytes)
      : context_(*context), id_(id), window_bytes_(std::move(window_bytes)) {}

  absl::Status Start();
  // What comes before and after the work of every call.
  absl::Status Enter();
  absl::Status Finish(cudaError_t launched, const char* kernel, cudaStream_t stream);

  bool alone() const { return buffer_ == nullptr; }

  const WindowContext& context_;
  const int64_t id_;
  const std::vector<int64_t> window_bytes_;  // [size]
  WindowOrder order_;
  char* data_ = nullptr;
  PeerMemory memory_ = {};

  std::unique_ptr<PeerBuffer> buffer_;  // null when alone
  DevicePtr<char> own_memory_;          // when alone, as is what follows
  DevicePtr<char*> own_base_;

  DevicePtr<int64_t> device_window_bytes_;  // [size]
  DevicePtr<uint32_t> list_fault_taken_;
  HostPtr<ListFault> list_fault_;
  ListFault* device_list_fault_ = nullptr;
  Event last_use_;
  bool used_ = false;
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_NCCL_WINDOW_H_
