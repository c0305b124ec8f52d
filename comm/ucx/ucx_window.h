// A window that peers read by one-sided UCP gets, or by messages where the transport has none.
#ifndef COMM_UCX_UCX_WINDOW_H_
#define COMM_UCX_UCX_WINDOW_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "comm/health.h"
#include "comm/host_communicator.h"
#include "comm/ucx/handles.h"
#include "comm/ucx/remote_reads.h"
#include "comm/ucx/window_board.h"
#include "comm/ucx/worker.h"

namespace nsa::comm::ucx {

class UcxWindow final : public HostWindow {
 public:
  UcxWindow(int rank, int size, const Health* health, Worker* worker, WindowBoard* board,
            RemoteReads* reads, int max_reads_in_flight, int64_t id,
            std::unique_ptr<MappedMemory> memory);
  ~UcxWindow() override;

  void* data() override { return memory_->data(); }
  int64_t num_bytes() const override { return memory_->num_bytes(); }
  // What shared memory maps.
  void* PeerData(int rank) override { return rank == rank_ ? data() : remotes_[rank].mapped; }

 private:
  struct Remote {
    uint64_t address = 0;
    Rkey rkey;
    void* mapped = nullptr;  // where this process has it, while rkey lives
    bool by_get = false;     // the transport reads it by itself; else by messages
  };

  std::string Export() const override;
  absl::Status Connect(absl::Span<const std::string> exported) override;
  absl::Status AwaitReleased(int64_t epoch) override;
  absl::Status AwaitPublished(absl::Span<const int> peers, int64_t epoch) override;
  absl::Status SignalPublished(int64_t epoch) override;
  absl::Status SignalReleased(int64_t epoch) override;
  absl::Status Read(absl::Span<const WindowRead> reads, void* dst) override;

  const int rank_;
  Worker& worker_;
  WindowBoard& board_;
  RemoteReads& reads_;
  const int max_reads_in_flight_;
  const int64_t id_;
  std::vector<int> everyone_;
  std::unique_ptr<MappedMemory> memory_;
  std::vector<Remote> remotes_;  // [size], own empty
};

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_UCX_WINDOW_H_
