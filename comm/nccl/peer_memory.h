// Device memory of every rank that all ranks load and store, by way of an NCCL window.
#ifndef COMM_NCCL_PEER_MEMORY_H_
#define COMM_NCCL_PEER_MEMORY_H_

#include <nccl.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/cuda_status.h"
#include "comm/nccl/nccl_handle.h"

namespace nsa::comm::nccl {

// ResourceExhausted, with bytes asked and free, when the current device has less than `num_bytes`.
absl::Status CheckDeviceMemoryFor(int64_t num_bytes);

class PeerBuffer {
 public:
  // Local: `num_bytes` of zeros, which must be equal on all ranks.
  static absl::StatusOr<std::unique_ptr<PeerBuffer>> Allocate(int64_t num_bytes,
                                                              cudaStream_t stream);
  // Frees the memory. It must have been deregistered if it was registered.
  ~PeerBuffer();
  PeerBuffer(const PeerBuffer&) = delete;
  PeerBuffer& operator=(const PeerBuffer&) = delete;

  // Collective. Afterwards reachable() says whether every rank's memory can be loaded and stored.
  absl::Status Register(NcclHandle& nccl, int rank, int size, absl::Duration timeout,
                        cudaStream_t stream);
  // Local: unmaps the peers' memory. NCCL finds a place for the next buffer by what is registered,
  // so ranks must deregister their buffers in one order between the same registrations.
  void Deregister(NcclHandle& nccl);

  bool reachable() const { return bases_ != nullptr; }
  char* data() const { return data_; }
  int64_t num_bytes() const { return num_bytes_; }
  // [size] in device memory.
  char* const* bases() const { return bases_.get(); }
  // The same, for the host; reachable() only.
  char* peer_data(int rank) const { return host_bases_[rank]; }

 private:
  PeerBuffer(char* data, int64_t num_bytes) : data_(data), num_bytes_(num_bytes) {}

  char* const data_;
  const int64_t num_bytes_;
  ncclWindow_t window_ = nullptr;
  DevicePtr<char*> bases_;
  std::vector<char*> host_bases_;
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_PEER_MEMORY_H_
