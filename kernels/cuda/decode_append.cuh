// AppendTokens: new tokens to their pages, and summaries of blocks that end with them.
#ifndef KERNELS_CUDA_DECODE_APPEND_CUH_
#define KERNELS_CUDA_DECODE_APPEND_CUH_

#include <cstdint>

#include "kernels/cuda/compress_tiles.cuh"
#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/grid_order.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {

constexpr int kAppendThreads = 128;

// Two values of a token in a record's K or V: words are pairs of dimensions in order.
__device__ inline int32_t WordInRecord(int32_t token, int32_t word, int32_t head_dim) {
  const int32_t matrix = (token / 8 * (head_dim / 32) + word / 16) * 4 + word % 4;
  return matrix * 32 + token % 8 * 4 + word % 16 / 4;
}

// K or V of one kv head.
struct AppendTensor {
  bool is_v;
  int32_t head_dim;

  __device__ AppendTensor(const AttentionDims& dims, bool v)
      : is_v(v), head_dim(v ? dims.head_dim_v : dims.head_dim_qk) {}

  // A row of a step's tensor.
  __device__ const uint32_t* Row(const NewTokens& tokens, int64_t row, int32_t kv_head) const {
    const ConstTensor3& from = is_v ? tokens.v : tokens.k;
    return reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(from.data) +
                                             row * from.row_stride + kv_head * from.head_stride);
  }
  // The tensor's part of the record of a position.
  __device__ uint32_t* Record(const AttentionDims& dims, void* const* pages, int32_t kv_head,
                              int64_t position) const {
    char* const record = static_cast<char*>(pages[position / dims.select_block_tokens]) +
                         kv_head * RecordBytes(dims);
    return reinterpret_cast<uint32_t*>(
        record + (is_v ? int64_t{dims.select_block_tokens} * dims.head_dim_qk * 2 : 0));
  }
};

// The block that ends with a row's token, and its tokens.
class EndingBlock {
 public:
  __device__ EndingBlock(const AppendTokensParams& params, int64_t row)
      : params_(params), row_(row), at_(params.rows[row]) {
    const AttentionDims& dims = params.dims;
    first_ = at_.position + 1 - dims.compress_block_tokens;
    if (!params.compresses || at_.sequence < 0 || first_ < 0 ||
        first_ % dims.compress_stride_tokens != 0) {
      first_ = -1;
    }
  }
  __device__ bool exists() const { return first_ >= 0; }

  // Two values of token j of the block. Tokens of the step are not read from pages, where they may
  // not be yet.
  __device__ float2 Load(const AppendTensor& tensor, int32_t kv_head, int32_t j,
                         int32_t word) const {
    const AttentionDims& dims = params_.dims;
    const int64_t position = first_ + j, row = row_ - (at_.position - position);
    uint32_t bits;
    if (row >= 0 && params_.rows[row].sequence == at_.sequence &&
        params_.rows[row].position == position) {
      const NewTokens& tokens = params_.cmp.k.data != nullptr ? params_.cmp : params_.slc;
      bits = tensor.Row(tokens, row, kv_head)[word];
    } else {
      void* const* const pages = params_.tables.cmp + at_.sequence * params_.tables.max_pages;
      bits = tensor.Record(dims, pages, kv_head, position)[WordInRecord(
          static_cast<int32_t>(position % dims.select_block_tokens), word, tensor.head_dim)];
    }
    return dims.dtype == DType::kBF16 ? Unpack2<__nv_bfloat16>(bits) : Unpack2<__half>(bits);
  }

  // Where the summary goes.
  __device__ uint16_t* Summary(const AppendTensor& tensor, int32_t kv_head) const {
    const AttentionDims& dims = params_.dims;
    const int64_t block = first_ / dims.compress_stride_tokens;
    auto* const page = static_cast<uint16_t*>(
        params_.tables.summaries[at_.sequence * params_.tables.max_summary_pages +
                                 block / kSummaryPageBlocks]);
    const int64_t k_row = int64_t{dims.num_kv_heads} * dims.head_dim_qk;
    const int64_t v_row = int64_t{dims.num_kv_heads} * dims.head_dim_v;
    return page + block % kSummaryPageBlocks * (k_row + v_row) + (tensor.is_v ? k_row : 0) +
           int64_t{kv_head} * tensor.head_dim;
  }

 private:
  const AppendTokensParams& params_;
  const int64_t row_;
  const DecodeRow at_;
  int64_t first_;  // token; -1: no block ends here
};

