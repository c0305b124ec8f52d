// Pieces of memory to other places.
#include <algorithm>

#include "kernels/cuda/decode.h"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBytesOfCta = kThreads * 16 * 4;

// Grid: (count, parts). A CTA owns every gridDim.y-th kThreads * 16 bytes of a piece.
__global__ void __launch_bounds__(kThreads) CopyPiecesKernel(CopyPiecesParams params) {
  const auto* const from = static_cast<const uint4*>(params.src[blockIdx.x]);
  auto* const to = static_cast<uint4*>(params.dst[blockIdx.x]);
  const int64_t step = int64_t{gridDim.y} * kThreads, end = params.num_bytes / 16;
#pragma unroll 4
  for (int64_t i = blockIdx.y * kThreads + threadIdx.x; i < end; i += step) to[i] = from[i];
}

}  // namespace

cudaError_t LaunchCopyPieces(const CopyPiecesParams& params, const Device&, cudaStream_t stream) {
  if (params.count == 0 || params.num_bytes == 0) return cudaSuccess;
  const int64_t parts = std::min<int64_t>((params.num_bytes + kBytesOfCta - 1) / kBytesOfCta, 1024);
  const dim3 grid(static_cast<unsigned>(params.count), static_cast<unsigned>(parts));
  CopyPiecesKernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
