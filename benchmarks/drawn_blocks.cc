#include "benchmarks/drawn_blocks.h"

#include <algorithm>
#include <random>

namespace nsa::benchmarks {

std::vector<int32_t> DrawBlocks(const kernels::AttentionDims& dims, int64_t num_tokens,
                                int64_t pool_blocks) {
  const int32_t n = dims.num_selected_blocks;
  constexpr int64_t kNeighbours = 32;
  std::mt19937_64 random(7);
  std::vector<int32_t> indices(num_tokens * dims.num_kv_heads * n, -1);
  std::vector<int32_t> pool, picks;
  // `count` distinct blocks of [1, end)
  const auto draw = [&](int64_t count, int64_t end, std::vector<int32_t>& to) {
    to.clear();
    while (static_cast<int64_t>(to.size()) < count) {
      const int32_t block = 1 + static_cast<int32_t>(random() % (end - 1));
      if (std::find(to.begin(), to.end(), block) == to.end()) to.push_back(block);
    }
  };
  for (int32_t head = 0; head < dims.num_kv_heads; ++head) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t own = t / dims.select_block_tokens;
      int32_t* const row = &indices[(t * dims.num_kv_heads + head) * n];
      if (own < n) {
        for (int64_t b = 0; b <= own; ++b) row[b] = static_cast<int32_t>(b);
        continue;
      }
      if (pool_blocks > 0) {
        const int64_t first_own = t / kNeighbours * kNeighbours / dims.select_block_tokens;
        const int64_t size = std::min(pool_blocks, first_own - 2);
        if (t % kNeighbours == 0 || pool.empty()) draw(size, first_own - 1, pool);
        std::shuffle(pool.begin(), pool.end(), random);
        picks.assign(pool.begin(), pool.begin() + std::min<int64_t>(n - 3, pool.size()));
      } else {
        draw(n - 3, own - 1, picks);
      }
      picks.push_back(0);
      picks.push_back(static_cast<int32_t>(own - 1));
      picks.push_back(static_cast<int32_t>(own));
      std::sort(picks.begin(), picks.end());
      std::copy(picks.begin(), picks.end(), row);
    }
  }
  return indices;
}

double CountSelectedPairs(const kernels::AttentionDims& dims, const std::vector<int32_t>& indices) {
  const int64_t row = int64_t{dims.num_kv_heads} * dims.num_selected_blocks;  // of a query
  double pairs = 0;
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] < 0) continue;
    const int64_t position = static_cast<int64_t>(i) / row;
    const int64_t first = int64_t{indices[i]} * dims.select_block_tokens;
    pairs += std::min<int64_t>(position + 1 - first, dims.select_block_tokens);
  }
  return pairs / dims.num_kv_heads;
}

}  // namespace nsa::benchmarks
