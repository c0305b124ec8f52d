// The sums of compress_backward.cu: over the blocks of a token, and over the blocks of the runs.
#ifndef KERNELS_CUDA_COMPRESS_BACKWARD_SUMS_CUH_
#define KERNELS_CUDA_COMPRESS_BACKWARD_SUMS_CUH_

#include <cstdint>

#include "kernels/cuda/compress_backward_work.cuh"
#include "kernels/cuda/compress_tiles.cuh"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda::compress_backward {

// Grid: any number of CTAs. A CTA owns every gridDim-th (stride of a segment, kv head); a thread
// four dimensions of some of its tokens.
template <bool kWeighted>
__global__ void __launch_bounds__(kThreads)
    SumTokensKernel(const __grid_constant__ CompressBackwardParams params) {
  const AttentionDims& dims = params.dims;
  const int32_t row_threads = params.head_dim / 4, stride = dims.compress_stride_tokens;
  const int32_t column = threadIdx.x % row_threads * 4, first_token = threadIdx.x / row_threads;
  const int32_t shares = dims.compress_block_tokens / stride;
  const float mean = 1.0f / static_cast<float>(dims.compress_block_tokens);
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    const int32_t head = static_cast<int32_t>(index % dims.num_kv_heads);
    const BlockGroup group = FindStrides(params, 1, index / dims.num_kv_heads);
    if (group.document < 0) return;
    if (first_token >= kThreads / row_threads) continue;
    const Segment segment = params.tokens.segments[group.document];
    const int64_t weight_place =
        (params.weights.num_heads == 1 ? 0 : head) * int64_t{dims.compress_block_tokens};
    const int64_t first_row = params.documents[segment.document].cmp_block_begin;
    for (int32_t a = first_token; a < stride; a += kThreads / row_threads) {
      float* const to = TokenGradient(params, segment, group.first_block * stride + a, head);
      if (to == nullptr) continue;
      float4 sum = make_float4(0, 0, 0, 0);
      for (int32_t u = 0; u < shares; ++u) {
        const int64_t block = group.first_block - u;
        if (block < 0 || !HasBlock(params, segment.document, block)) continue;
        const float4 dy = *reinterpret_cast<const float4*>(
            params.d_summaries + (first_row + block) * params.d_summaries_stride +
            head * params.head_dim + column);
        float weight = mean;
        if constexpr (kWeighted) {
          weight =
              LoadFloat(params.weights.dtype, params.weights.weight, weight_place + u * stride + a);
        }
        sum.x = fmaf(weight, dy.x, sum.x), sum.y = fmaf(weight, dy.y, sum.y);
        sum.z = fmaf(weight, dy.z, sum.z), sum.w = fmaf(weight, dy.w, sum.w);
      }
      float4* const place = reinterpret_cast<float4*>(to + column);
      if (params.d_tokens.adds) {
        const float4 before = *place;
        sum.x += before.x, sum.y += before.y, sum.z += before.z, sum.w += before.w;
      }
      *place = sum;
    }
  }
}

// Grid: (N, Hkv). A CTA owns the row of `dy` of one block, and its place.
__global__ void __launch_bounds__(kThreads) GatherKernel(const __grid_constant__ Context context) {
  const CompressBackwardParams& params = context.params;
  const BlockGroup group = FindBlocks(params.runs, params.num_runs, 1, blockIdx.x);
  const int32_t head = blockIdx.y, head_dim = params.head_dim;
  if (group.document < 0) return;
  if (head == 0 && threadIdx.x == 0) {
    context.work.blocks[blockIdx.x] = {group.document, static_cast<int32_t>(group.first_block)};
  }
  const int64_t row = params.documents[group.document].cmp_block_begin + group.first_block;
  const float* const from = params.d_summaries + row * params.d_summaries_stride + head * head_dim;
  float* const to = context.work.dy + (head * params.num_blocks + blockIdx.x) * head_dim;
  for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) to[i] = from[i];
}

// Sum over the CTA's threads, in a fixed order; the whole in thread 0.
__device__ float SumThreads(float value, float* warp_sums) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(kFullWarp, value, delta);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kThreads / 32; ++w) sum += warp_sums[w];
  return sum;
}

