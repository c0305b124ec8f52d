// The backward of the compression.
//
// All compressors hand a gradient of each block (of its summary, or of the mlp's hidden layer) on
// to the l tokens that it is made of, by a number or a matrix for each place j in the block. Three
// kinds of items: blocks that make the hidden layer's gradient; tokens that gather from the blocks
// they are in; and places j, each of which sums its part of the parameters' gradients over all
// blocks.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/cpu/compress_inputs.h"
#include "kernels/cpu/float_types.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

constexpr int64_t kTokensPerItem = 512;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

float GeluDerivative(float x) {
  const float density = 0.39894228040143268f * std::exp(-0.5f * x * x);
  return 0.5f * std::erfc(x * -0.70710678118654752f) + x * density;
}

// The mlp's hidden layer, of every block.
struct HiddenLayer {
  HiddenLayer(const AttentionDims& dims, Compressor compressor, int64_t hidden_width,
              int64_t num_blocks, void* memory)
      : stride(compressor == Compressor::kMlp ? RoundUp(hidden_width, kLanes) : 0) {
    Carver carver(static_cast<char*>(memory));
    outputs = carver.Take<float>(dims.num_kv_heads * num_blocks * stride);
    d_inputs = carver.Take<float>(dims.num_kv_heads * num_blocks * stride);
    num_bytes = carver.num_bytes();
  }

  int64_t stride;
  float* outputs;   // [Hkv,num_blocks,stride] of gelu
  float* d_inputs;  // [Hkv,num_blocks,stride] gradients of what gelu is applied to
  int64_t num_bytes;
};

// A piece of the runs and how many blocks of the runs come before it.
struct Piece {
  BlockRun blocks;
  int64_t begin;
};

// Rows of gradients, of consecutive blocks.
struct GradientRows {
  const float* data;
  int64_t stride;
};

struct Scratch {
  Scratch(const CompressParams& forward, int64_t width, char* memory)
      : Scratch(forward, width, Carver(memory)) {}

  CompressInputsScratch inputs;
  float* matrix;      // [width,D] of one place j; or [D,width] w2 or its gradient
  float* tokens;      // [kTokensPerItem,D] gradients of tokens
  float** gradients;  // [kTokensPerItem] where they go
  float* sum;         // [width] over blocks
  int64_t num_bytes;

 private:
  Scratch(const CompressParams& forward, int64_t width, Carver carver) : inputs(forward, carver) {
    matrix = carver.Take<float>(width * forward.head_dim);
    tokens = carver.Take<float>(kTokensPerItem * forward.head_dim);
    gradients = carver.Take<float*>(kTokensPerItem);
    sum = carver.Take<float>(width);
    num_bytes = carver.num_bytes();
  }
};

CompressParams ForwardOf(const CompressBackwardParams& params) {
  return {.dims = params.dims,
          .head_dim = params.head_dim,
          .compressor = params.compressor,
          .weights = params.weights,
          .tokens = params.tokens,
          .documents = params.documents,
          .runs = params.runs,
          .num_runs = params.num_runs,
          .summaries = {}};
}

class CompressGradients {
 public:
  explicit CompressGradients(const CompressBackwardParams& params)
      : params_(params),
        forward_(ForwardOf(params)),
        weights_(params.weights),
        dim_(params.head_dim),
        block_tokens_(params.dims.compress_block_tokens),
        num_kv_heads_(params.dims.num_kv_heads),
        is_mlp_(params.compressor == Compressor::kMlp),
        has_matrix_(is_mlp_ || params.compressor == Compressor::kLinear),
        width_(is_mlp_ ? weights_.hidden_width : dim_),
        matrix_(is_mlp_ ? weights_.w1 : weights_.w),
        hidden_(params.dims, params.compressor, weights_.hidden_width, params.num_blocks,
                params.scratch),
        tokens_(SplitTokens(params.tokens, kTokensPerItem)) {
    int64_t begin = 0;
    for (const BlockRun& blocks : SplitBlocks(params.runs, params.num_runs, kMaxPieceBlocks)) {
      pieces_.push_back({blocks, begin});
      begin += blocks.num_blocks;
    }
  }

