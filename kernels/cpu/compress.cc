// Stage 2: l tokens become one summary (NSA equation 7), by one of four compressors.
//
// An item is a piece of a run of blocks, of one kv head.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/cpu/float_types.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

// Blocks of an item: with matrices as parameters, enough to pay for their transposition.
constexpr int64_t kMaxBlocks = 128;
constexpr int64_t kMinBlocks = 16;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Outputs of the first matrix: what one block becomes before it is a summary.
int64_t FirstWidth(const CompressParams& params) {
  return params.compressor == Compressor::kMlp ? params.weights.hidden_width : params.head_dim;
}

struct Scratch {
  Scratch(const CompressParams& params, char* memory) : Scratch(params, Carver(memory)) {}

  const void** tokens;  // [blocks*d + l] addresses of the piece's tokens
  float* pe;            // [l,D]
  float* input;         // [blocks,D] one token of each block
  float* output;        // [blocks,D]
  float* hidden;        // [blocks,width] width = F, in whole lanes
  float* matrix;        // [D,kTileKeys] a tile of w or w1, transposed
  float* matrix2;       // [F,D] w2, transposed
  int64_t num_bytes;

 private:
  Scratch(const CompressParams& params, Carver carver) {
    const int64_t block_tokens = params.dims.compress_block_tokens;
    const int64_t dim = params.head_dim;
    const bool has_matrix =
        params.compressor == Compressor::kLinear || params.compressor == Compressor::kMlp;
    const int64_t width = has_matrix ? RoundUp(FirstWidth(params), kLanes) : 0;
    const bool is_mlp = params.compressor == Compressor::kMlp;
    tokens =
        carver.Take<const void*>(kMaxBlocks * params.dims.compress_stride_tokens + block_tokens);
    pe = carver.Take<float>(block_tokens * dim);
    input = carver.Take<float>(kMaxBlocks * dim);
    output = carver.Take<float>(kMaxBlocks * dim);
    hidden = carver.Take<float>(kMaxBlocks * width);
    matrix = carver.Take<float>(has_matrix ? dim * kTileKeys : 0);
    matrix2 = carver.Take<float>(is_mlp ? params.weights.hidden_width * dim : 0);
    num_bytes = carver.num_bytes();
  }
};

struct Piece {
  int32_t document;
  int64_t first_block;  // in the document
  int64_t num_blocks;
};

float Gelu(float x) { return 0.5f * x * std::erfc(x * -0.70710678118654752f); }

class Item {
 public:
  Item(const CompressParams& params, const Piece& piece, int32_t head, const Scratch& s)
      : params_(params),
        weights_(params.weights),
        block_tokens_(params.dims.compress_block_tokens),
        stride_tokens_(params.dims.compress_stride_tokens),
        dim_(params.head_dim),
        piece_(piece),
        head_(head),
        weight_head_(params.weights.num_heads == 1 ? 0 : head),
        s_(s) {}

  void Run() {
    FindTokens(params_.tokens, params_.dims.dtype, piece_.document,
               piece_.first_block * stride_tokens_,
               static_cast<int32_t>((piece_.num_blocks - 1) * stride_tokens_ + block_tokens_),
               head_, s_.tokens);
    const bool has_pe = params_.compressor != Compressor::kMean && weights_.pe != nullptr;
    if (has_pe) {
      const int64_t count = block_tokens_ * dim_;
      ToFloat(weights_.dtype, Weights(weights_.pe, weight_head_ * count), count, s_.pe);
    }
    pe_ = has_pe ? s_.pe : nullptr;
    std::fill_n(s_.output, piece_.num_blocks * dim_, 0.0f);
    switch (params_.compressor) {
      case Compressor::kMean:
        AddTokens([](int64_t) { return 1.0f; });
        Scale(1.0f / static_cast<float>(block_tokens_), piece_.num_blocks * dim_, s_.output);
        break;
      case Compressor::kWeighted:
        AddTokens([this](int64_t j) {
          return LoadFloat(weights_.dtype, weights_.weight, weight_head_ * block_tokens_ + j);
        });
        break;
      case Compressor::kLinear:
        MultiplyTokens(weights_.w, dim_, s_.output, dim_);
        break;
      case Compressor::kMlp:
        RunMlp();
        break;
    }
    StoreSummaries();
  }

 private:
  const void* Weights(const void* weights, int64_t element) const {
    return static_cast<const char*>(weights) + element * SizeOf(weights_.dtype);
  }

  // input = token j of each block, plus its position.
  void LoadToken(int64_t j) {
    for (int64_t b = 0; b < piece_.num_blocks; ++b) {
      float* const row = s_.input + b * dim_;
      ToFloat(params_.dims.dtype, s_.tokens[b * stride_tokens_ + j], dim_, row);
      if (pe_ != nullptr) AddScaled(pe_ + j * dim_, dim_, 1.0f, row);
    }
  }