// Grid: (l, H'). A CTA owns the gradient of one weight.
__global__ void __launch_bounds__(kThreads) WeightKernel(const __grid_constant__ Context context) {
  __shared__ float warp_sums[kThreads / 32];
  const CompressBackwardParams& params = context.params;
  const int32_t row_threads = params.head_dim / 8, j = blockIdx.x;
  const int32_t column = threadIdx.x % row_threads * 8, row_step = kThreads / row_threads;
  const int64_t first = blockIdx.y * params.num_blocks, count = context.rows_per_weight_head();
  float sum = 0.0f;
  for (int64_t i = threadIdx.x / row_threads; i < count && threadIdx.x < row_step * row_threads;
       i += row_step) {
    const int64_t row = first + i;
    float x[8], dy[8];
    context.LoadTokens(static_cast<int32_t>(row / params.num_blocks), row % params.num_blocks,
                       int64_t{j} * params.head_dim + column, x);
    LoadFloats(DType::kF32, context.work.dy, row * params.head_dim + column, dy);
    for (int e = 0; e < 8; ++e) sum = fmaf(x[e], dy[e], sum);
  }
  sum = SumThreads(sum, warp_sums);
  if (threadIdx.x == 0) {
    params.d_weights.weight[blockIdx.y * params.dims.compress_block_tokens + j] = sum;
  }
}

constexpr int kSumColumns = 32;
constexpr int kSumRows = kThreads / kSumColumns;

// Grid: (width / kSumColumns, H'). A CTA owns kSumColumns columns of `sums`, those of `rows`
// [Hkv,N,width] over all blocks; also writes the first `bias_width` to `bias`, nullable.
__global__ void __launch_bounds__(kThreads)
    ColumnSumsKernel(const __grid_constant__ Context context, const float* rows, int32_t width,
                     float* bias, int32_t bias_width) {
  __shared__ float parts[kSumRows][kSumColumns];
  const int32_t column = blockIdx.x * kSumColumns + threadIdx.x % kSumColumns;
  const int32_t part = threadIdx.x / kSumColumns;
  const int64_t first = blockIdx.y * context.params.num_blocks;
  const int64_t count = context.rows_per_weight_head();
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = part; i < count; i += kSumRows) sum += rows[(first + i) * width + column];
  parts[part][threadIdx.x % kSumColumns] = sum;
  __syncthreads();
  if (part != 0) return;
  for (int i = 1; i < kSumRows; ++i) sum += parts[i][threadIdx.x];
  context.work.sums[blockIdx.y * width + column] = sum;
  if (bias != nullptr && column < bias_width) bias[blockIdx.y * bias_width + column] = sum;
}

// Grid: covers [l,D] in x, H' in y; a thread owns one value of pe: the sum over the outputs that it
// goes to of their `sums` [H',sums_width] times the weight.
__global__ void __launch_bounds__(kThreads)
    PositionKernel(const __grid_constant__ Context context, const void* matrix, int32_t num_outputs,
                   int32_t sums_width) {
  const CompressBackwardParams& params = context.params;
  const int64_t k = blockIdx.x * int64_t{kThreads} + threadIdx.x, values = context.block_values();
  if (k >= values) return;
  const float* const sums = context.work.sums + int64_t{blockIdx.y} * sums_width;
  const DType dtype = params.weights.dtype;
  float sum = 0.0f;
  if (matrix == nullptr) {
    const int64_t j = k / params.head_dim;
    sum = sums[k % params.head_dim] *
          LoadFloat(dtype, params.weights.weight,
                    int64_t{blockIdx.y} * params.dims.compress_block_tokens + j);
  } else {
    for (int32_t o = 0; o < num_outputs; ++o) {
      const int64_t place = (int64_t{blockIdx.y} * num_outputs + o) * values + k;
      sum = fmaf(sums[o], LoadFloat(dtype, matrix, place), sum);
    }
  }
  params.d_weights.pe[blockIdx.y * values + k] = sum;
}

}  // namespace nsa::kernels::cuda::compress_backward

#endif  // KERNELS_CUDA_COMPRESS_BACKWARD_SUMS_CUH_