  absl::Status Run(Workers& workers) {
    const int64_t width = RoundUp(std::max(width_, dim_), kLanes);
    const auto run = [&](int64_t count, const auto& body) {
      return workers.Run(
          count, Scratch(forward_, width, nullptr).num_bytes,
          [&](int64_t item, char* memory) { body(item, Scratch(forward_, width, memory)); });
    };
    absl::Status status;
    if (is_mlp_) {
      status = run(static_cast<int64_t>(pieces_.size()) * num_kv_heads_, [&](int64_t item,
                                                                             const Scratch& s) {
        RunHidden(pieces_[item / num_kv_heads_], static_cast<int32_t>(item % num_kv_heads_), s);
      });
      if (!status.ok()) return status;
    }
    const int64_t num_token_items = static_cast<int64_t>(tokens_.size()) * num_kv_heads_;
    // The mlp's second layer is one item more for each head of the parameters.
    const int64_t places = block_tokens_ + (is_mlp_ ? 1 : 0);
    const int64_t num_weight_items =
        params_.compressor == Compressor::kMean ? 0 : weights_.num_heads * places;
    return run(num_token_items + num_weight_items, [&](int64_t item, const Scratch& s) {
      if (item < num_token_items) {
        RunTokens(tokens_[item / num_kv_heads_], static_cast<int32_t>(item % num_kv_heads_), s);
        return;
      }
      item -= num_token_items;
      const int32_t weight_head = static_cast<int32_t>(item / places);
      const int64_t j = item % places;
      if (j == block_tokens_) {
        RunSecondLayer(weight_head, s);
      } else if (has_matrix_) {
        RunMatrix(weight_head, j, s);
      } else {
        RunWeight(weight_head, j, s);
      }
    });
  }

 private:
  // Gradients of the summaries of the piece's blocks.
  GradientRows SummaryGradients(const BlockRun& blocks, int32_t head) const {
    const int64_t row = params_.documents[blocks.document].cmp_block_begin + blocks.first_block;
    return {params_.d_summaries + row * params_.d_summaries_stride + head * dim_,
            params_.d_summaries_stride};
  }

  // Gradients of what the tokens were added up to: the hidden layer's inputs or the summaries.
  GradientRows SumGradients(const Piece& piece, int32_t head) const {
    if (!is_mlp_) return SummaryGradients(piece.blocks, head);
    return {hidden_.d_inputs + (head * params_.num_blocks + piece.begin) * hidden_.stride,
            hidden_.stride};
  }

  float Weight(const void* weights, int64_t i) const {
    return LoadFloat(weights_.dtype, weights, i);
  }

  // w2 [D,F] of a head in rows of whole lanes.
  void LoadSecondMatrix(int64_t weight_head, const Scratch& s) const {
    std::fill_n(s.matrix, dim_ * hidden_.stride, 0.0f);
    for (int64_t i = 0; i < dim_; ++i) {
      for (int64_t f = 0; f < width_; ++f) {
        s.matrix[i * hidden_.stride + f] =
            Weight(weights_.w2, (weight_head * dim_ + i) * width_ + f);
      }
    }
  }

  void RunHidden(const Piece& piece, int32_t head, const Scratch& s) const {
    const int64_t weight_head = WeightHead(weights_, head);
    const int64_t stride = hidden_.stride, num_blocks = piece.blocks.num_blocks;
    const int64_t begin = (head * params_.num_blocks + piece.begin) * stride;
    float* const outputs = hidden_.outputs + begin;
    float* const d_inputs = hidden_.d_inputs + begin;
    std::fill_n(outputs, num_blocks * stride, 0.0f);
    CompressInputs(forward_, piece.blocks, head, s.inputs)
        .MultiplyTokens(weights_.w1, width_, outputs, stride);
    LoadSecondMatrix(weight_head, s);
    const GradientRows dy = SummaryGradients(piece.blocks, head);
    MatMul(MatMulArgs{.a = dy.data,
                      .a_stride = dy.stride,
                      .b = s.matrix,
                      .b_stride = stride,
                      .c = d_inputs,
                      .c_stride = stride,
                      .rows = num_blocks,
                      .depth = dim_,
                      .cols = stride},
           1.0f);
    for (int64_t b = 0; b < num_blocks; ++b) {
      for (int64_t f = 0; f < width_; ++f) {
        float& value = outputs[b * stride + f];
        const float x = value + Weight(weights_.b1, weight_head * width_ + f);
        value = Gelu(x);
        d_inputs[b * stride + f] *= GeluDerivative(x);
      }
    }
  }

