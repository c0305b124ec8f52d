// The backward of the selected branch.
//
// Items of keys are tiles of the records; which queries selected a block is inverted once, into
// lists in the order of the queries.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/branch_backward.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/selected_picks.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

// A query that selected a block.
struct BlockPick {
  int32_t row;
  int32_t num_keys;  // of the block that it sees
};

// The queries of each block of each head.
struct BlockPicks {
  BlockPicks(const AttentionDims& dims, int64_t num_heads, int64_t num_queries, int64_t num_blocks,
             void* memory)
      : begins_stride(num_blocks + 2), picks_stride(num_queries * dims.num_selected_blocks) {
    Carver carver(static_cast<char*>(memory));
    begins = carver.Take<int64_t>(num_heads * begins_stride);
    picks = carver.Take<BlockPick>(num_heads * picks_stride);
    num_bytes = carver.num_bytes();
  }

  int64_t begins_stride;
  int64_t picks_stride;
  int64_t* begins;   // [heads,B+2] block b has picks [begins[b], begins[b + 1])
  BlockPick* picks;  // [heads,queries*n]
  int64_t num_bytes;
};

// Fills the lists of one head, the `head`th of the call.
void InvertPicks(const AttendSelectedBackwardParams& params, int32_t head,
                 const BlockPicks& lists) {
  const AttentionDims& dims = params.dims;
  int64_t* const begins = lists.begins + head * lists.begins_stride;
  BlockPick* const picks = lists.picks + head * lists.picks_stride;
  const auto for_each_pick = [&](const auto& visit) {
    for (int32_t i = 0; i < params.queries.num_segments; ++i) {
      const Segment& segment = params.queries.segments[i];
      const int64_t first_block = params.queries.documents[segment.document].slc_block_begin;
      const int64_t end = std::min(params.query_end, segment.row + segment.num_tokens);
      for (int64_t row = std::max(params.query_begin, segment.row); row < end; ++row) {
        const int32_t* const indices =
            params.block_indices +
            (row * dims.num_kv_heads + params.queries.kv_heads.begin + head) *
                dims.num_selected_blocks;
        const int64_t position = segment.position + (row - segment.row);
        for (int32_t j = 0; j < dims.num_selected_blocks && indices[j] >= 0; ++j) {
          const int64_t past_first =
              position - static_cast<int64_t>(indices[j]) * dims.select_block_tokens;
          visit(first_block + indices[j],
                BlockPick{.row = static_cast<int32_t>(row),
                          .num_keys = static_cast<int32_t>(
                              std::min<int64_t>(dims.select_block_tokens, past_first + 1))});
        }
      }
    }
  };
  // begins[b + 1] is where block b's next pick goes: in the end, where those of b + 1 begin.
  std::fill_n(begins, lists.begins_stride, 0);
  for_each_pick([&](int64_t block, const BlockPick&) { ++begins[block + 2]; });
  for (int64_t b = 2; b < lists.begins_stride; ++b) begins[b] += begins[b - 1];
  for_each_pick([&](int64_t block, const BlockPick& pick) { picks[begins[block + 1]++] = pick; });
}

// Keys [first_key, first_key + kTileKeys) of a record, or those that are left.
struct RecordTile {
  int32_t kv_head;
  int32_t location;
  int64_t block;  // global
  int32_t first_key;
};

class Item {
 public:
  Item(const AttendSelectedBackwardParams& params, int32_t kv_head, const BranchScratch& scratch)
      : params_(params),
        dims_(params.dims),
        group_size_(dims_.group_size()),
        kv_head_(kv_head),
        s_(scratch),
        branch_(params.dims, params.queries, params.outputs, kv_head, scratch) {}

  void RunQueries(const QueryRun& run, Pick* picks) {
    branch_.StartQueries(run);
    const Pick* const end = CollectPicks(dims_, params_.block_indices, run, kv_head_, picks);
    WalkPicks(
        dims_, run, picks, end, s_.visible,
        [&](int32_t block, int32_t first_key) {
          LoadRecord(LocationOf(params_, run.document, block, kv_head_), first_key);
          branch_.MakeKeyPanels();
        },
        [&](int64_t row_begin, int64_t num_rows) { branch_.AddToQueries(row_begin, num_rows); });
    branch_.StoreQueries(run, params_.queries_gradients);
  }

  void RunKeys(const RecordTile& tile, const BlockPicks& lists) {
    const int32_t width = LoadRecord(tile.location, tile.first_key);
    branch_.StartKeys();
    const int64_t head = kv_head_ - params_.queries.kv_heads.begin;
    const int64_t* const begins = lists.begins + head * lists.begins_stride + tile.block;
    const BlockPick* const picks = lists.picks + head * lists.picks_stride;
    int64_t num_queries = 0;
    for (int64_t i = begins[0]; i < begins[1]; ++i) {
      const int32_t seen = std::min(width, picks[i].num_keys - tile.first_key);
      if (seen <= 0) continue;
      branch_.LoadQueries({.row = picks[i].row, .num_queries = 1}, num_queries);
      std::fill_n(s_.visible + num_queries * group_size_, group_size_,
                  VisibleKeys{.begin = 0, .end = seen});
      if (++num_queries == QueriesPerSum(dims_)) {
        branch_.AddToKeys(num_queries * group_size_);
        num_queries = 0;
      }
    }
    branch_.AddToKeys(num_queries * group_size_);
    Store(tile, width);
  }

