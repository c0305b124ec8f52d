// What kernels that wait for peers have in common: flags in each other's memory, and waits that
// end.
#ifndef COMM_NCCL_DEVICE_WAITS_CUH_
#define COMM_NCCL_DEVICE_WAITS_CUH_

#include <cstdint>

#include "comm/nccl/signals.h"

namespace nsa::comm::nccl {

__device__ inline int64_t LoadAcquire(const int64_t* flag) {
  int64_t value;
  asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

__device__ inline void StoreRelease(int64_t* flag, int64_t value) {
  asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

// For after a fence.
__device__ inline void StoreRelaxed(int64_t* flag, int64_t value) {
  asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}

__device__ inline uint32_t LoadHost(const uint32_t* word) {
  return *static_cast<const volatile uint32_t*>(word);
}

__device__ inline void StoreHost(uint32_t* word, uint32_t value) {
  *static_cast<volatile uint32_t*>(word) = value;
}

__device__ inline uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__device__ inline void Report(FaultBoard* board, FaultKind kind, WaitingCall call, int peer) {
  StoreHost(&board->awaited[peer], 1);
  StoreHost(&board->call, static_cast<uint32_t>(call));
  __threadfence_system();
  StoreHost(&board->fault, static_cast<uint32_t>(kind));
}

// Waits until `flag`, in this rank's memory, is at least `target`. False when the wait ended
// otherwise; then the board says why. `peer` is the one that writes the flag.
__device__ inline bool Await(const PeerMemory& memory, const int64_t* flag, int64_t target,
                             WaitingCall call, int peer) {
  if (LoadAcquire(flag) >= target) return true;
  FaultBoard* const board = memory.board;
  const uint64_t start = Nanoseconds();
  while (true) {
    // Host memory is microseconds away, so most looks are at the flag.
    for (int i = 0; i < 32; ++i) {
      if (LoadAcquire(flag) >= target) return true;
    }
    if (LoadHost(&board->broken) != 0 || LoadHost(&board->fault) != 0) return false;
    if (LoadHost(&board->left[peer]) != 0) {
      // All that the peer wrote, it wrote before it left.
      if (LoadAcquire(flag) >= target) return true;
      if (call == WaitingCall::kBeginWrite) return true;  // who has left reads no more
      Report(board, FaultKind::kPeerLeft, call, peer);
      return false;
    }
    if (Nanoseconds() - start > memory.limit_ns) {
      Report(board, FaultKind::kTimeout, call, peer);
      return false;
    }
  }
}

template <typename Signals>
__device__ Signals* SignalsOf(const PeerMemory& memory, int rank) {
  return reinterpret_cast<Signals*>(memory.bases[rank] + memory.signals_offset);
}

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_DEVICE_WAITS_CUH_
