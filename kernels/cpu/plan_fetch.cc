// Stage 6, first half: which remote blocks to gather, and where each selected block will lie.
#include <algorithm>
#include <vector>

#include "kernels/cpu/stages.h"

namespace nsa::kernels::cpu {
namespace {

// A mark in `locations` for a remote block that is wanted and has no slot yet.
constexpr int32_t kWanted = -2;

// Segments in the order of their rows, which is the order that queries are taken in.
std::vector<Segment> SegmentsByRow(const Queries& queries) {
  std::vector<Segment> segments(queries.segments, queries.segments + queries.num_segments);
  std::sort(segments.begin(), segments.end(),
            [](const Segment& a, const Segment& b) { return a.row < b.row; });
  return segments;
}

class FetchPlanner {
 public:
  explicit FetchPlanner(const PlanFetchParams& params)
      : params_(params), owners_(params.owners), heads_(params.queries.kv_heads) {}

  void Plan() {
    std::fill_n(params_.locations + heads_.begin * owners_.num_blocks,
                heads_.size() * owners_.num_blocks, -1);
    int64_t query = params_.query_begin;
    int64_t num_remote_picks = 0;
    bool full = false;
    for (const Segment& segment : SegmentsByRow(params_.queries)) {
      const int64_t first_block = params_.queries.documents[segment.document].slc_block_begin;
      const int64_t end = segment.row + segment.num_tokens;
      for (; !full && query >= segment.row && query < end; ++query) {
        full = !Take(query, first_block, num_remote_picks);
        if (full) break;
      }
    }
    AssignSlots();
    *params_.query_end = query;
    *params_.num_slots = static_cast<int32_t>(num_wanted_);
    if (params_.num_remote_picks != nullptr) *params_.num_remote_picks = num_remote_picks;
  }

 private:
  // Marks the blocks of a query; false, with nothing marked, when they need more than the capacity.
  bool Take(int64_t query, int64_t first_block, int64_t& num_remote_picks) {
    int64_t num_new = 0;
    int64_t num_remote = 0;
    ForEachPick(query, first_block, [&](int32_t, int64_t block, int32_t& location) {
      if (owners_.rank[block] == owners_.this_rank) return;
      ++num_remote;
      num_new += location == -1;
    });
    if (num_wanted_ + num_new > params_.capacity) return false;
    num_wanted_ += num_new;
    num_remote_picks += num_remote;
    ForEachPick(query, first_block, [&](int32_t head, int64_t block, int32_t& location) {
      location = owners_.rank[block] == owners_.this_rank
                     ? static_cast<int32_t>(RecordIndex(head, block))
                     : kWanted;
    });
    return true;
  }

  template <class Visit>
  void ForEachPick(int64_t query, int64_t first_block, const Visit& visit) {
    const int32_t n = params_.dims.num_selected_blocks;
    for (int32_t head = heads_.begin; head < heads_.end; ++head) {
      const int32_t* const picks =
          params_.block_indices + (query * params_.dims.num_kv_heads + head) * n;
      for (int32_t i = 0; i < n && picks[i] >= 0; ++i) {
        const int64_t block = first_block + picks[i];
        visit(head, block, params_.locations[head * owners_.num_blocks + block]);
      }
    }
  }

  // Slots in the order of (kv head, block): neighbours in a peer's window stay neighbours here.
  void AssignSlots() {
    const int32_t num_own_records =
        static_cast<int32_t>(params_.dims.num_kv_heads * owners_.blocks_of_rank[owners_.this_rank]);
    if (params_.slots_of_rank != nullptr) {
      std::fill_n(params_.slots_of_rank, owners_.num_ranks, 0);
    }
    int32_t slot = 0;
    for (int32_t head = heads_.begin; head < heads_.end; ++head) {
      for (int64_t block = 0; block < owners_.num_blocks; ++block) {
        int32_t& location = params_.locations[head * owners_.num_blocks + block];
        if (location != kWanted) continue;
        params_.peers[slot] = owners_.rank[block];
        if (params_.slots_of_rank != nullptr) ++params_.slots_of_rank[owners_.rank[block]];
        params_.offsets[slot] = RecordIndex(head, block) * params_.record_bytes;
        location = num_own_records + slot++;
      }
    }
  }

  // Place of a record in its owner's window, [Hkv,blocks of that rank].
  int64_t RecordIndex(int32_t head, int64_t block) const {
    return head * owners_.blocks_of_rank[owners_.rank[block]] + owners_.ordinal[block];
  }

  const PlanFetchParams& params_;
  const BlockOwners& owners_;
  const HeadRange heads_;
  int64_t num_wanted_ = 0;
};

}  // namespace

void PlanFetch(const PlanFetchParams& params) { FetchPlanner(params).Plan(); }

}  // namespace nsa::kernels::cpu
