// What goes into a compressor: the tokens of blocks, with their positions added. The forward and
// the backward share it.
#ifndef KERNELS_CPU_COMPRESS_INPUTS_H_
#define KERNELS_CPU_COMPRESS_INPUTS_H_

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/cpu/workers.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

// Blocks of a piece at most: with matrices as parameters, enough to pay for their transposition.
constexpr int64_t kMaxPieceBlocks = 128;

// The runs in pieces of at most `max_blocks`, in order.
std::vector<BlockRun> SplitBlocks(const BlockRun* runs, int32_t num_runs, int64_t max_blocks);

inline const void* WeightsAt(const CompressorWeights& weights, const void* matrix,
                             int64_t element) {
  return static_cast<const char*>(matrix) + element * SizeOf(weights.dtype);
}

// Of the parameters, the head that serves kv head `head`.
inline int64_t WeightHead(const CompressorWeights& weights, int32_t head) {
  return weights.num_heads == 1 ? 0 : head;
}

inline float Gelu(float x) { return 0.5f * x * std::erfc(x * -0.70710678118654752f); }

struct CompressInputsScratch {
  CompressInputsScratch(const CompressParams& params, Carver& carver);

  const void** tokens;  // [blocks*d + l] addresses of the piece's tokens
  float* pe;            // [D]
  float* input;         // [blocks,D] one token of each block
  float* matrix;        // [D,kTileKeys] a tile of w or w1, transposed; linear, mlp
};

// Of one piece and kv head.
class CompressInputs {
 public:
  CompressInputs(const CompressParams& params, const BlockRun& piece, int32_t head,
                 const CompressInputsScratch& scratch);

  // scratch.input = token j of each block, plus its position.
  void LoadToken(int64_t j) const;

  // result [blocks,stride] += matrix [H',width,l*D] * flatten(tokens); what lies past `width` in a
  // row of `result` stays 0. A token's part of the sum is made apart and then added.
  void MultiplyTokens(const void* matrix, int64_t width, float* result, int64_t stride) const;

 private:
  const CompressParams& params_;
  const BlockRun& piece_;
  const int64_t weight_head_;
  const CompressInputsScratch& s_;
};

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_COMPRESS_INPUTS_H_