__device__ inline void StoreWord(DType dtype, uint16_t* to, float x, float y) {
  *reinterpret_cast<uint32_t*>(to) =
      dtype == DType::kBF16 ? Pack2<__nv_bfloat16>(x, y) : Pack2<__half>(x, y);
}

// Grid: (rows, Hkv). A CTA owns the token of a row in all branches and, if the compressor is mean
// or weighted, the summary; a thread pairs of dimensions of K or V.
template <bool kOverlaps>
__global__ void __launch_bounds__(kAppendThreads)
    AppendTokensKernel(const __grid_constant__ AppendTokensParams params) {
  if constexpr (kOverlaps) LetNextGridStart();
  const AttentionDims& dims = params.dims;
  const int64_t row = blockIdx.x;
  const int32_t kv_head = blockIdx.y;
  const DecodeRow at = params.rows[row];
  if (at.sequence < 0) return;
  const EndingBlock block(params, row);
  const bool sums = block.exists() && (params.compressor == Compressor::kMean ||
                                       params.compressor == Compressor::kWeighted);
  const PageTables& tables = params.tables;
  const NewTokens* const branches[3] = {&params.slc, &params.win, &params.cmp};
  void* const* const branch_tables[3] = {tables.slc, tables.win, tables.cmp};
  const int32_t words_k = dims.head_dim_qk / 2, words_v = dims.head_dim_v / 2;
  for (int32_t i = threadIdx.x; i < words_k + words_v; i += kAppendThreads) {
    const bool is_v = i >= words_k;
    const AppendTensor tensor(dims, is_v);
    const int32_t word = is_v ? i - words_k : i;
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      bool is_written = branches[b]->k.data == nullptr;
#pragma unroll
      for (int other = 0; other < b; ++other) {
        is_written |=
            branch_tables[other] == branch_tables[b] && branches[other]->k.data != nullptr;
      }
      if (is_written) continue;
      tensor.Record(dims, branch_tables[b] + at.sequence * tables.max_pages, kv_head,
                    at.position)[WordInRecord(
          static_cast<int32_t>(at.position % dims.select_block_tokens), word, tensor.head_dim)] =
          tensor.Row(*branches[b], row, kv_head)[word];
    }
    if (!sums) continue;
    const CompressorWeights& weights = is_v ? params.weights_v : params.weights_k;
    const bool is_weighted = params.compressor == Compressor::kWeighted;
    const int64_t first_weight =
        weights.num_heads == 1 ? 0 : int64_t{kv_head} * dims.compress_block_tokens;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll 8
    for (int32_t j = 0; j < dims.compress_block_tokens; ++j) {
      float2 x = block.Load(tensor, kv_head, j, word);
      float weight = 1.0f;
      if (is_weighted) {
        const int64_t place = first_weight + j;
        weight = LoadFloat(weights.dtype, weights.weight, place);
        if (weights.pe != nullptr) {
          x.x += LoadFloat(weights.dtype, weights.pe, place * tensor.head_dim + 2 * word);
          x.y += LoadFloat(weights.dtype, weights.pe, place * tensor.head_dim + 2 * word + 1);
        }
      }
      sum.x = fmaf(weight, x.x, sum.x);
      sum.y = fmaf(weight, x.y, sum.y);
    }
    const float scale = is_weighted ? 1.0f : 1.0f / static_cast<float>(dims.compress_block_tokens);
    StoreWord(dims.dtype, block.Summary(tensor, kv_head) + 2 * word, sum.x * scale, sum.y * scale);
  }
}

// Grid: (rows, Hkv, 2), of K and of V. A CTA owns a summary that is made by matrices: linear or
// mlp. It takes the block's values kPiece at a time, and a warp then one output after another.
constexpr int32_t kAppendPiece = 2048;
constexpr int32_t kAppendOutputs = 256;  // at a time; head dims are no larger

class MatrixSummary {
 public:
  __device__ MatrixSummary(const AppendTokensParams& params, const EndingBlock& block,
                           const AppendTensor& tensor, int32_t kv_head, float* values,
                           float* hidden, float* outputs)
      : params_(params),
        block_(block),
        tensor_(tensor),
        kv_head_(kv_head),
        weights_(tensor.is_v ? params.weights_v : params.weights_k),
        weight_head_(weights_.num_heads == 1 ? 0 : kv_head),
        depth_(params.dims.compress_block_tokens * tensor.head_dim),
        values_(values),
        hidden_(hidden),
        outputs_(outputs) {}

