// Kernels of windows. Each function enqueues one kernel.
#ifndef COMM_NCCL_WINDOW_KERNELS_H_
#define COMM_NCCL_WINDOW_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "comm/nccl/signals.h"

namespace nsa::comm::nccl {

// Loads the kernels of this file onto the current device, which may wait for the device: not to be
// done while a kernel waits for a peer.
cudaError_t LoadWindowKernels();

// The calls of Window on memory that ends in WindowSignals.
cudaError_t LaunchBeginWrite(const PeerMemory& memory, cudaStream_t stream);
cudaError_t LaunchPublish(const PeerMemory& memory, cudaStream_t stream);
cudaError_t LaunchRelease(const PeerMemory& memory, cudaStream_t stream);
// Releases all epochs there will ever be: this rank reads no more.
cudaError_t LaunchRetire(const PeerMemory& memory, cudaStream_t stream);

struct GatherArguments {
  // The list, as in communicator.h, in device memory.
  const int32_t* peers;
  const int64_t* offsets;
  const int32_t* count;
  int64_t max_count;
  int64_t record_bytes;
  char* dst;
  const int64_t* window_bytes;  // [size] device array
  ListFault* list_fault;
  uint32_t* list_fault_taken;    // device memory, 0 when ListFault is free
  const WindowSignals* signals;  // null: all that is read here was there when the stream came here
};

inline constexpr int kGatherSlotBytes = 8 << 10;
inline constexpr int kMaxGatherWarps = 16;  // each with a slot of shared memory

cudaError_t LaunchGather(const PeerMemory& memory, const GatherArguments& arguments, int num_ctas,
                         int num_warps, cudaStream_t stream);

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_WINDOW_KERNELS_H_
