#include "nsa/serving/sequence_table.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/decode_params.h"
#include "nsa/passes/context.h"

namespace nsa::serving {
SequenceTable::SequenceTable(const SequenceTableOptions& options)
    : options_(options),
      pages_(options.pages_of_rank),
      summaries_(std::vector<int64_t>{options.num_summary_pages}) {
  for (int32_t slot = options.max_sequences; slot-- > 0;) free_slots_.push_back(slot);
}

absl::StatusOr<SequenceId> SequenceTable::Open() {
  if (free_slots_.empty()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("sequences: 1 asked, 0 of max_sequences = ", options_.max_sequences, " free"));
  }
  Sequence& sequence = sequences_[++last_id_];
  sequence.slot = free_slots_.back();
  free_slots_.pop_back();
  sequence.lists.resize(options_.num_lists + 1);
  return last_id_;
}

absl::StatusOr<const SequenceTable::Sequence*> SequenceTable::Find(SequenceId id) const {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) {
    return absl::NotFoundError(
        absl::StrCat("sequence = ", id, ": must be open on rank ", options_.home));
  }
  return &found->second;
}

int64_t SequenceTable::NumUnits(int list, int64_t num_tokens) const {
  return list < options_.num_lists ? num_tokens : NumCompressionBlocks(options_.config, num_tokens);
}

int64_t SequenceTable::UnitsOfPage(int list) const {
  return list < options_.num_lists ? options_.config.select_block_tokens
                                   : kernels::kSummaryPageBlocks;
}

std::pair<int64_t, int64_t> SequenceTable::Written(int list, const Sequence& sequence,
                                                   int64_t num_new, bool only_kept) const {
  const int64_t num_tokens = sequence.num_tokens + num_new;
  int64_t begin = NumUnits(list, sequence.num_tokens);
  const int64_t end = NumUnits(list, num_tokens);
  if (begin == end) return {0, 0};
  if (only_kept && list > 0 && list < options_.num_lists) {
    begin = std::max(begin, FirstKeptToken(num_tokens));
  }
  return {begin / UnitsOfPage(list), CeilDiv(end, UnitsOfPage(list))};
}

SequenceTable::Need SequenceTable::NeedOf(const Sequence& sequence, int64_t num_new,
                                          bool only_kept) const {
  Need need;
  for (int list = 0; list <= options_.num_lists; ++list) {
    const auto [first, end] = Written(list, sequence, num_new, only_kept);
    const std::vector<PageId>& pages = sequence.lists[list];
    int64_t count = end - first;
    // The first one may be there already, partly filled.
    if (count > 0 && first < static_cast<int64_t>(pages.size()) &&
        !PoolOf(list).is_shared(pages[first])) {
      --count;
    }
    // Of what is kept for a while only, no more is taken at a time.
    if (list > 0 && list < options_.num_lists) count = std::min(count, MaxKeptPages());
    (list < options_.num_lists ? need.pages : need.summary_pages) += count;
  }
  return need;
}

int64_t SequenceTable::NumFree() const {
  if (options_.only_at_home) return pages_.num_free(options_.home);
  int64_t free = 0;
  for (int rank = 0; rank < pages_.num_ranks(); ++rank) free += pages_.num_free(rank);
  return free;
}

absl::Status SequenceTable::CheckNeed(const Need& need) const {
  if (need.pages > NumFree()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("pages: ", need.pages, " asked, ", NumFree(), " free of the ",
                     options_.only_at_home ? pages_.num_pages(options_.home) : pages_.num_pages(),
                     " of home ", options_.home));
  }
  if (need.summary_pages > summaries_.num_free(0)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("summary pages: ", need.summary_pages, " asked, ", summaries_.num_free(0),
                     " free of the ", summaries_.num_pages(), " of home ", options_.home));
  }
  return absl::OkStatus();
}

absl::Status SequenceTable::CheckNeedOnRanks(const Need& need,
                                             absl::Span<const int32_t> block_ranks) const {
  if (!options_.only_at_home) return CheckNeed(need);
  std::vector<int64_t> asked(pages_.num_ranks());
  for (int32_t rank : block_ranks) ++asked[rank];
  asked[options_.home] += need.pages - static_cast<int64_t>(block_ranks.size());
  for (int rank = 0; rank < pages_.num_ranks(); ++rank) {
    if (asked[rank] <= pages_.num_free(rank)) continue;
    return absl::ResourceExhaustedError(
        absl::StrCat("pages: ", asked[rank], " asked of rank ", rank, ", ", pages_.num_free(rank),
                     " free of the ", pages_.num_pages(rank), " of home ", options_.home));
  }
  return CheckNeed({.pages = 0, .summary_pages = need.summary_pages});
}

