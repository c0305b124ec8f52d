// Pages of equal size on several ranks that one home deals with: which are free, and how many
// sequences use each of the others. Pure host data.
#ifndef NSA_SERVING_PAGE_POOL_H_
#define NSA_SERVING_PAGE_POOL_H_

#include <cstdint>
#include <vector>

namespace nsa::serving {

using PageId = int32_t;
inline constexpr PageId kNoPage = -1;

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

class PagePool {
 public:
  explicit PagePool(const std::vector<int64_t>& pages_of_rank);  // [P]

  int num_ranks() const { return static_cast<int>(begin_.size()) - 1; }
  int64_t num_pages() const { return begin_.back(); }
  int64_t num_pages(int rank) const { return begin_[rank + 1] - begin_[rank]; }
  int64_t num_free(int rank) const { return static_cast<int64_t>(free_[rank].size()); }
  int64_t num_used(int rank) const { return used_[rank]; }

  // A free page of `rank`, now used once; kNoPage when there is none.
  PageId Take(int rank);
  // Of a page in use: one more, one less. A page that no one uses is free.
  void Share(PageId page) { ++users_[page]; }
  void Release(PageId page);
  bool is_shared(PageId page) const { return users_[page] > 1; }

  int RankOf(PageId page) const;
  // Among this pool's pages of its rank.
  int64_t IndexOf(PageId page) const { return page - begin_[RankOf(page)]; }

  // Pages of `rank` are not taken any more.
  void Lose(int rank);
  bool is_lost(int rank) const { return lost_[rank]; }

 private:
  std::vector<PageId> begin_;              // [P + 1] first page of each rank
  std::vector<int32_t> users_;             // [num_pages]
  std::vector<std::vector<PageId>> free_;  // [P], taken from the end
  std::vector<int64_t> used_;              // [P]
  std::vector<bool> lost_;                 // [P]
};

}  // namespace nsa::serving

#endif  // NSA_SERVING_PAGE_POOL_H_
