#include "kernels/cpu/compress_inputs.h"

#include <algorithm>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {

std::vector<BlockRun> SplitBlocks(const BlockRun* runs, int32_t num_runs, int64_t max_blocks) {
  std::vector<BlockRun> pieces;
  for (int32_t r = 0; r < num_runs; ++r) {
    const BlockRun& run = runs[r];
    for (int64_t b = 0; b < run.num_blocks; b += max_blocks) {
      pieces.push_back(
          {run.document, run.first_block + b, std::min(max_blocks, run.num_blocks - b)});
    }
  }
  return pieces;
}

CompressInputsScratch::CompressInputsScratch(const CompressParams& params, Carver& carver) {
  const int64_t dim = params.head_dim;
  const bool has_matrix =
      params.compressor == Compressor::kLinear || params.compressor == Compressor::kMlp;
  tokens = carver.Take<const void*>(kMaxPieceBlocks * params.dims.compress_stride_tokens +
                                    params.dims.compress_block_tokens);
  pe = carver.Take<float>(dim);
  input = carver.Take<float>(kMaxPieceBlocks * dim);
  matrix = carver.Take<float>(has_matrix ? dim * kTileKeys : 0);
}

CompressInputs::CompressInputs(const CompressParams& params, const BlockRun& piece, int32_t head,
                               const CompressInputsScratch& scratch)
    : params_(params), piece_(piece), weight_head_(WeightHead(params.weights, head)), s_(scratch) {
  const int64_t stride_tokens = params.dims.compress_stride_tokens;
  FindTokens(params.tokens, params.dims.dtype, piece.document, piece.first_block * stride_tokens,
             static_cast<int32_t>((piece.num_blocks - 1) * stride_tokens +
                                  params.dims.compress_block_tokens),
             head, s_.tokens);
}

void CompressInputs::LoadToken(int64_t j) const {
  const CompressorWeights& weights = params_.weights;
  const int64_t dim = params_.head_dim;
  const bool has_pe = params_.compressor != Compressor::kMean && weights.pe != nullptr;
  if (has_pe) {
    const int64_t row = weight_head_ * params_.dims.compress_block_tokens + j;
    ToFloat(weights.dtype, WeightsAt(weights, weights.pe, row * dim), dim, s_.pe);
  }
  for (int64_t b = 0; b < piece_.num_blocks; ++b) {
    float* const row = s_.input + b * dim;
    ToFloat(params_.dims.dtype, s_.tokens[b * params_.dims.compress_stride_tokens + j], dim, row);
    if (has_pe) AddScaled(s_.pe, dim, 1.0f, row);
  }
}

void CompressInputs::MultiplyTokens(const void* matrix, int64_t width, float* result,
                                    int64_t stride) const {
  const CompressorWeights& weights = params_.weights;
  const int64_t dim = params_.head_dim;
  const int64_t block_tokens = params_.dims.compress_block_tokens;
  const int64_t row_length = block_tokens * dim;
  const void* rows[kTileKeys];
  for (int64_t j = 0; j < block_tokens; ++j) {
    LoadToken(j);
    for (int64_t first = 0; first < width; first += kTileKeys) {
      const int32_t count = static_cast<int32_t>(std::min<int64_t>(kTileKeys, width - first));
      for (int32_t i = 0; i < count; ++i) {
        rows[i] =
            WeightsAt(weights, matrix, (weight_head_ * width + first + i) * row_length + j * dim);
      }
      TransposeToFloat(weights.dtype, rows, count, dim, s_.matrix);
      MatMulAdd(MatMulArgs{.a = s_.input,
                           .a_stride = dim,
                           .b = s_.matrix,
                           .b_stride = kTileKeys,
                           .c = result + first,
                           .c_stride = stride,
                           .rows = piece_.num_blocks,
                           .depth = dim,
                           .cols = (count + kLanes - 1) / kLanes * kLanes});
    }
  }
}

}  // namespace nsa::kernels::cpu
