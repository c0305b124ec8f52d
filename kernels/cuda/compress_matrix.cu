// Summaries that are made by matrices: linear and mlp.
//
// A CTA makes the summaries of 64 blocks of one kv head: the first matrix gives 64 outputs at a
// time, summed over the l * D values of a block in order, and they are the summary (linear) or go
// through gelu and the second matrix (mlp). Operands are tf32, which holds 16-bit values exactly.
#include "kernels/cuda/compress_tiles.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kHiddenStride = kTile + 4;
constexpr int kMaxHeadDim = 256;

struct Shared {
  uint32_t blocks[kTile][kDepthStride];   // tf32
  uint32_t outputs[kTile][kDepthStride];  // rows of the first matrix
  uint32_t hidden[kTile][kHiddenStride];
  uint32_t second[kTile][kHiddenStride];  // rows of the second matrix
};

class Item {
 public:
  __device__ Item(const CompressParams& params, const BlockGroup& group, int32_t head,
                  Shared& shared)
      : params_(params),
        weights_(params.weights),
        group_(group),
        head_(head),
        weight_head_(params.weights.num_heads == 1 ? 0 : head),
        row_length_(static_cast<int64_t>(params.dims.compress_block_tokens) * params.head_dim),
        shared_(shared) {}

  __device__ void RunLinear() {
    for (int32_t first = 0; first < params_.head_dim; first += kTile) {
      Product product = {};
      MultiplyBlocks(weights_.w, params_.head_dim, first, product);
      ForEach(product,
              [&](int row, int column, float value) { Store(row, first + column, value); });
    }
  }

  __device__ void RunMlp() {
    Product summaries[kMaxHeadDim / kTile] = {};
    for (int32_t first = 0; first < weights_.hidden_width; first += kTile) {
      Product product = {};
      MultiplyBlocks(weights_.w1, weights_.hidden_width, first, product);
      ForEach(product, [&](int row, int column, float value) {
        const int32_t f = first + column;
        uint32_t bits = 0;
        if (f < weights_.hidden_width) {
          bits = RoundToTf32(Gelu(value + LoadFloat(weights_.dtype, weights_.b1,
                                                    weight_head_ * weights_.hidden_width + f)));
        }
        shared_.hidden[row][column] = bits;
      });
#pragma unroll
      for (int32_t i = 0; i < kMaxHeadDim / kTile; ++i) {
        if (i * kTile >= params_.head_dim) break;
        LoadSecond(i * kTile, first);
        __syncthreads();
        MultiplyTiles<kTile / 8>(shared_.hidden, shared_.second, summaries[i]);
        __syncthreads();
      }
    }
#pragma unroll
    for (int32_t i = 0; i < kMaxHeadDim / kTile; ++i) {
      if (i * kTile >= params_.head_dim) break;
      ForEach(summaries[i], [&](int row, int column, float value) {
        const int32_t dim = i * kTile + column;
        Store(
            row, dim,
            value + LoadFloat(weights_.dtype, weights_.b2, weight_head_ * params_.head_dim + dim));
      });
    }
  }

 private:
  // Eight values of a block's token and of a row of the first matrix, for one of their tiles.
  struct Piece {
    float block[8];
    float output[8];
  };

  // product += tokens of the blocks * rows [first, first + kTile) of matrix [H',width,l*D]
  __device__ void MultiplyBlocks(const void* matrix, int64_t width, int32_t first,
                                 Product& product) {
    Piece piece;
    LoadPiece(matrix, width, first, 0, piece);
    for (int64_t depth = 0; depth < row_length_; depth += kDepth) {
      __syncthreads();  // the tiles have been read
      StorePiece(piece);
      __syncthreads();
      if (depth + kDepth < row_length_) LoadPiece(matrix, width, first, depth + kDepth, piece);
      MultiplyTiles<kDepth / 8>(shared_.blocks, shared_.outputs, product);
    }
    __syncthreads();
  }