 private:
  // Returns how many keys.
  int32_t LoadRecord(int64_t location, int32_t first_key) {
    const int64_t element_bytes = SizeOf(dims_.dtype);
    const int64_t block_tokens = dims_.select_block_tokens;
    const int32_t width = std::min(kTileKeys, dims_.select_block_tokens - first_key);
    const char* const record = RecordAt(params_, location, RecordBytes(dims_));
    branch_.LoadKeyColumns(record + first_key * element_bytes, block_tokens, width);
    const char* const values = record + block_tokens * dims_.head_dim_qk * element_bytes;
    for (int32_t i = 0; i < width; ++i) {
      s_.tokens[i] =
          values + (first_key + i) * static_cast<int64_t>(dims_.head_dim_v) * element_bytes;
    }
    branch_.LoadValues(s_.tokens, width);
    return width;
  }

  // Own records are zero or to be added to.
  void Store(const RecordTile& tile, int32_t width) {
    const int64_t dk = dims_.head_dim_qk, dv = dims_.head_dim_v;
    const int64_t block_tokens = dims_.select_block_tokens;
    const bool is_own = tile.location < params_.num_own_records;
    float* const record = is_own
                              ? params_.own_gradients + tile.location * (dk + dv) * block_tokens
                              : params_.slot_gradients + (tile.location - params_.num_own_records) *
                                                             (dk + dv) * block_tokens;
    const auto store = [&](const float* sums, int64_t count, float* dst) {
      if (is_own) {
        AddScaled(sums, count, 1.0f, dst);
      } else {
        std::copy_n(sums, count, dst);
      }
    };
    store(s_.dk, width * dk, record + tile.first_key * dk);
    store(s_.dv, width * dv, record + block_tokens * dk + tile.first_key * dv);
  }

  const AttendSelectedBackwardParams& params_;
  const AttentionDims& dims_;
  const int64_t group_size_;
  const int32_t kv_head_;
  const BranchScratch& s_;
  BranchItem branch_;
};

// Those that `locations` names for the call's heads. The first blocks, which most queries select,
// come first.
std::vector<RecordTile> FindRecordTiles(const AttendSelectedBackwardParams& params) {
  std::vector<RecordTile> tiles;
  const HeadRange& heads = params.queries.kv_heads;
  for (int64_t block = 0; block < params.num_blocks; ++block) {
    for (int32_t head = heads.begin; head < heads.end; ++head) {
      const int32_t location = params.locations[head * params.num_blocks + block];
      if (location < 0) continue;
      for (int32_t key = 0; key < params.dims.select_block_tokens; key += kTileKeys) {
        tiles.push_back({head, location, block, key});
      }
    }
  }
  return tiles;
}

}  // namespace

int64_t SelectedBackwardScratchBytes(const AttentionDims& dims, const BackwardLimits& limits) {
  return BlockPicks(dims, limits.num_kv_heads, limits.num_tokens, limits.num_slc_blocks, nullptr)
      .num_bytes;
}

absl::Status AttendSelectedBackward(const AttendSelectedBackwardParams& params, Workers& workers) {
  const AttentionDims& dims = params.dims;
  const HeadRange& heads = params.queries.kv_heads;
  const int64_t num_queries = params.query_end - params.query_begin;
  const BlockPicks lists(dims, heads.size(), num_queries, params.num_blocks, params.scratch);
  const absl::Status status = workers.Run(heads.size(), 0, [&](int64_t head, char*) {
    InvertPicks(params, static_cast<int32_t>(head), lists);
    if (params.adds_to_own) return;
    const int64_t head_values = params.num_own_records / dims.num_kv_heads *
                                static_cast<int64_t>(dims.head_dim_qk + dims.head_dim_v) *
                                dims.select_block_tokens;
    std::fill_n(params.own_gradients + (heads.begin + head) * head_values, head_values, 0.0f);
  });
  if (!status.ok()) return status;

  const int64_t queries_per_run =
      QueriesPerRun(params.queries, dims, num_queries, kBackwardRows, workers.num_threads());
  const std::vector<QueryRun> runs =
      SplitQueries(params.queries, params.query_begin, params.query_end, queries_per_run);
  const std::vector<RecordTile> tiles = FindRecordTiles(params);
  const int64_t num_runs = static_cast<int64_t>(runs.size());
  const int64_t num_tiles = static_cast<int64_t>(tiles.size());
  const int64_t branch_bytes = BranchScratch(dims, queries_per_run, nullptr).num_bytes;
  const int64_t picks_bytes =
      queries_per_run * dims.num_selected_blocks * static_cast<int64_t>(sizeof(Pick));
  return workers.Run(num_tiles + num_runs * heads.size(), branch_bytes + picks_bytes,
                     [&](int64_t item, char* memory) {
                       const BranchScratch scratch(dims, queries_per_run, memory);
                       if (item < num_tiles) {
                         Item(params, tiles[item].kv_head, scratch).RunKeys(tiles[item], lists);
                         return;
                       }
                       // One kv head after another, as in the forward.
                       item -= num_tiles;
                       Item(params, heads.begin + static_cast<int32_t>(item / num_runs), scratch)
                           .RunQueries(runs[item % num_runs],
                                       reinterpret_cast<Pick*>(memory + branch_bytes));
                     });
}

}  // namespace nsa::kernels::cpu
