// Epoch counters of all windows of a rank, and the memory of windows that it has destroyed while
// peers may still read them.
#ifndef COMM_UCX_WINDOW_BOARD_H_
#define COMM_UCX_WINDOW_BOARD_H_

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "comm/device_memory.h"
#include "comm/ucx/handles.h"
#include "comm/ucx/remote_reads.h"
#include "comm/ucx/worker.h"

namespace nsa::comm::ucx {

// Memory that UCP has registered with its transports.
class MappedMemory {
 public:
  static absl::StatusOr<std::unique_ptr<MappedMemory>> Allocate(ucp_context_h context,
                                                                int64_t num_bytes);
  // Memory of a CUDA device.
  static absl::StatusOr<std::unique_ptr<MappedMemory>> AllocateCuda(ucp_context_h context,
                                                                    int64_t num_bytes,
                                                                    DeviceMemory& device);
  ~MappedMemory();
  MappedMemory(const MappedMemory&) = delete;
  MappedMemory& operator=(const MappedMemory&) = delete;

  char* data() const { return data_; }  // 256-byte aligned, never null
  int64_t num_bytes() const { return num_bytes_; }
  ucp_mem_h handle() const { return handle_; }

 private:
  MappedMemory(ucp_context_h context, ucp_mem_h handle) : context_(context), handle_(handle) {}

  const ucp_context_h context_;
  const ucp_mem_h handle_;
  DeviceMemory::Block block_;  // of a device
  char* data_ = nullptr;
  int64_t num_bytes_ = 0;
};

// All methods are called with the worker's mutex held.
class WindowBoard {
 public:
  WindowBoard(int rank, int size, Worker* worker, RemoteReads* reads)
      : rank_(rank), size_(size), worker_(*worker), reads_(*reads) {}

  // Every rank numbers its windows in the order of creation, which is the same on all.
  int64_t Add();
  // The counters of a live window.
  bool HasReleased(int64_t window, int peer, int64_t epoch) const {
    return counters_.at(window).released[peer] >= epoch;
  }
  bool HasPublished(int64_t window, int peer, int64_t epoch) const {
    return counters_.at(window).published[peer] >= epoch;
  }
  // This rank's own step; tells all peers.
  void Publish(int64_t window, int64_t epoch);
  void Release(int64_t window, int64_t epoch);
  // The window is destroyed here. Its memory is kept until no peer can read `published_epoch`. With
  // `tell` peers take it for released: not so by a rank that is broken, which must not look well.
  void Retire(int64_t window, int64_t published_epoch, std::unique_ptr<MappedMemory> memory,
              bool tell);

  // From the MessageHandler.
  void OnMessage(const WireHeader& header);
  void AfterProgress();
  // A rank that has left reads nothing any more.
  void OnLeft(int rank);

  bool has_retired() const { return !retired_.empty(); }
  // Gives all memory back. Before the worker's context goes.
  void Clear() { retired_.clear(); }

 private:
  struct Counters {
    std::vector<int64_t> published;  // [size] last epoch of each rank
    std::vector<int64_t> released;   // [size]
  };
  struct Retired {
    int64_t window;
    int64_t published_epoch;
    std::unique_ptr<MappedMemory> memory;
  };
  void Tell(MessageType type, int64_t window, int64_t epoch);
  bool MayBeRead(const Retired& retired) const;

  const int rank_;
  const int size_;
  Worker& worker_;
  RemoteReads& reads_;
  int64_t num_windows_ = 0;
  std::map<int64_t, Counters> counters_;  // of windows that live here or are retired
  std::vector<Retired> retired_;
  bool look_at_retired_ = false;
};

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_WINDOW_BOARD_H_
