// Tokens of a strided tensor into the layout of a record, in global or in shared memory.
#ifndef KERNELS_CUDA_PACK_TOKENS_CUH_
#define KERNELS_CUDA_PACK_TOKENS_CUH_

#include <cstdint>

#include "kernels/cuda/record_layout.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {

// Packs num_tokens rows, a multiple of 8; row_at(token) is the address of one, null for one that is
// to be zero. Done by all kThreads threads of the CTA. A thread moves 32 dimensions of a token at a
// time: 64 bytes of its row, and 16 bytes in each of four matrices.
template <int kThreads, class RowAt>
__device__ inline void PackRows(int32_t num_tokens, int32_t head_dim, const RowAt& row_at,
                                uint4* to) {
  const int32_t groups = head_dim / 32;
  // Eight tokens, then the groups, then the next eight: a warp writes whole matrices.
  for (int32_t item = threadIdx.x; item < num_tokens * groups; item += kThreads) {
    const int32_t group = item / 8 % groups;
    const int32_t token = item / (8 * groups) * 8 + item % 8;
    const char* const row = row_at(token);
    uint4 rows[4] = {};
    if (row != nullptr) {
      const uint4* const from = reinterpret_cast<const uint4*>(row + group * 64);
      for (int c = 0; c < 4; ++c) rows[c] = from[c];
    }
    uint4* const matrices = to + ((token / 8 * groups + group) * 4) * 8 + token % 8;
    matrices[0] = make_uint4(rows[0].x, rows[1].x, rows[2].x, rows[3].x);
    matrices[8] = make_uint4(rows[0].y, rows[1].y, rows[2].y, rows[3].y);
    matrices[16] = make_uint4(rows[0].z, rows[1].z, rows[2].z, rows[3].z);
    matrices[24] = make_uint4(rows[0].w, rows[1].w, rows[2].w, rows[3].w);
  }
}

// Packs tokens [position, position + num_tokens) of a document; those that no segment covers are
// zero.
template <int kThreads>
__device__ inline void PackTokens(const TokenRows& tokens, int32_t document, int64_t position,
                                  int32_t num_tokens, int32_t head, int32_t head_dim, uint4* to) {
  TokenRun run;
  int64_t run_begin = 0, run_end = -1;  // tokens that `run` is known for
  const auto row_at = [&](int32_t token) -> const char* {
    if (token < run_begin || token >= run_end) {
      run = FindTokens(tokens, 2, document, position + token, head);
      run_begin = token;
      run_end = token + run.num_tokens;
    }
    return run.rows == nullptr ? nullptr : run.rows + (token - run_begin) * run.row_bytes;
  };
  PackRows<kThreads>(num_tokens, head_dim, row_at, to);
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_PACK_TOKENS_CUH_
