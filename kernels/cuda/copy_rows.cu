// Rows of a strided tensor into consecutive rows of a dense one.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Grid: any number of CTAs; a warp owns every (gridDim * kWarps)-th row of dst.
__global__ void __launch_bounds__(kThreads) CopyRowsKernel(CopyRowsParams params) {
  const int32_t lane = threadIdx.x % 32;
  const int64_t element_bytes = SizeOf(params.dtype);
  const int64_t head_chunks = params.head_dim * element_bytes / 16;
  const int64_t row_chunks = params.num_heads * head_chunks;
  const char* const src = static_cast<const char*>(params.src.data);
  uint4* const dst = static_cast<uint4*>(params.dst);

  for (int64_t out = blockIdx.x * kWarps + threadIdx.x / 32;; out += gridDim.x * kWarps) {
    // The segment that row `out` of dst comes from, and its place there.
    int64_t row = -1;
    int64_t index = out;
    for (int32_t first = 0; first < params.num_segments && row < 0; first += 32) {
      Segment segment{};
      if (first + lane < params.num_segments) segment = params.segments[first + lane];
      int64_t end = segment.num_tokens;
      for (int delta = 1; delta < 32; delta *= 2) {
        const int64_t before = __shfl_up_sync(kFullWarp, end, delta);
        if (lane >= delta) end += before;
      }
      const unsigned hits = __ballot_sync(kFullWarp, index < end);
      const int64_t found = segment.row + index - (end - segment.num_tokens);
      if (hits != 0) row = __shfl_sync(kFullWarp, found, __ffs(hits) - 1);
      index -= __shfl_sync(kFullWarp, end, 31);
    }
    if (row < 0) return;
    for (int64_t chunk = lane; chunk < row_chunks; chunk += 32) {
      const int64_t head = chunk / head_chunks;
      const int64_t from =
          (row * params.src.row_stride + head * params.src.head_stride) * element_bytes;
      dst[out * row_chunks + chunk] =
          reinterpret_cast<const uint4*>(src + from)[chunk % head_chunks];
    }
  }
}

}  // namespace

cudaError_t LaunchCopyRows(const CopyRowsParams& params, const Device& device,
                           cudaStream_t stream) {
  if (params.num_segments == 0) return cudaSuccess;
  CopyRowsKernel<<<2 * device.num_sms, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