  __device__ void LoadPiece(const void* matrix, int64_t width, int32_t first, int64_t depth,
                            Piece& piece) {
    const int32_t row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    const int64_t dim = depth % params_.head_dim + column;
    const int64_t block = group_.first_block + row;
    for (float& value : piece.block) value = 0.0f;
    for (float& value : piece.output) value = 0.0f;
    if (block < group_.end_block) {
      const int64_t j = depth / params_.head_dim;
      const int64_t position = block * params_.dims.compress_stride_tokens + j;
      if (position < run_begin_ || position >= run_end_) {
        run_ = FindTokens(params_.tokens, 2, group_.document, position, head_);
        run_begin_ = position;
        run_end_ = position + run_.num_tokens;
      }
      if (run_.rows != nullptr) {
        LoadFloats(params_.dims.dtype, run_.rows + (position - run_begin_) * run_.row_bytes, dim,
                   piece.block);
      }
      if (weights_.pe != nullptr) {
        float pe[8];
        LoadFloats(weights_.dtype, weights_.pe, weight_head_ * row_length_ + depth + column, pe);
        for (int i = 0; i < 8; ++i) piece.block[i] += pe[i];
      }
    }
    if (first + row < width) {
      LoadFloats(weights_.dtype, matrix,
                 (weight_head_ * width + first + row) * row_length_ + depth + column, piece.output);
    }
  }

  __device__ void StorePiece(const Piece& piece) {
    const int32_t row = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    for (int i = 0; i < 8; ++i) {
      shared_.blocks[row][column + i] = RoundToTf32(piece.block[i]);
      shared_.outputs[row][column + i] = RoundToTf32(piece.output[i]);
    }
  }

  // Rows [first, first + kTile) of w2 [H',D,F], hidden values [hidden, hidden + kTile).
  __device__ void LoadSecond(int32_t first, int32_t hidden) {
    for (int32_t i = threadIdx.x; i < kTile * kTile; i += kThreads) {
      const int32_t row = i / kTile, f = hidden + i % kTile;
      const int64_t place =
          (weight_head_ * params_.head_dim + first + row) * weights_.hidden_width + f;
      const float value =
          f < weights_.hidden_width ? LoadFloat(weights_.dtype, weights_.w2, place) : 0.0f;
      shared_.second[row][i % kTile] = RoundToTf32(value);
    }
  }

  __device__ void Store(int32_t row, int32_t dim, float value) {
    const int64_t block = group_.first_block + row;
    if (block >= group_.end_block) return;
    const int64_t place = (params_.documents[group_.document].cmp_block_begin + block) *
                              params_.summaries.row_stride +
                          head_ * params_.summaries.head_stride + dim;
    if (params_.dims.dtype == DType::kBF16) {
      static_cast<__nv_bfloat16*>(params_.summaries.data)[place] = __float2bfloat16(value);
    } else {
      static_cast<__half*>(params_.summaries.data)[place] = __float2half(value);
    }
  }

  const CompressParams& params_;
  const CompressorWeights& weights_;
  const BlockGroup group_;
  const int32_t head_;
  const int64_t weight_head_;
  const int64_t row_length_;
  Shared& shared_;
  TokenRun run_;
  int64_t run_begin_ = 0, run_end_ = -1;  // positions that run_ is known for
};

// Grid: any number of CTAs. A CTA owns every gridDim-th (64 blocks, kv head).
template <bool kMlp>
__global__ void __launch_bounds__(kThreads) CompressMatrixKernel(CompressParams params) {
  extern __shared__ __align__(16) char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    const BlockGroup group =
        FindBlocks(params.runs, params.num_runs, kTile, index / params.dims.num_kv_heads);
    if (group.document < 0) return;
    Item item(params, group, static_cast<int32_t>(index % params.dims.num_kv_heads), shared);
    if constexpr (kMlp) {
      item.RunMlp();
    } else {
      item.RunLinear();
    }
  }
}

template <bool kMlp>
cudaError_t Launch(const CompressParams& params, const Device& device, cudaStream_t stream) {
  const auto kernel = CompressMatrixKernel<kMlp>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  kernel<<<2 * device.num_sms, kThreads, sizeof(Shared), stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchCompressMatrix(const CompressParams& params, const Device& device,
                                 cudaStream_t stream) {
  if (params.num_runs == 0) return cudaSuccess;
  return params.compressor == Compressor::kMlp ? Launch<true>(params, device, stream)
                                               : Launch<false>(params, device, stream);
}

}  // namespace nsa::kernels::cuda
