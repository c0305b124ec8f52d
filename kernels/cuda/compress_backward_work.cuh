// What the kernels of compress_backward.cu work on: the scratch, and where blocks and strides lie.
#ifndef KERNELS_CUDA_COMPRESS_BACKWARD_WORK_CUH_
#define KERNELS_CUDA_COMPRESS_BACKWARD_WORK_CUH_

#include <cstdint>
#include <type_traits>

#include "kernels/backward_params.h"
#include "kernels/cuda/compress_tiles.cuh"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda::compress_backward {

// A compression block of the runs.
struct BlockPlace {
  int32_t document;
  int32_t block;  // counted in the document
};

// The scratch, for the compressors that have parameters. N blocks of the runs, in their order.
struct Work {
  BlockPlace* blocks;  // [N]
  float* dy;           // [Hkv,N,D] of the summaries
  float* hidden;       // [Hkv,N,Fp] gelu(h), Fp the hidden width rounded up to whole kDepth
  float* d_hidden;     // [Hkv,N,Fp] h, then its gradient
  float* sums;         // [Hkv,max(D,Fp)] over blocks
  int32_t padded_width;
};

inline int64_t PlaceWork(int32_t num_heads, int32_t head_dim, Compressor compressor,
                         int32_t hidden_width, int64_t num_blocks, char* scratch, Work* work) {
  int64_t num_bytes = 0;
  const auto place = [&](auto*& pointer, int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<Element*>(scratch + num_bytes);
    num_bytes += (count * int64_t{sizeof(Element)} + 255) / 256 * 256;
  };
  *work = {};
  if (compressor == Compressor::kMean) return 0;
  const bool is_mlp = compressor == Compressor::kMlp;
  work->padded_width = is_mlp ? (hidden_width + kDepth - 1) / kDepth * kDepth : 0;
  const int64_t rows = num_heads * num_blocks;
  place(work->blocks, num_blocks);
  place(work->dy, rows * head_dim);
  place(work->hidden, rows * work->padded_width);
  place(work->d_hidden, rows * work->padded_width);
  place(work->sums,
        num_heads * int64_t{head_dim > work->padded_width ? head_dim : work->padded_width});
  return num_bytes;
}

struct Context {
  CompressBackwardParams params;
  Work work;

  __device__ int64_t block_values() const {
    return int64_t{params.dims.compress_block_tokens} * params.head_dim;
  }
  // Of a kv head's parameters.
  __device__ int32_t WeightHead(int32_t head) const {
    return params.weights.num_heads == 1 ? 0 : head;
  }
  // Rows of [Hkv,N,.] that share the parameters of a weight head: from weight_head * N on.
  __device__ int64_t rows_per_weight_head() const {
    return params.num_blocks * (params.dims.num_kv_heads / params.weights.num_heads);
  }
  // Eight values of x + pe, from value `k` of block `block` on: of token k / D of it.
  __device__ void LoadTokens(int32_t head, int64_t block, int64_t k, float (&to)[8]) const {
    const int32_t j = static_cast<int32_t>(k / params.head_dim);
    const BlockPlace place = work.blocks[block];
    const int64_t position = int64_t{place.block} * params.dims.compress_stride_tokens + j;
    const TokenRun run = FindTokens(params.tokens, 2, place.document, position, head);
    for (float& value : to) value = 0.0f;
    if (run.rows != nullptr) LoadFloats(params.dims.dtype, run.rows, k % params.head_dim, to);
    if (params.weights.pe != nullptr) {
      float pe[8];
      LoadFloats(params.weights.dtype, params.weights.pe, WeightHead(head) * block_values() + k,
                 pe);
      for (int i = 0; i < 8; ++i) to[i] += pe[i];
    }
  }
  // Index in the runs' order; -1: no run has the block.
  __device__ int64_t FindBlock(int32_t document, int64_t block) const {
    int64_t low = 0, high = params.num_blocks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const BlockPlace place = work.blocks[middle];
      const bool before =
          place.document != document ? place.document < document : place.block < block;
      if (before) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const bool found = low < params.num_blocks && work.blocks[low].document == document &&
                       work.blocks[low].block == block;
    return found ? low : -1;
  }
};

// Strides [first_block, end_block) of a segment, whose number stands for the document.
__device__ BlockGroup FindStrides(const CompressBackwardParams& params, int32_t group,
                                  int64_t index) {
  const auto run_at = [&](int32_t i) {
    const Segment segment = params.tokens.segments[i];
    const int64_t stride = params.dims.compress_stride_tokens;
    const int64_t first = segment.position / stride;
    const int64_t end = (segment.position + segment.num_tokens + stride - 1) / stride;
    return BlockRun{i, first, segment.num_tokens > 0 ? end - first : 0};
  };
  return FindGroup(run_at, params.tokens.num_segments, group, index);
}

// Of a token of a segment; null when it is not in the segment.
__device__ float* TokenGradient(const CompressBackwardParams& params, const Segment& segment,
                                int64_t position, int32_t head) {
  const int64_t offset = position - segment.position;
  if (offset < 0 || offset >= segment.num_tokens) return nullptr;
  return (segment.is_halo ? params.d_tokens.halo : params.d_tokens.own) +
         ((segment.row + offset) * params.dims.num_kv_heads + head) * params.head_dim;
}

// Whether a run has the block. Runs are ascending.
__device__ bool HasBlock(const CompressBackwardParams& params, int32_t document, int64_t block) {
  int32_t low = 0, high = params.num_runs;  // the first run that ends behind the block
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    const BlockRun run = params.runs[middle];
    const bool before = run.document != document ? run.document < document
                                                 : run.first_block + run.num_blocks <= block;
    if (before) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < params.num_runs && params.runs[low].document == document &&
         params.runs[low].first_block <= block;
}

}  // namespace nsa::kernels::cuda::compress_backward

#endif  // KERNELS_CUDA_COMPRESS_BACKWARD_WORK_CUH_