  // output += sum over the tokens of weight_of(j) * token j
  template <class WeightOf>
  void AddTokens(const WeightOf& weight_of) {
    for (int64_t j = 0; j < block_tokens_; ++j) {
      LoadToken(j);
      AddScaled(s_.input, piece_.num_blocks * dim_, weight_of(j), s_.output);
    }
  }

  // result [blocks,stride] += matrix [H',width,l*D] * flatten(tokens); what lies past `width` in a
  // row of `result` stays 0. A token's part of the sum is made apart and then added.
  void MultiplyTokens(const void* matrix, int64_t width, float* result, int64_t stride) {
    const int64_t row_length = block_tokens_ * dim_;
    const void* rows[kTileKeys];
    for (int64_t j = 0; j < block_tokens_; ++j) {
      LoadToken(j);
      for (int64_t first = 0; first < width; first += kTileKeys) {
        const int32_t count = static_cast<int32_t>(std::min<int64_t>(kTileKeys, width - first));
        for (int32_t i = 0; i < count; ++i) {
          rows[i] = Weights(matrix, (weight_head_ * width + first + i) * row_length + j * dim_);
        }
        TransposeToFloat(weights_.dtype, rows, count, dim_, s_.matrix);
        MatMulAdd(MatMulArgs{.a = s_.input,
                             .a_stride = dim_,
                             .b = s_.matrix,
                             .b_stride = kTileKeys,
                             .c = result + first,
                             .c_stride = stride,
                             .rows = piece_.num_blocks,
                             .depth = dim_,
                             .cols = RoundUp(count, kLanes)});
      }
    }
  }

  void RunMlp() {
    const int64_t width = weights_.hidden_width;
    const int64_t stride = RoundUp(width, kLanes);
    std::fill_n(s_.hidden, piece_.num_blocks * stride, 0.0f);
    MultiplyTokens(weights_.w1, width, s_.hidden, stride);
    for (int64_t b = 0; b < piece_.num_blocks; ++b) {
      for (int64_t f = 0; f < width; ++f) {
        float& value = s_.hidden[b * stride + f];
        value = Gelu(value + LoadFloat(weights_.dtype, weights_.b1, weight_head_ * width + f));
      }
      for (int64_t i = 0; i < dim_; ++i) {
        s_.output[b * dim_ + i] = LoadFloat(weights_.dtype, weights_.b2, weight_head_ * dim_ + i);
      }
    }
    for (int64_t i = 0; i < dim_; ++i) {
      for (int64_t f = 0; f < width; ++f) {
        s_.matrix2[f * dim_ + i] =
            LoadFloat(weights_.dtype, weights_.w2, (weight_head_ * dim_ + i) * width + f);
      }
    }
    MatMulAdd(MatMulArgs{.a = s_.hidden,
                         .a_stride = stride,
                         .b = s_.matrix2,
                         .b_stride = dim_,
                         .c = s_.output,
                         .c_stride = dim_,
                         .rows = piece_.num_blocks,
                         .depth = width,
                         .cols = dim_});
  }

  void StoreSummaries() {
    const int64_t first_row =
        params_.documents[piece_.document].cmp_block_begin + piece_.first_block;
    for (int64_t b = 0; b < piece_.num_blocks; ++b) {
      FromFloat(params_.dims.dtype, s_.output + b * dim_, dim_,
                RowOf(params_.summaries, params_.dims.dtype, first_row + b, head_));
    }
  }

  const CompressParams& params_;
  const CompressorWeights& weights_;
  const int64_t block_tokens_;
  const int64_t stride_tokens_;
  const int64_t dim_;
  const Piece& piece_;
  const int32_t head_;
  const int64_t weight_head_;
  const Scratch& s_;
  const float* pe_ = nullptr;
};

}  // namespace

absl::Status Compress(const CompressParams& params, Workers& workers) {
  int64_t num_blocks = 0;
  for (int32_t r = 0; r < params.num_runs; ++r) num_blocks += params.runs[r].num_blocks;
  const int32_t num_heads = params.dims.num_kv_heads;
  const int64_t balanced = num_blocks * num_heads / (4 * workers.num_threads());
  const int64_t max_blocks = std::clamp(balanced, kMinBlocks, kMaxBlocks);
  std::vector<Piece> pieces;
  for (int32_t r = 0; r < params.num_runs; ++r) {
    const BlockRun& run = params.runs[r];
    for (int64_t b = 0; b < run.num_blocks; b += max_blocks) {
      pieces.push_back(
          {run.document, run.first_block + b, std::min(max_blocks, run.num_blocks - b)});
    }
  }
  const int64_t scratch_bytes = Scratch(params, nullptr).num_bytes;
  return workers.Run(static_cast<int64_t>(pieces.size()) * num_heads, scratch_bytes,
                     [&](int64_t item, char* scratch) {
                       Item(params, pieces[item / num_heads],
                            static_cast<int32_t>(item % num_heads), Scratch(params, scratch))
                           .Run();
                     });
}

}  // namespace nsa::kernels::cpu
