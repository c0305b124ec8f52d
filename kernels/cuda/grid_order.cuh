// What orders CTAs of a grid, and grids, with one another.
#ifndef KERNELS_CUDA_GRID_ORDER_CUH_
#define KERNELS_CUDA_GRID_ORDER_CUH_

#include <cstdint>

namespace nsa::kernels::cuda {

// Adds to a counter. What CTAs wrote before they did so (and met at a barrier), the one that finds
// their sum may read.
__device__ __forceinline__ int32_t AddInOrder(int32_t* counter, int32_t value) {
  int32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// Programmatic dependent launch: a kernel that starts while the one before it in the stream still
// runs. Compute capability 9.0 and up.

// Waits for the grid before this one to end.
__device__ __forceinline__ void WaitForGridBefore() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the grid behind this one start, once every CTA of this one has said so.
__device__ __forceinline__ void LetNextGridStart() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_GRID_ORDER_CUH_
