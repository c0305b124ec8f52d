#include "benchmarks/hold_stream.h"

namespace nsa::benchmarks {
namespace {

__device__ int64_t NanosecondClock() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Grid: 1 CTA of 1 thread, which waits.
__global__ void HoldStreamKernel(int64_t nanoseconds) {
  const int64_t begin = NanosecondClock();
  while (NanosecondClock() - begin < nanoseconds) {
  }
}

}  // namespace

cudaError_t HoldStream(int64_t nanoseconds, cudaStream_t stream) {
  HoldStreamKernel<<<1, 1, 0, stream>>>(nanoseconds);
  return cudaGetLastError();
}

}  // namespace nsa::benchmarks