  // The matrix [width,D] of place j, in place where it is f32.
  MatMulArgs MatrixOf(int64_t weight_head, int64_t j, const Scratch& s) const {
    const int64_t row_length = block_tokens_ * dim_;
    const int64_t first = weight_head * width_ * row_length + j * dim_;
    MatMulArgs args{};
    args.cols = dim_;
    args.depth = width_;
    if (weights_.dtype == DType::kF32) {
      args.b = static_cast<const float*>(matrix_) + first;
      args.b_stride = row_length;
      return args;
    }
    for (int64_t i = 0; i < width_; ++i) {
      ToFloat(weights_.dtype, WeightsAt(weights_, matrix_, first + i * row_length), dim_,
              s.matrix + i * dim_);
    }
    args.b = s.matrix;
    args.b_stride = dim_;
    return args;
  }

  // What place j of a block is multiplied by.
  float FactorOf(int64_t weight_head, int64_t j) const {
    return params_.compressor == Compressor::kMean
               ? 1.0f / static_cast<float>(block_tokens_)
               : Weight(weights_.weight, weight_head * block_tokens_ + j);
  }

  void RunTokens(const TokenRun& tokens, int32_t head, const Scratch& s) const {
    const int64_t weight_head = WeightHead(weights_, head);
    const int64_t d = params_.dims.compress_stride_tokens;
    std::fill_n(s.tokens, tokens.num_tokens * dim_, 0.0f);
    int64_t begin = 0;
    for (int32_t r = 0; r < params_.num_runs; ++r) {
      const Piece run{params_.runs[r], begin};
      begin += run.blocks.num_blocks;
      if (run.blocks.document != tokens.document) continue;
      const GradientRows rows = SumGradients(run, head);
      for (int64_t j = 0; j < block_tokens_; ++j) {
        // Blocks of the run whose token j is one of these.
        const int64_t from = std::max<int64_t>(0, tokens.position - j);
        const int64_t to = std::max<int64_t>(0, tokens.position + tokens.num_tokens - j);
        const int64_t first = std::max(run.blocks.first_block, RoundUp(from, d) / d);
        const int64_t end =
            std::min(run.blocks.first_block + run.blocks.num_blocks, RoundUp(to, d) / d);
        if (first >= end) continue;
        const float* const src = rows.data + (first - run.blocks.first_block) * rows.stride;
        float* const dst = s.tokens + (first * d + j - tokens.position) * dim_;
        if (has_matrix_) {
          MatMulArgs args = MatrixOf(weight_head, j, s);
          args.a = src;
          args.a_stride = rows.stride;
          args.c = dst;
          args.c_stride = d * dim_;
          args.rows = end - first;
          MatMulAdd(args);
        } else {
          for (int64_t b = 0; b < end - first; ++b) {
            AddScaled(src + b * rows.stride, dim_, FactorOf(weight_head, j), dst + b * d * dim_);
          }
        }
      }
    }
    StoreTokenGradients(params_.tokens, params_.d_tokens, params_.dims, params_.head_dim, tokens,
                        head, s.tokens, s.gradients);
  }

  // visit(piece, head) for all blocks of the heads that a head of the parameters serves.
  template <class Visit>
  void ForEachPiece(int32_t weight_head, const Visit& visit) const {
    const int32_t begin = weights_.num_heads == 1 ? 0 : weight_head;
    const int32_t end = weights_.num_heads == 1 ? num_kv_heads_ : weight_head + 1;
    for (int32_t head = begin; head < end; ++head) {
      for (const Piece& piece : pieces_) visit(piece, head);
    }
  }

  static void AddRows(const GradientRows& rows, int64_t num_rows, int64_t width, float* sum) {
    for (int64_t i = 0; i < num_rows; ++i) AddScaled(rows.data + i * rows.stride, width, 1.0f, sum);
  }

  float* PeGradient(int64_t weight_head, int64_t j) const {
    return params_.d_weights.pe + (weight_head * block_tokens_ + j) * dim_;
  }

  void RunWeight(int32_t weight_head, int64_t j, const Scratch& s) const {
    float d_weight = 0.0f;
    std::fill_n(s.sum, dim_, 0.0f);
    ForEachPiece(weight_head, [&](const Piece& piece, int32_t head) {
      CompressInputs(forward_, piece.blocks, head, s.inputs).LoadToken(j);
      const GradientRows dy = SummaryGradients(piece.blocks, head);
      float lanes[kLanes] = {};
      for (int64_t b = 0; b < piece.blocks.num_blocks; ++b) {
        AddProducts(dy.data + b * dy.stride, s.inputs.input + b * dim_, dim_, lanes);
      }
      d_weight += SumOfLanes(lanes);
      AddRows(dy, piece.blocks.num_blocks, dim_, s.sum);
    });
    params_.d_weights.weight[weight_head * block_tokens_ + j] = d_weight;
    if (params_.d_weights.pe == nullptr) return;
    float* const d_pe = PeGradient(weight_head, j);
    std::fill_n(d_pe, dim_, 0.0f);
    AddScaled(s.sum, dim_, FactorOf(weight_head, j), d_pe);
  }

