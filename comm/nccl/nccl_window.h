#ifndef COMM_NCCL_NCCL_WINDOW_H_
#define COMM_NCCL_NCCL_WINDOW_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "comm/checks.h"
#include "comm/nccl/cuda_status.h"
#include "comm/nccl/group_health.h"
#include "comm/nccl/nccl_communicator.h"
#include "comm/nccl/peer_memory.h"
#include "comm/nccl/signals.h"

namespace nsa::comm::nccl {

// What windows need of their communicator.
struct WindowContext {
  int rank;
  int size;
  int device;
  absl::Duration timeout;
  int gather_ctas;
  int gather_warps;
  GroupHealth* health;
  cudaStream_t stream;  // of the host's own work; never waits for a peer
  // Fills `buffer` as AllGather does, as part of a Publish.
  std::function<absl::Status(void* buffer, absl::Span<const GatherRun> runs, cudaStream_t stream)>
      all_gather;
  // Takes a buffer that this rank uses no more.
  std::function<void(int64_t id, std::unique_ptr<PeerBuffer> buffer)> retire;
};

// Where in the group's memory each rank's window lies when every rank holds a copy of all.
struct MirrorLayout {
  std::vector<int64_t> begins;  // [size], 256-byte aligned
  int64_t num_bytes;
};
MirrorLayout LayOutMirror(absl::Span<const int64_t> window_bytes);

class NcclWindow final : public DeviceWindow {
 public:
  // Peers load and store `buffer`, which ends in WindowSignals at `signals_offset`.
  static absl::StatusOr<std::unique_ptr<Window>> Create(const WindowContext* context, int64_t id,
                                                        std::vector<int64_t> window_bytes,
                                                        std::unique_ptr<PeerBuffer> buffer,
                                                        int64_t signals_offset);
  // Every rank holds a copy of all windows, renewed in Publish: no peer waits for another's
  // Release.
  static absl::StatusOr<std::unique_ptr<Window>> CreateMirrored(const WindowContext* context,
                                                                std::vector<int64_t> window_bytes,
                                                                DevicePtr<char> mirror);
  ~NcclWindow() override;

  void* data() override { return data_; }
  int64_t num_bytes() const override { return window_bytes_[context_.rank]; }
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

  bool mirrored() const { return buffer_ == nullptr; }

  const WindowContext& context_;
  const int64_t id_;
  const std::vector<int64_t> window_bytes_;  // [size]
  WindowOrder order_;
  char* data_ = nullptr;
  PeerMemory memory_ = {};

  std::unique_ptr<PeerBuffer> buffer_;  // null when mirrored
  DevicePtr<char> mirror_;
  std::vector<GatherRun> mirror_runs_;
  DevicePtr<char*> mirror_bases_;

  DevicePtr<int64_t> device_window_bytes_;  // [size]
  DevicePtr<uint32_t> list_fault_taken_;
  HostPtr<ListFault> list_fault_;
  ListFault* device_list_fault_ = nullptr;
  Event last_use_;
  bool used_ = false;
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_NCCL_WINDOW_H_
