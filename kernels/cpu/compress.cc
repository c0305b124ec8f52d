// Stage 2: l tokens become one summary (NSA equation 7), by one of four compressors.
//
// An item is a piece of a run of blocks, of one kv head.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/compress_inputs.h"
#include "kernels/cpu/float_types.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

// Blocks of an item at least.
constexpr int64_t kMinBlocks = 16;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Scratch {
  Scratch(const CompressParams& params, char* memory) : Scratch(params, Carver(memory)) {}

  CompressInputsScratch inputs;
  float* output;   // [blocks,D]
  float* hidden;   // [blocks,width] width = F, in whole lanes
  float* matrix2;  // [F,D] w2, transposed
  int64_t num_bytes;

 private:
  Scratch(const CompressParams& params, Carver carver) : inputs(params, carver) {
    const int64_t dim = params.head_dim;
    const int64_t width = params.compressor == Compressor::kMlp ? params.weights.hidden_width : 0;
    output = carver.Take<float>(kMaxPieceBlocks * dim);
    hidden = carver.Take<float>(kMaxPieceBlocks * RoundUp(width, kLanes));
    matrix2 = carver.Take<float>(width * dim);
    num_bytes = carver.num_bytes();
  }
};

class Item {
 public:
  Item(const CompressParams& params, const BlockRun& piece, int32_t head, const Scratch& s)
      : params_(params),
        weights_(params.weights),
        block_tokens_(params.dims.compress_block_tokens),
        dim_(params.head_dim),
        piece_(piece),
        head_(head),
        weight_head_(WeightHead(params.weights, head)),
        s_(s),
        inputs_(params, piece, head, s.inputs) {}

  void Run() {
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
        inputs_.MultiplyTokens(weights_.w, dim_, s_.output, dim_);
        break;
      case Compressor::kMlp:
        RunMlp();
        break;
    }
    StoreSummaries();
  }

 private:
  // output += sum over the tokens of weight_of(j) * token j
  template <class WeightOf>
  void AddTokens(const WeightOf& weight_of) {
    for (int64_t j = 0; j < block_tokens_; ++j) {
      inputs_.LoadToken(j);
      AddScaled(s_.inputs.input, piece_.num_blocks * dim_, weight_of(j), s_.output);
    }
  }

  void RunMlp() {
    const int64_t width = weights_.hidden_width;
    const int64_t stride = RoundUp(width, kLanes);
    std::fill_n(s_.hidden, piece_.num_blocks * stride, 0.0f);
    inputs_.MultiplyTokens(weights_.w1, width, s_.hidden, stride);
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
  const int64_t dim_;
  const BlockRun& piece_;
  const int32_t head_;
  const int64_t weight_head_;
  const Scratch& s_;
  const CompressInputs inputs_;
};

}  // namespace

absl::Status Compress(const CompressParams& params, Workers& workers) {
  int64_t num_blocks = 0;
  for (int32_t r = 0; r < params.num_runs; ++r) num_blocks += params.runs[r].num_blocks;
  const int32_t num_heads = params.dims.num_kv_heads;
  const int64_t balanced = num_blocks * num_heads / (4 * workers.num_threads());
  const int64_t max_blocks = std::clamp(balanced, kMinBlocks, kMaxPieceBlocks);
  const std::vector<BlockRun> pieces = SplitBlocks(params.runs, params.num_runs, max_blocks);
  const int64_t scratch_bytes = Scratch(params, nullptr).num_bytes;
  return workers.Run(static_cast<int64_t>(pieces.size()) * num_heads, scratch_bytes,
                     [&](int64_t item, char* scratch) {
                       Item(params, pieces[item / num_heads],
                            static_cast<int32_t>(item % num_heads), Scratch(params, scratch))
                           .Run();
                     });
}

}  // namespace nsa::kernels::cpu
