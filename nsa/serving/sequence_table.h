// The sequences of one home and their pages: pure host data, no memory of pages.
//
// A sequence has lists of pages. List 0 holds all select blocks. Where the window's or the
// compression's keys and values are not to be had there, they have lists of their own, of which
// only the last pages are kept. The last list is of summary pages, from a pool of their own.
#ifndef NSA_SERVING_SEQUENCE_TABLE_H_
#define NSA_SERVING_SEQUENCE_TABLE_H_

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "nsa/serving/kv_cache.h"
#include "nsa/serving/page_pool.h"

namespace nsa::serving {

inline constexpr int kMaxPageLists = 3;
// Of one sequence and call of Extend.
inline constexpr int64_t kMaxExtendTokens = 1024;

struct SequenceTableOptions {
  NsaConfig config;
  int32_t home = 0;                    // this rank
  std::vector<int64_t> pages_of_rank;  // [P] of this home
  int64_t num_summary_pages = 0;       // of this home
  int32_t max_sequences = 0;
  int64_t max_tokens = 0;           // of a sequence
  int num_lists = 1;                // of pages, 1 to kMaxPageLists
  bool only_at_home = false;        // pages are taken of the home alone
  int64_t max_rollback_tokens = 0;  // of lists from 1 on
};

// A page of a list became another one. Pages are named by list, with num_lists for summaries.
struct PageChange {
  int list;
  int32_t slot;   // of the sequence
  int64_t index;  // in the list
  PageId before;  // kNoPage, or the page whose contents the new one must get
  PageId after;
};

class SequenceTable {
 public:
  struct Sequence {
    int32_t slot = 0;  // its row in tables, below max_sequences
    int64_t num_tokens = 0;
    // [num_lists + 1], kNoPage where a page was dropped.
    std::vector<std::vector<PageId>> lists;
  };

  explicit SequenceTable(const SequenceTableOptions& options);

  absl::StatusOr<SequenceId> Open();
  absl::StatusOr<const Sequence*> Find(SequenceId id) const;
  // Whether `num_new` more tokens have room, extended by at most kMaxExtendTokens at a time.
  absl::Status Check(SequenceId id, int64_t num_new) const;
  // All or nothing: takes the pages that the new tokens are written to.
  absl::StatusOr<std::vector<PageChange>> Extend(absl::Span<const StepSequence> batch);
  // As Extend, of an empty sequence, whose first blocks lie where `block_ranks` says, or, if a rank
  // has no more pages, elsewhere.
  absl::StatusOr<std::vector<PageChange>> ExtendOnRanks(SequenceId id, int64_t num_tokens,
                                                        absl::Span<const int32_t> block_ranks);
  absl::Status Truncate(SequenceId id, int64_t num_tokens);
  // Every page of the new sequence is a change, of no contents.
  absl::StatusOr<SequenceId> Fork(SequenceId id, std::vector<PageChange>* changes);
  absl::Status Close(SequenceId id);

  // Sequences with pages on `rank` are Unavailable from now on.
  void Lose(int rank);

  int num_lists() const { return options_.num_lists; }
  int32_t num_sequences() const { return static_cast<int32_t>(sequences_.size()); }
  const PagePool& pages() const { return pages_; }
  const PagePool& summary_pages() const { return summaries_; }
  // First token that a list from 1 on keeps of a sequence of `num_tokens`: a page's first.
  int64_t FirstKeptToken(int64_t num_tokens) const;

 private:
  struct Need {
    int64_t pages = 0;
    int64_t summary_pages = 0;
  };

  PagePool& PoolOf(int list) { return list == options_.num_lists ? summaries_ : pages_; }
  const PagePool& PoolOf(int list) const {
    return list == options_.num_lists ? summaries_ : pages_;
  }
  // Units of a list (tokens, or compression blocks) that a sequence of `num_tokens` has, and that a
  // page holds.
  int64_t NumUnits(int list, int64_t num_tokens) const;
  int64_t UnitsOfPage(int list) const;
  // Pages that new tokens are written to: [first, end) in the list. `only_kept`: of the lists from
  // 1 on, only those that are kept afterwards.
  std::pair<int64_t, int64_t> Written(int list, const Sequence& sequence, int64_t num_new,
                                      bool only_kept) const;
  // How far back a query, or a compression block, reaches: of the lists from 1 on.
  int64_t Reach() const;
  int64_t MaxKeptPages() const;
  Need NeedOf(const Sequence& sequence, int64_t num_new, bool only_kept) const;
  absl::Status CheckRoom(const Sequence& sequence, int64_t num_new) const;
  absl::Status CheckNeed(const Need& need) const;
  // With a page on each of these ranks, and the rest at home, if pages of others are not taken.
  absl::Status CheckNeedOnRanks(const Need& need, absl::Span<const int32_t> block_ranks) const;
  absl::Status CheckAlive(const Sequence& sequence) const;
  int64_t NumFree() const;
  PageId TakePage(int list, int32_t preferred_rank);
  void Write(Sequence& sequence, int64_t num_new, bool only_kept,
             absl::Span<const int32_t> block_ranks, std::vector<PageChange>& changes);
  void DropOld(Sequence& sequence);

  const SequenceTableOptions options_;
  PagePool pages_, summaries_;
  std::map<SequenceId, Sequence> sequences_;
  std::vector<int32_t> free_slots_;
  SequenceId last_id_ = 0;
};

}  // namespace nsa::serving

#endif  // NSA_SERVING_SEQUENCE_TABLE_H_
