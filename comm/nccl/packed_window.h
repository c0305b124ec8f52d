// A window of ranks that do not load and store each other's memory: readers name the records they
// want, owners pack and send them.
//
// Records travel in rounds that all ranks take part in: a rank in its Gathers and, until every rank
// has released the epoch, in its Release. In a round each rank tells all others on the host which
// records it wants, and one Exchange moves the packs. A Gather takes as many rounds as keep the
// memory for packs within bounds; a record that is listed twice in a round travels once.
#ifndef COMM_NCCL_PACKED_WINDOW_H_
#define COMM_NCCL_PACKED_WINDOW_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "comm/checks.h"
#include "comm/cuda_status.h"
#include "comm/nccl/nccl_communicator.h"
#include "comm/nccl/window_context.h"

namespace nsa::comm::nccl {

class PackedWindow final : public DeviceWindow {
 public:
  // `memory` is this rank's window. All ranks give the window the same `id`.
  static absl::StatusOr<std::unique_ptr<Window>> Create(const WindowContext* context, int64_t id,
                                                        std::vector<int64_t> window_bytes,
                                                        DevicePtr<char> memory);
  // Releases what is not released, which waits for the other ranks.
  ~PackedWindow() override;

  void* data() override { return memory_.get(); }
  int64_t num_bytes() const override { return window_bytes_[context_.rank]; }
  void* PeerData(int rank) override { return rank == context_.rank ? data() : nullptr; }
  absl::Status BeginWrite(void* stream) override;
  absl::Status Publish(void* stream) override;
  absl::Status Gather(const GatherList& list, int64_t record_bytes, void* dst,
                      void* stream) override;
  absl::Status Release(void* stream) override;
  // Gather itself finds what is wrong with a list.
  absl::Status TakeListError() override { return absl::OkStatus(); }

 private:
  // Records by the memory they lie in, kReceived or kOwn of packed_window.cc.
  struct Records {
    std::vector<int32_t> memory;
    std::vector<int64_t> offsets;
  };
  struct DeviceBytes {
    DevicePtr<char> data;
    int64_t capacity = 0;
    absl::Status Reserve(int64_t num_bytes);
  };
  // What this rank wants of the others in one round.
  struct Wanted {
    int64_t record_bytes = 0;
    std::vector<std::vector<int64_t>> offsets;  // [size][records]
    int64_t max_records = 0;                    // of each rank
  };

  PackedWindow(const WindowContext* context, int64_t id, std::vector<int64_t> window_bytes,
               DevicePtr<char> memory)
      : context_(*context),
        id_(id),
        window_bytes_(std::move(window_bytes)),
        memory_(std::move(memory)) {}

  // Takes records of the list from `begin` on, as many as one round may move.
  absl::StatusOr<int64_t> PlanRound(const HostGatherList& list, int64_t begin, Wanted& wanted,
                                    Records& records);
  // One round; afterwards `records` go to `dst`. True when all ranks have said that they released.
  absl::StatusOr<bool> Round(absl::string_view call, bool released, const Wanted& wanted,
                             const Records& records, void* dst, cudaStream_t stream);
  absl::Status ReleaseInRounds(cudaStream_t stream);
  // Kernels for lists of records one after the other in lists_: see Round.
  absl::Status Copy(int64_t list_offset, int64_t count, int64_t record_bytes, void* dst,
                    cudaStream_t stream);

  const WindowContext& context_;
  const int64_t id_;
  const std::vector<int64_t> window_bytes_;  // [size]
  DevicePtr<char> memory_;
  WindowOrder order_;

  // Streams that use the window follow one another by this event.
  Event last_use_;
  DeviceBytes received_;
  DeviceBytes packed_;
  DeviceBytes lists_;
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_PACKED_WINDOW_H_
