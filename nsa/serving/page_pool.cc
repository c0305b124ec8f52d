#include "nsa/serving/page_pool.h"

#include <algorithm>

namespace nsa::serving {

PagePool::PagePool(const std::vector<int64_t>& pages_of_rank)
    : begin_{0},
      free_(pages_of_rank.size()),
      used_(pages_of_rank.size()),
      lost_(pages_of_rank.size()) {
  for (size_t rank = 0; rank < pages_of_rank.size(); ++rank) {
    begin_.push_back(begin_.back() + static_cast<PageId>(pages_of_rank[rank]));
    for (PageId page = begin_[rank + 1]; page-- > begin_[rank];) free_[rank].push_back(page);
  }
  users_.resize(begin_.back());
}

PageId PagePool::Take(int rank) {
  if (free_[rank].empty()) return kNoPage;
  const PageId page = free_[rank].back();
  free_[rank].pop_back();
  ++used_[rank];
  users_[page] = 1;
  return page;
}

void PagePool::Release(PageId page) {
  if (--users_[page] > 0) return;
  const int rank = RankOf(page);
  --used_[rank];
  if (!lost_[rank]) free_[rank].push_back(page);
}

int PagePool::RankOf(PageId page) const {
  return static_cast<int>(std::upper_bound(begin_.begin(), begin_.end(), page) - begin_.begin()) -
         1;
}

void PagePool::Lose(int rank) {
  lost_[rank] = true;
  free_[rank].clear();
}

}  // namespace nsa::serving
