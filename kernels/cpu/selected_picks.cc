#include "kernels/cpu/selected_picks.h"

#include <algorithm>

namespace nsa::kernels::cpu {

Pick* CollectPicks(const AttentionDims& dims, const int32_t* block_indices, const QueryRun& run,
                   int32_t kv_head, Pick* picks) {
  const int32_t n = dims.num_selected_blocks;
  Pick* end = picks;
  for (int64_t i = 0; i < run.num_queries; ++i) {
    const int32_t* const indices =
        block_indices + ((run.row + i) * dims.num_kv_heads + kv_head) * n;
    for (int32_t j = 0; j < n && indices[j] >= 0; ++j) {
      *end++ = Pick{.block = indices[j], .query = static_cast<int32_t>(i)};
    }
  }
  std::sort(picks, end, [](const Pick& a, const Pick& b) {
    return a.block != b.block ? a.block < b.block : a.query < b.query;
  });
  return end;
}

}  // namespace nsa::kernels::cpu
