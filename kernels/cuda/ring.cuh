// A place in a ring of slots in shared memory that have barriers (ptx.cuh).
#ifndef KERNELS_CUDA_RING_CUH_
#define KERNELS_CUDA_RING_CUH_

#include <cstdint>

namespace nsa::kernels::cuda {

// One of `kSlots` slots, and the parity of its current round.
template <int kSlots>
struct RingPlace {
  int32_t slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_RING_CUH_
