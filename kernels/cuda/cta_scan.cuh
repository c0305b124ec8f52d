// A scan over the threads of a CTA.
#ifndef KERNELS_CUDA_CTA_SCAN_CUH_
#define KERNELS_CUDA_CTA_SCAN_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace nsa::kernels::cuda {

// Sum over the CTA of what each thread brings, before this thread; the total in `total`. All
// kThreads threads; warp_sums [kThreads / 32] is shared.
template <int kThreads>
__device__ inline int32_t ScanBefore(int32_t value, int32_t* warp_sums, int32_t& total) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = value;
  for (int delta = 1; delta < 32; delta *= 2) {
    const int32_t before = __shfl_up_sync(kFullWarp, sum, delta);
    if (lane >= delta) sum += before;
  }
  __syncthreads();  // warp_sums may still be read from the last call
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  total = 0;
  for (int32_t w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before + sum - value;
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_CTA_SCAN_CUH_
