// Products of 64 x 64 tiles on tf32, for compressors that are matrices and their backward.
#ifndef KERNELS_CUDA_COMPRESS_TILES_CUH_
#define KERNELS_CUDA_COMPRESS_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace nsa::kernels::cuda {

constexpr int kThreads = 256;
constexpr int kTile = 64;                 // rows, and columns at a time
constexpr int kDepth = 32;                // values that are summed over at a time
constexpr int kDepthStride = kDepth + 4;  // lanes of a warp then meet every bank once

// A warp's part of a 64x64 product: rows 16 * (warp % 4), columns 32 * (warp / 4); lane 4g + c has
// rows g and g + 8, columns 8 * i + 2 * c and the next.
using Product = float[4][4];

template <int kSteps, int kStride>
__device__ void MultiplyTiles(const uint32_t (&a)[kTile][kStride],
                              const uint32_t (&b)[kTile][kStride], Product& product) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, c = lane % 4;
  const int row = warp % 4 * 16 + g, column = warp / 4 * 32 + g;
#pragma unroll
  for (int k = 0; k < kSteps * 8; k += 8) {
    const uint32_t a_values[4] = {a[row][k + c], a[row + 8][k + c], a[row][k + c + 4],
                                  a[row + 8][k + c + 4]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      MultiplyAddTf32(product[i], a_values, b[column + 8 * i][k + c], b[column + 8 * i][k + c + 4]);
    }
  }
}

// Calls visit(row, column, value) for this thread's part of a product.
template <class Visit>
__device__ void ForEach(const Product& product, const Visit& visit) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      visit(warp % 4 * 16 + lane / 4 + e / 2 * 8, warp / 4 * 32 + i * 8 + lane % 4 * 2 + e % 2,
            product[i][e]);
    }
  }
}

__device__ inline float Gelu(float x) { return 0.5f * x * erfcf(x * -0.70710678118654752f); }

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_COMPRESS_TILES_CUH_