  __device__ void Run() {
    const int32_t head_dim = tensor_.head_dim;
    if (params_.compressor == Compressor::kLinear) {
      Multiply(weights_.w, head_dim, 0, head_dim, outputs_);
    } else {
      for (int32_t i = threadIdx.x; i < head_dim; i += kAppendThreads) {
        outputs_[i] = LoadFloat(weights_.dtype, weights_.b2, weight_head_ * head_dim + i);
      }
      const int32_t width = weights_.hidden_width;
      for (int32_t first = 0; first < width; first += kAppendOutputs) {
        const int32_t count = min(kAppendOutputs, width - first);
        Multiply(weights_.w1, width, first, count, hidden_);
        for (int32_t i = threadIdx.x; i < count; i += kAppendThreads) {
          hidden_[i] = Gelu(hidden_[i] + LoadFloat(weights_.dtype, weights_.b1,
                                                   weight_head_ * width + first + i));
        }
        __syncthreads();
        for (int32_t i = threadIdx.x / 32; i < head_dim; i += kAppendThreads / 32) {
          float sum = 0.0f;
          for (int32_t f = threadIdx.x % 32; f < count; f += 32) {
            sum = fmaf(LoadFloat(weights_.dtype, weights_.w2,
                                 (weight_head_ * head_dim + i) * width + first + f),
                       hidden_[f], sum);
          }
          AddOverWarp(sum, outputs_ + i);
        }
        __syncthreads();
      }
    }
    uint16_t* const to = block_.Summary(tensor_, kv_head_);
    for (int32_t i = threadIdx.x * 2; i < head_dim; i += kAppendThreads * 2) {
      StoreWord(params_.dims.dtype, to + i, outputs_[i], outputs_[i + 1]);
    }
  }

 private:
  // to[i] = row first + i of a matrix [H',width,l*D], times the block's values. All threads.
  __device__ void Multiply(const void* matrix, int64_t width, int32_t first, int32_t count,
                           float* to) {
    for (int32_t i = threadIdx.x; i < count; i += kAppendThreads) to[i] = 0.0f;
    for (int32_t begin = 0; begin < depth_; begin += kAppendPiece) {
      const int32_t size = min(kAppendPiece, depth_ - begin);
      __syncthreads();
      for (int32_t i = threadIdx.x * 2; i < size; i += kAppendThreads * 2) {
        const int32_t j = (begin + i) / tensor_.head_dim, dim = (begin + i) % tensor_.head_dim;
        float2 x = block_.Load(tensor_, kv_head_, j, dim / 2);
        if (weights_.pe != nullptr) {
          const int64_t place = weight_head_ * depth_ + begin + i;
          x.x += LoadFloat(weights_.dtype, weights_.pe, place);
          x.y += LoadFloat(weights_.dtype, weights_.pe, place + 1);
        }
        values_[i] = x.x;
        values_[i + 1] = x.y;
      }
      __syncthreads();
      for (int32_t i = threadIdx.x / 32; i < count; i += kAppendThreads / 32) {
        const int64_t row = (weight_head_ * width + first + i) * depth_ + begin;
        float sum = 0.0f;
#pragma unroll 4
        for (int32_t k = threadIdx.x % 32 * 8; k < size; k += 32 * 8) {
          float w[8];
          LoadFloats(weights_.dtype, matrix, row + k, w);
          for (int e = 0; e < 8; ++e) sum = fmaf(w[e], values_[k + e], sum);
        }
        AddOverWarp(sum, to + i);
      }
    }
    __syncthreads();
  }

  __device__ static void AddOverWarp(float sum, float* to) {
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
    if (threadIdx.x % 32 == 0) *to += sum;
  }

  const AppendTokensParams& params_;
  const EndingBlock& block_;
  const AppendTensor& tensor_;
  const int32_t kv_head_;
  const CompressorWeights& weights_;
  const int64_t weight_head_;
  const int32_t depth_;   // l * D
  float* const values_;   // [kAppendPiece] shared
  float* const hidden_;   // [kAppendOutputs] shared
  float* const outputs_;  // [kAppendOutputs] shared
};

template <bool kOverlaps>
__global__ void __launch_bounds__(kAppendThreads)
    AppendMatrixSummariesKernel(const __grid_constant__ AppendTokensParams params) {
  __shared__ __align__(16) float values[kAppendPiece];
  __shared__ float hidden[kAppendOutputs];
  __shared__ float outputs[kAppendOutputs];
  const EndingBlock block(params, blockIdx.x);
  if constexpr (kOverlaps) LetNextGridStart();
  if (block.exists()) {
    const AppendTensor tensor(params.dims, blockIdx.z == 1);
    MatrixSummary(params, block, tensor, blockIdx.y, values, hidden, outputs).Run();
  }
  if constexpr (kOverlaps) WaitForGridBefore();  // who waits for this grid waits for both
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_APPEND_CUH_
