// The blocks that queries selected, and where they lie: what the selected branch's forward and
// backward share.
#ifndef KERNELS_CPU_SELECTED_PICKS_H_
#define KERNELS_CPU_SELECTED_PICKS_H_

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/tile_ops.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

struct Pick {
  int32_t block;  // in the document
  int32_t query;  // in the run
};

// The picks of all queries of the run, by block and then query; returns their end. `picks` has
// room for n a query.
Pick* CollectPicks(const AttentionDims& dims, const int32_t* block_indices, const QueryRun& run,
                   int32_t kv_head, Pick* picks);

// Walks the union of the picked blocks in ascending order, so that a block which several queries
// selected is loaded once; each query still sees exactly its own blocks in its own order. Calls
// load(block, first_key) for each tile of keys of a block that a query sees, and then
// attend(row_begin, num_rows) for the rows that see it, with what row_begin + i sees in visible[i].
template <class Load, class Attend>
void WalkPicks(const AttentionDims& dims, const QueryRun& run, const Pick* picks, const Pick* end,
               VisibleKeys* visible, const Load& load, const Attend& attend) {
  const int64_t group_size = dims.group_size();
  for (const Pick* begin = picks; begin != end;) {
    const int32_t block = begin->block;
    const Pick* const block_end =
        std::find_if(begin, end, [&](const Pick& pick) { return pick.block != block; });
    for (int32_t first_key = 0; first_key < dims.select_block_tokens; first_key += kTileKeys) {
      const int64_t first_token =
          static_cast<int64_t>(block) * dims.select_block_tokens + first_key;
      const int64_t width = std::min(kTileKeys, dims.select_block_tokens - first_key);
      // Queries come in the order of their positions: those that see the tile are the last ones.
      const Pick* pick = std::find_if(begin, block_end, [&](const Pick& candidate) {
        return run.position + candidate.query >= first_token;
      });
      if (pick == block_end) break;
      load(block, first_key);
      while (pick != block_end) {
        // Queries that follow one another have their rows in one piece.
        const int64_t row_begin = pick->query * group_size;
        int64_t num_rows = 0;
        for (int32_t query = pick->query; pick != block_end && pick->query == query;
             ++pick, ++query) {
          const int64_t seen = std::min(width, run.position + query - first_token + 1);
          std::fill_n(visible + num_rows, group_size,
                      VisibleKeys{.begin = 0, .end = static_cast<int32_t>(seen)});
          num_rows += group_size;
        }
        attend(row_begin, num_rows);
      }
    }
    begin = block_end;
  }
}

// The record at `location`, an own one or a slot. Params: of AttendSelected or its backward.
template <class Params>
const char* RecordAt(const Params& params, int64_t location, int64_t record_bytes) {
  return location < params.num_own_records
             ? static_cast<const char*>(params.own_records) + location * record_bytes
             : static_cast<const char*>(params.slots) +
                   (location - params.num_own_records) * record_bytes;
}

// Where a block of `document` lies for `kv_head`: its index in `locations`.
template <class Params>
int64_t LocationOf(const Params& params, int32_t document, int32_t block, int32_t kv_head) {
  const int64_t global_block = params.queries.documents[document].slc_block_begin + block;
  return params.locations[kv_head * params.num_blocks + global_block];
}

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_SELECTED_PICKS_H_