absl::Status SequenceTable::CheckAlive(const Sequence& sequence) const {
  for (int rank = 0; rank < pages_.num_ranks(); ++rank) {
    if (!pages_.is_lost(rank)) continue;
    for (int list = 0; list < options_.num_lists; ++list) {
      for (PageId page : sequence.lists[list]) {
        if (page != kNoPage && pages_.RankOf(page) == rank) {
          return absl::UnavailableError(
              absl::StrCat("the sequence has pages on rank ", rank, ", which was lost"));
        }
      }
    }
  }
  return absl::OkStatus();
}

absl::Status SequenceTable::CheckRoom(const Sequence& sequence, int64_t num_new) const {
  if (num_new < 1 || num_new > options_.max_tokens - sequence.num_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("new tokens = ", num_new, ": a sequence of ", sequence.num_tokens,
                     " takes 1 or more, up to max_tokens = ", options_.max_tokens));
  }
  return CheckAlive(sequence);
}

absl::Status SequenceTable::Check(SequenceId id, int64_t num_new) const {
  const absl::StatusOr<const Sequence*> sequence = Find(id);
  if (!sequence.ok()) return sequence.status();
  NSA_RETURN_IF_ERROR(CheckRoom(**sequence, num_new));
  return CheckNeed(NeedOf(**sequence, num_new, /*only_kept=*/false));
}

PageId SequenceTable::TakePage(int list, int32_t preferred_rank) {
  PagePool& pool = PoolOf(list);
  if (list == options_.num_lists) return pool.Take(0);
  PageId page = pool.Take(preferred_rank);
  if (page != kNoPage || options_.only_at_home) return page;
  int best = 0;
  for (int rank = 1; rank < pool.num_ranks(); ++rank) {
    if (pool.num_free(rank) > pool.num_free(best)) best = rank;
  }
  return pool.Take(best);
}

void SequenceTable::Write(Sequence& sequence, int64_t num_new, bool only_kept,
                          absl::Span<const int32_t> block_ranks, std::vector<PageChange>& changes) {
  for (int list = 0; list <= options_.num_lists; ++list) {
    const auto [first, end] = Written(list, sequence, num_new, only_kept);
    std::vector<PageId>& pages = sequence.lists[list];
    if (static_cast<int64_t>(pages.size()) < first) pages.resize(first, kNoPage);
    for (int64_t index = first; index < end; ++index) {
      const bool is_there = index < static_cast<int64_t>(pages.size());
      const PageId before = is_there ? pages[index] : kNoPage;
      if (is_there && !PoolOf(list).is_shared(before)) continue;
      const bool has_rank = list == 0 && index < static_cast<int64_t>(block_ranks.size());
      const PageId after = TakePage(list, has_rank ? block_ranks[index] : options_.home);
      if (is_there) {
        PoolOf(list).Release(before);
        pages[index] = after;
      } else {
        pages.push_back(after);
      }
      changes.push_back({list, sequence.slot, index, before, after});
    }
  }
  sequence.num_tokens += num_new;
}

int64_t SequenceTable::Reach() const {
  return std::max(options_.config.window_tokens, options_.config.compress_block_tokens);
}

int64_t SequenceTable::FirstKeptToken(int64_t num_tokens) const {
  const int64_t block = options_.config.select_block_tokens;
  return std::max<int64_t>(num_tokens - options_.max_rollback_tokens - Reach(), 0) / block * block;
}

int64_t SequenceTable::MaxKeptPages() const {
  return CeilDiv(options_.max_rollback_tokens + Reach() + kMaxExtendTokens,
                 options_.config.select_block_tokens) +
         1;
}

void SequenceTable::DropOld(Sequence& sequence) {
  const int64_t end = FirstKeptToken(sequence.num_tokens) / options_.config.select_block_tokens;
  for (int list = 1; list < options_.num_lists; ++list) {
    std::vector<PageId>& pages = sequence.lists[list];
    for (int64_t i = end; i-- > 0 && pages[i] != kNoPage;) {
      pages_.Release(pages[i]);
      pages[i] = kNoPage;
    }
  }
}

absl::StatusOr<std::vector<PageChange>> SequenceTable::Extend(
    absl::Span<const StepSequence> batch) {
  Need total;
  for (size_t i = 0; i < batch.size(); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (batch[i].sequence != batch[j].sequence) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("batch[", i, "].sequence = ", batch[i].sequence, ": is batch[", j, "]'s"));
    }
    NSA_RETURN_IF_ERROR(Check(batch[i].sequence, batch[i].num_new));
    const Need need =
        NeedOf(sequences_.at(batch[i].sequence), batch[i].num_new, /*only_kept=*/false);
    total.pages += need.pages;
    total.summary_pages += need.summary_pages;
  }
  NSA_RETURN_IF_ERROR(CheckNeed(total));
  std::vector<PageChange> changes;
  for (const StepSequence& step : batch) {
    Write(sequences_.at(step.sequence), step.num_new, /*only_kept=*/false, {}, changes);
  }
  // Not before all have theirs: what is dropped is still read by this very step.
  for (const StepSequence& step : batch) DropOld(sequences_.at(step.sequence));
  return changes;
}

