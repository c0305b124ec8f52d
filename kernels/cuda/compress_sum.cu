// Summaries that are weighted sums of a block's tokens: mean and weighted.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// sums += weight(j) * (token j + pe j) for tokens [begin, end) of the block, which lie in one run.
template <bool kWeighted>
__device__ void AddTokens(const CompressParams& params, const char* rows, int64_t row_bytes,
                          int32_t begin, int32_t end, int64_t weight_head, int32_t column,
                          float (&sums)[8]) {
  const CompressorWeights& weights = params.weights;
  const int64_t block_tokens = params.dims.compress_block_tokens;
#pragma unroll 8
  for (int32_t j = begin; j < end; ++j) {
    float x[8];
    LoadFloats(params.dims.dtype, rows + (j - begin) * row_bytes, column, x);
    float weight = 1.0f;
    if constexpr (kWeighted) {
      const int64_t place = weight_head * block_tokens + j;
      weight = LoadFloat(weights.dtype, weights.weight, place);
      if (weights.pe != nullptr) {
        float pe[8];
        LoadFloats(weights.dtype, weights.pe, place * params.head_dim + column, pe);
        for (int i = 0; i < 8; ++i) x[i] += pe[i];
      }
    }
    for (int i = 0; i < 8; ++i) sums[i] = kWeighted ? fmaf(weight, x[i], sums[i]) : sums[i] + x[i];
  }
}

// Grid: any number of CTAs. A CTA owns every gridDim-th (group of blocks, kv head); a thread 8
// dimensions of one of its blocks. Tokens that two blocks share are read twice, once from L1.
template <bool kWeighted>
__global__ void __launch_bounds__(kThreads) CompressSumKernel(CompressParams params) {
  const AttentionDims& dims = params.dims;
  const int32_t block_threads = params.head_dim / 8;
  const int32_t group_blocks = kThreads / block_threads;
  const int32_t column = threadIdx.x % block_threads * 8;
  const int32_t block_tokens = dims.compress_block_tokens;
  for (int64_t item = blockIdx.x;; item += gridDim.x) {
    const int32_t head = static_cast<int32_t>(item % dims.num_kv_heads);
    const BlockGroup group =
        FindBlocks(params.runs, params.num_runs, group_blocks, item / dims.num_kv_heads);
    if (group.document < 0) return;
    const int64_t block = group.first_block + threadIdx.x / block_threads;
    if (threadIdx.x / block_threads >= group_blocks || block >= group.end_block) continue;

    const int64_t weight_head = params.weights.num_heads == 1 ? 0 : head;
    float sums[8] = {};
    for (int32_t j = 0; j < block_tokens;) {
      const TokenRun run = FindTokens(params.tokens, 2, group.document,
                                      block * dims.compress_stride_tokens + j, head);
      const int64_t left = block_tokens - j;
      const int32_t end = j + static_cast<int32_t>(run.num_tokens < left ? run.num_tokens : left);
      if (run.rows != nullptr) {
        AddTokens<kWeighted>(params, run.rows, run.row_bytes, j, end, weight_head, column, sums);
      }
      j = end;
    }
    if constexpr (!kWeighted) {
      const float scale = 1.0f / static_cast<float>(block_tokens);
      for (float& sum : sums) sum *= scale;
    }
    const int64_t row = params.documents[group.document].cmp_block_begin + block;
    StoreFloats(dims.dtype, params.summaries.data,
                row * params.summaries.row_stride + head * params.summaries.head_stride + column,
                sums);
  }
}

}  // namespace

cudaError_t LaunchCompressSum(const CompressParams& params, const Device& device,
                              cudaStream_t stream) {
  if (params.num_runs == 0) return cudaSuccess;
  const int32_t grid = 8 * device.num_sms;
  if (params.compressor == Compressor::kWeighted) {
    CompressSumKernel<true><<<grid, kThreads, 0, stream>>>(params);
  } else {
    CompressSumKernel<false><<<grid, kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
