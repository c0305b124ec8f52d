// Programmatic dependent launch: a kernel that starts while the one before it in the stream still
// runs. Compute capability 9.0 and up.
#ifndef KERNELS_CUDA_GRID_ORDER_CUH_
#define KERNELS_CUDA_GRID_ORDER_CUH_

namespace nsa::kernels::cuda {

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