  void RunMatrix(int32_t weight_head, int64_t j, const Scratch& s) const {
    const int64_t row_length = block_tokens_ * dim_;
    float* const d_matrix = (is_mlp_ ? params_.d_weights.w1 : params_.d_weights.w) +
                            weight_head * width_ * row_length + j * dim_;
    for (int64_t i = 0; i < width_; ++i) std::fill_n(d_matrix + i * row_length, dim_, 0.0f);
    const int64_t padded = RoundUp(width_, kLanes);
    std::fill_n(s.sum, padded, 0.0f);
    ForEachPiece(weight_head, [&](const Piece& piece, int32_t head) {
      CompressInputs(forward_, piece.blocks, head, s.inputs).LoadToken(j);
      const GradientRows rows = SumGradients(piece, head);
      MatMulAdd(MatMulArgs{.a = rows.data,
                           .a_stride = 1,
                           .a_depth_stride = rows.stride,
                           .b = s.inputs.input,
                           .b_stride = dim_,
                           .c = d_matrix,
                           .c_stride = row_length,
                           .rows = width_,
                           .depth = piece.blocks.num_blocks,
                           .cols = dim_});
      AddRows(rows, piece.blocks.num_blocks, padded, s.sum);
    });
    if (params_.d_weights.pe == nullptr) return;
    MatMulArgs args = MatrixOf(weight_head, j, s);
    args.a = s.sum;
    args.a_stride = width_;
    args.c = PeGradient(weight_head, j);
    args.c_stride = dim_;
    args.rows = 1;
    MatMul(args, 1.0f);
  }

  void RunSecondLayer(int32_t weight_head, const Scratch& s) const {
    const int64_t stride = hidden_.stride;
    float* const d_b2 = params_.d_weights.b2 + weight_head * dim_;
    std::fill_n(d_b2, dim_, 0.0f);
    std::fill_n(s.sum, stride, 0.0f);
    std::fill_n(s.matrix, dim_ * stride, 0.0f);
    ForEachPiece(weight_head, [&](const Piece& piece, int32_t head) {
      const GradientRows dy = SummaryGradients(piece.blocks, head);
      const int64_t num_blocks = piece.blocks.num_blocks;
      MatMulAdd(
          MatMulArgs{.a = dy.data,
                     .a_stride = 1,
                     .a_depth_stride = dy.stride,
                     .b = hidden_.outputs + (head * params_.num_blocks + piece.begin) * stride,
                     .b_stride = stride,
                     .c = s.matrix,
                     .c_stride = stride,
                     .rows = dim_,
                     .depth = num_blocks,
                     .cols = stride});
      AddRows(dy, num_blocks, dim_, d_b2);
      AddRows(SumGradients(piece, head), num_blocks, stride, s.sum);
    });
    std::copy_n(s.sum, width_, params_.d_weights.b1 + weight_head * width_);
    for (int64_t i = 0; i < dim_; ++i) {
      std::copy_n(s.matrix + i * stride, width_,
                  params_.d_weights.w2 + (weight_head * dim_ + i) * width_);
    }
  }

  const CompressBackwardParams& params_;
  const CompressParams forward_;
  const CompressorWeights& weights_;
  const int64_t dim_;
  const int64_t block_tokens_;
  const int32_t num_kv_heads_;
  const bool is_mlp_;
  const bool has_matrix_;
  const int64_t width_;       // outputs of the first matrix
  const void* const matrix_;  // w or w1
  const HiddenLayer hidden_;
  const std::vector<TokenRun> tokens_;
  std::vector<Piece> pieces_;
};

}  // namespace

int64_t CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                     int32_t hidden_width, int64_t num_blocks) {
  return HiddenLayer(dims, compressor, hidden_width, num_blocks, nullptr).num_bytes;
}

absl::Status CompressBackward(const CompressBackwardParams& params, Workers& workers) {
  return CompressGradients(params).Run(workers);
}

}  // namespace nsa::kernels::cpu
