// How much of a cache the step of one new token reads, counted from the configuration.
#ifndef BENCHMARKS_DECODE_READS_H_
#define BENCHMARKS_DECODE_READS_H_

#include <algorithm>
#include <cstdint>

#include "nsa/config.h"

namespace nsa::benchmarks {

// Rows of k and v of a kv head: tokens, or summaries, which are as large. NSA's table of memory
// access counts so.
struct DecodeReads {
  int64_t summaries, selected, window;

  int64_t rows() const { return summaries + selected + window; }
};

// Of a sequence of `num_tokens` >= 1 whose last one is the new one.
inline DecodeReads DecodeReadsOf(const NsaConfig& config, int64_t num_tokens) {
  const int64_t block = config.select_block_tokens;
  // The last block, which is always selected, may be a part of one.
  const int64_t behind_the_end = NumSelectBlocks(config, num_tokens) * block - num_tokens;
  const int64_t blocks =
      std::min<int64_t>(config.num_selected_blocks, NumSelectBlocks(config, num_tokens));
  return {NumCompressionBlocks(config, num_tokens), blocks * block - behind_the_end,
          std::min<int64_t>(config.window_tokens, num_tokens)};
}

// Bytes of a row of all kv heads, in 16 bits.
inline int64_t KvRowBytes(const NsaConfig& config) {
  return int64_t{config.num_kv_heads} * (config.head_dim_qk + config.head_dim_v) * 2;
}

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_DECODE_READS_H_
