#include "tests/reference/rows.h"

#include <algorithm>

namespace nsa::reference {

QueryPosition Locate(const ReferenceConfig& config, const std::vector<int64_t>& cu_seqlens,
                     int64_t token) {
  const int64_t document =
      std::upper_bound(cu_seqlens.begin(), cu_seqlens.end(), token) - cu_seqlens.begin() - 1;
  QueryPosition query;
  query.document_begin = cu_seqlens[document];
  query.t = token - query.document_begin;
  for (int64_t i = 0; i < document; ++i) {
    query.cmp_block_begin += NumCompressBlocks(config, cu_seqlens[i + 1] - cu_seqlens[i]);
  }
  query.num_cmp_blocks = NumCompressBlocks(config, cu_seqlens[document + 1] - cu_seqlens[document]);
  return query;
}

std::vector<int64_t> CompressedRows(const ReferenceConfig& config, const QueryPosition& query) {
  const int64_t l = config.compress_block_tokens, d = config.compress_stride_tokens;
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < query.num_cmp_blocks && i * d + l - 1 <= query.t; ++i) {
    rows.push_back(query.cmp_block_begin + i);
  }
  return rows;
}

std::vector<int64_t> SelectedRows(const ReferenceConfig& config, const QueryPosition& query,
                                  const int32_t* blocks) {
  const int64_t select_tokens = config.select_block_tokens;
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < config.num_selected_blocks; ++i) {
    const int64_t block = blocks[i];
    if (block < 0) continue;
    for (int64_t t = block * select_tokens; t < (block + 1) * select_tokens && t <= query.t; ++t) {
      rows.push_back(query.document_begin + t);
    }
  }
  return rows;
}

std::vector<int64_t> WindowRows(const ReferenceConfig& config, const QueryPosition& query) {
  std::vector<int64_t> rows;
  for (int64_t t = std::max<int64_t>(0, query.t - config.window_tokens + 1); t <= query.t; ++t) {
    rows.push_back(query.document_begin + t);
  }
  return rows;
}

}  // namespace nsa::reference