absl::StatusOr<std::vector<PageChange>> SequenceTable::ExtendOnRanks(
    SequenceId id, int64_t num_tokens, absl::Span<const int32_t> block_ranks) {
  const absl::StatusOr<const Sequence*> found = Find(id);
  if (!found.ok()) return found.status();
  Sequence& sequence = sequences_.at(id);
  NSA_RETURN_IF_ERROR(CheckRoom(sequence, num_tokens));
  const Need need = NeedOf(sequence, num_tokens, /*only_kept=*/true);
  NSA_RETURN_IF_ERROR(CheckNeedOnRanks(need, block_ranks));
  if (sequence.num_tokens > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("sequence = ", id, ": has ", sequence.num_tokens, " tokens, must be empty"));
  }
  std::vector<PageChange> changes;
  Write(sequence, num_tokens, /*only_kept=*/true, block_ranks, changes);
  return changes;
}

absl::Status SequenceTable::Truncate(SequenceId id, int64_t num_tokens) {
  const absl::StatusOr<const Sequence*> found = Find(id);
  if (!found.ok()) return found.status();
  Sequence& sequence = sequences_.at(id);
  if (num_tokens < 0 || num_tokens > sequence.num_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_tokens = ", num_tokens, ": must lie in [0, ", sequence.num_tokens, "]"));
  }
  const int64_t block = options_.config.select_block_tokens;
  const int64_t first_needed = std::max<int64_t>(num_tokens + 1 - Reach(), 0) / block;
  bool is_kept = true;
  for (int list = 1; list < options_.num_lists && first_needed * block < num_tokens; ++list) {
    is_kept &= sequence.lists[list][first_needed] != kNoPage;
  }
  // A page that is written to must be at home.
  if (options_.only_at_home && num_tokens % block != 0) {
    is_kept &= pages_.RankOf(sequence.lists[0][num_tokens / block]) == options_.home;
  }
  if (!is_kept) {
    return absl::FailedPreconditionError(
        absl::StrCat("num_tokens = ", num_tokens, ": of ", sequence.num_tokens,
                     " tokens only the last max_rollback_tokens = ", options_.max_rollback_tokens,
                     " can be taken back here"));
  }
  for (int list = 0; list <= options_.num_lists; ++list) {
    std::vector<PageId>& pages = sequence.lists[list];
    const size_t end = CeilDiv(NumUnits(list, num_tokens), UnitsOfPage(list));
    for (; pages.size() > end; pages.pop_back()) {
      if (pages.back() != kNoPage) PoolOf(list).Release(pages.back());
    }
  }
  sequence.num_tokens = num_tokens;
  return absl::OkStatus();
}

absl::StatusOr<SequenceId> SequenceTable::Fork(SequenceId id, std::vector<PageChange>* changes) {
  const absl::StatusOr<const Sequence*> found = Find(id);
  if (!found.ok()) return found.status();
  NSA_RETURN_IF_ERROR(CheckAlive(**found));
  const absl::StatusOr<SequenceId> forked = Open();
  if (!forked.ok()) return forked.status();
  Sequence& sequence = sequences_.at(*forked);
  sequence.num_tokens = (*found)->num_tokens;
  sequence.lists = (*found)->lists;
  for (int list = 0; list <= options_.num_lists; ++list) {
    for (size_t i = 0; i < sequence.lists[list].size(); ++i) {
      const PageId page = sequence.lists[list][i];
      if (page == kNoPage) continue;
      PoolOf(list).Share(page);
      changes->push_back({list, sequence.slot, static_cast<int64_t>(i), kNoPage, page});
    }
  }
  return *forked;
}

absl::Status SequenceTable::Close(SequenceId id) {
  const absl::StatusOr<const Sequence*> found = Find(id);
  if (!found.ok()) return found.status();
  for (int list = 0; list <= options_.num_lists; ++list) {
    for (PageId page : (*found)->lists[list]) {
      if (page != kNoPage) PoolOf(list).Release(page);
    }
  }
  free_slots_.push_back((*found)->slot);
  sequences_.erase(id);
  return absl::OkStatus();
}

void SequenceTable::Lose(int rank) { pages_.Lose(rank); }

}  // namespace nsa::serving
