// The work of attend_backward_fast.cu: queries in chunks, and the items that CTAs take.
#ifndef KERNELS_CUDA_ATTEND_BACKWARD_WORK_CUH_
#define KERNELS_CUDA_ATTEND_BACKWARD_WORK_CUH_

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/attend_backward.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda::attend_backward {

constexpr int kTileKeys = 128;  // two m64, so that Q and dO are read once for both
constexpr int kTileRows = 64;   // dK, dV, S and dP of 64 x 64 a warpgroup fill the registers
// Of the rows of a chunk, in tiles: many, so that K and V are loaded and dK and dV added for many
// of them; but so few that the items are many times the SMs.
constexpr int kMinChunkTiles = 32;
constexpr int64_t kTokensPerChunkTile = 1024;  // tokens times kv heads

// A piece of a segment of queries.
struct Chunk {
  int64_t row;       // of its first query
  int64_t position;  // likewise
  int32_t num_queries;
  int32_t document;
  int32_t first_tile;  // of keys that some query sees
  int32_t num_tiles;
  int32_t item_begin;      // items of the chunks before
  int32_t row_tile_begin;  // likewise, of one kv head
};

struct WorkCounts {
  int32_t next_item;
  int32_t num_chunks;
  int32_t num_items;
  int32_t num_row_tiles;  // of a kv head
};

struct WorkLists {
  WorkCounts* counts;
  Chunk* chunks;
  int32_t* query_turns;  // [kv heads, row tiles] key tiles whose dQ has been added
  int32_t* keys_done;    // [items] whether dK and dV have been added
  int32_t chunk_queries;
  int32_t tile_queries;
  size_t zeroed_bytes;  // of counts and what follows it, up to and with keys_done
  size_t num_bytes;
};

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grows with the numbers and max_keys.
inline WorkLists CarveLists(const AttentionDims& dims, int64_t num_tokens, int32_t num_segments,
                            int32_t num_kv_heads, const ChunkLimits& limits, void* base) {
  WorkLists lists{};
  const int64_t work = num_tokens * num_kv_heads;
  const int64_t chunk_tiles = CeilDiv(work, kTokensPerChunkTile);
  lists.tile_queries = kTileRows / GroupSize(dims);
  lists.chunk_queries =
      lists.tile_queries * static_cast<int32_t>(chunk_tiles < kMinChunkTiles     ? kMinChunkTiles
                                                : chunk_tiles > limits.max_tiles ? limits.max_tiles
                                                                                 : chunk_tiles);
  // Chunks of all kv heads: `work` over that of a chunk, which is the middle one of three terms.
  const int64_t num_tiles = CeilDiv(work, lists.tile_queries);
  const int64_t in_the_middle = CeilDiv(kTokensPerChunkTile, lists.tile_queries);
  const int64_t few = CeilDiv(num_tiles, kMinChunkTiles),
                many = CeilDiv(num_tiles, limits.max_tiles);
  const int64_t max_chunks = (few < in_the_middle    ? few
                              : many > in_the_middle ? many
                                                     : in_the_middle) +
                             int64_t{num_segments} * num_kv_heads;
  const int64_t max_tiles = (limits.max_keys + lists.tile_queries * limits.max_tiles) / kTileKeys +
                            2;  // of keys, of a chunk
  const auto take = [&](size_t num_bytes) {
    char* const place = static_cast<char*>(base) + lists.num_bytes;
    lists.num_bytes += (num_bytes + 255) / 256 * 256;
    return place;
  };
  lists.counts = reinterpret_cast<WorkCounts*>(take(sizeof(WorkCounts)));
  lists.query_turns = reinterpret_cast<int32_t*>(
      take((num_tiles + int64_t{num_segments} * num_kv_heads) * sizeof(int32_t)));
  lists.keys_done = reinterpret_cast<int32_t*>(take(max_chunks * max_tiles * sizeof(int32_t)));
  lists.zeroed_bytes = lists.num_bytes;
  lists.chunks = reinterpret_cast<Chunk*>(take(max_chunks * sizeof(Chunk)));
  return lists;
}

// Whether whoever comes first to the dQ of the row tile from `first_query` of a chunk on overwrites
// it: someone comes, since a query sees a key, and all rows of the tile are the chunk's.
__device__ inline bool IsOverwritten(const VisibleRule& rule, int64_t chunk_position,
                                     int32_t chunk_queries, int32_t tile_queries,
                                     int32_t first_query) {
  const int32_t end = first_query + tile_queries;
  return end <= chunk_queries && KeysOf(rule, chunk_position + end - 1).end > 0;
}

// What a CTA works on.
struct Item {
  int64_t row;  // of the chunk's first query
  int64_t position;
  int32_t num_queries;
  int32_t document;
  int32_t kv_head;  // -1: there is no more work
  int32_t tile;     // of keys, in the document
  int32_t begin;    // row tiles [begin, end) of the chunk see some key
  int32_t end;
  int32_t begin_whole;  // all rows of row tiles [begin_whole, end_whole) see all keys
  int32_t end_whole;
  int32_t turns;   // of the chunk's first row tile, among query_turns
  int32_t index;   // among keys_done
  int32_t before;  // whose dK and dV come before; -1: none
};

// The next item. All lanes of a warp.
__device__ inline Item TakeItem(const AttendBackwardArgs& args, const WorkLists& lists) {
  const int32_t lane = threadIdx.x % 32;
  Item item{};
  item.kv_head = -1;
  if (lane == 0) item.index = atomicAdd(&lists.counts->next_item, 1);
  item.index = __shfl_sync(kFullWarp, item.index, 0);
  if (item.index >= lists.counts->num_items) return item;
  // The last chunk that begins at or before the item.
  int32_t low = 0, high = lists.counts->num_chunks;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    if (lists.chunks[middle].item_begin <= item.index) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Chunk chunk = lists.chunks[low];
  const int32_t head = (item.index - chunk.item_begin) / chunk.num_tiles;
  item.row = chunk.row;
  item.position = chunk.position;
  item.num_queries = chunk.num_queries;
  item.document = chunk.document;
  item.kv_head = args.queries.kv_heads.begin + head;
  item.tile = chunk.first_tile + (item.index - chunk.item_begin) % chunk.num_tiles;
  item.turns = head * lists.counts->num_row_tiles + chunk.row_tile_begin;
  const KeyRange positions =
      QueriesOf(args.rule, int64_t{item.tile} * kTileKeys, int64_t{item.tile + 1} * kTileKeys);
  const int64_t first = max(positions.begin - chunk.position, int64_t{0});
  const int64_t end = min(positions.end - chunk.position, int64_t{chunk.num_queries});
  item.begin = static_cast<int32_t>(first / lists.tile_queries);
  item.end = static_cast<int32_t>((end + lists.tile_queries - 1) / lists.tile_queries);
  // From the first query that sees the last key on, up to the last that sees the first one.
  const int64_t first_whole =
      QueriesOf(args.rule, int64_t{item.tile + 1} * kTileKeys - 1, 0).begin - chunk.position;
  const int64_t end_whole =
      min(QueriesOf(args.rule, 0, int64_t{item.tile} * kTileKeys + 1).end - chunk.position,
          int64_t{chunk.num_queries});
  const bool fills_tiles = lists.tile_queries * GroupSize(args.dims) == kTileRows;
  item.begin_whole = static_cast<int32_t>((max(first_whole, int64_t{0}) + lists.tile_queries - 1) /
                                          lists.tile_queries);
  item.end_whole =
      fills_tiles ? static_cast<int32_t>(max(end_whole, int64_t{0}) / lists.tile_queries) : 0;
  item.before = -1;
  for (int32_t last = low - 1; last >= 0; last -= 32) {
    int32_t index = -1;
    if (last - lane >= 0) {
      const Chunk other = lists.chunks[last - lane];
      const int32_t tile = item.tile - other.first_tile;
      if (other.document == chunk.document && tile >= 0 && tile < other.num_tiles) {
        index = other.item_begin + head * other.num_tiles + tile;
      }
    }
    const unsigned hits = __ballot_sync(kFullWarp, index >= 0);
    if (hits != 0) {
      item.before = __shfl_sync(kFullWarp, index, __ffs(hits) - 1);
      break;
    }
  }
  return item;
}

}  // namespace nsa::kernels::cuda::attend_backward

#endif  // KERNELS_CUDA_ATTEND_BACKWARD_WORK_CUH_
