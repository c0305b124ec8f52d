#include "kernels/cpu/select_blocks.h"

#include <algorithm>
#include <numeric>

namespace nsa::kernels::cpu {
namespace {

struct Better {
  bool operator()(const ScoredBlock& a, const ScoredBlock& b) const {
    return a.score != b.score ? a.score > b.score : a.block < b.block;
  }
};

// Replaces the top of a heap, in one walk down.
void ReplaceTop(std::vector<ScoredBlock>& heap, ScoredBlock block) {
  size_t hole = 0;
  for (size_t child; (child = 2 * hole + 1) < heap.size(); hole = child) {
    if (child + 1 < heap.size() && Better()(heap[child], heap[child + 1])) ++child;
    if (!Better()(block, heap[child])) break;
    heap[hole] = heap[child];
  }
  heap[hole] = block;
}

}  // namespace

void SelectBlocks(const AttentionDims& dims, const float* scores, int64_t num_candidates,
                  std::vector<ScoredBlock>& heap, int32_t* selected) {
  const int32_t n = dims.num_selected_blocks;
  if (num_candidates <= n) {
    std::iota(selected, selected + num_candidates, 0);
    std::fill(selected + num_candidates, selected + n, -1);
    return;
  }
  // More candidates than n >= n_init + n_local: the forced ones are distinct.
  const int32_t first_free = dims.num_initial_blocks;
  const int32_t first_local = static_cast<int32_t>(num_candidates) - dims.num_local_blocks;
  const size_t num_free = n - dims.num_initial_blocks - dims.num_local_blocks;

  // The best so far as a heap with the worst of them on top. Blocks come in ascending order, so one
  // whose score only equals the worst's is not better.
  heap.clear();
  for (int32_t block = first_free; num_free > 0 && block < first_local; ++block) {
    if (heap.size() < num_free) {
      heap.push_back({scores[block], block});
      if (heap.size() == num_free) std::make_heap(heap.begin(), heap.end(), Better());
    } else if (scores[block] > heap.front().score) {
      ReplaceTop(heap, {scores[block], block});
    }
  }
  std::iota(selected, selected + first_free, 0);
  int32_t* const free_blocks = selected + first_free;
  for (size_t i = 0; i < heap.size(); ++i) free_blocks[i] = heap[i].block;
  std::sort(free_blocks, free_blocks + heap.size());
  std::iota(free_blocks + heap.size(), selected + n, first_local);
}

}  // namespace nsa::kernels::cpu
