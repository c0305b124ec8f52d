// How a record holds K and V of one (select block, kv head).
//
//   K [l'/8][Dk/32][4][8 tokens][8 values], then V [l'/8][Dv/32][4][8 tokens][8 values]
//
// An 8x8 matrix of 16-bit values is what ldmatrix reads, here 128 bytes in a row, so that it meets
// no bank twice. Matrix m of a group of 32 dimensions holds dimension 8c + 2m + e at value 2c + e:
// the lane that works on columns 2c and 2c + 1 of the four matrices then works on eight
// neighbouring dimensions, and reads q and writes o 16 bytes at a time. Tokens are outermost, so
// that 64 tokens of a longer block are one piece of K and one of V.
#ifndef KERNELS_CUDA_RECORD_LAYOUT_H_
#define KERNELS_CUDA_RECORD_LAYOUT_H_

#include <cstdint>

#include "kernels/types.h"

namespace nsa::kernels::cuda {

constexpr int64_t RecordBytes(const AttentionDims& dims) {
  return static_cast<int64_t>(dims.select_block_tokens) * (dims.head_dim_qk + dims.head_dim_v) * 2;
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_RECORD_LAYOUT_H_
