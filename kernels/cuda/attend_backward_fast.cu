// The backward of the window and of the compressed branch on Hopper's tensor cores.
//
// Queries are cut into chunks, later ones first. An item is (chunk, kv head, tile of 128 keys); a
// persistent CTA takes one after another. It owns dK and dV of its keys as far as the chunk's
// queries contribute, in registers, and walks the chunk's tiles of 64 rows, row q * G + h being
// head h of the group and query q of 64 / G in a row. Two consumer warpgroups own 64 keys each:
//
//   S^T = K Q^T, dP^T = V dO^T;  dV += (g P)^T dO, dK += dS^T Q with P and dS from registers;
//   dQ = dS K, dS by way of shared memory, each warpgroup half of the dimensions.
//
// dQ of a row tile is added to global memory by the copy engine, one key tile after another in
// ascending order: each waits for its turn, and the first one overwrites what is not to be added
// to. Row tiles are walked from the last one on: a window's
// later keys then come to a row after earlier ones as a matter of course. dK and dV of a chunk are
// added after those of the chunk before it in the order of items. All that an item waits for
// belongs to items taken earlier, so that there is always one that waits for nothing.
//
// Shared memory: K and V of the item; 2 stages of Q, dO and the rows' statistics; dS^T; dQ, twice
// where there is room. Matrices are panels of 64 columns with the 128-byte swizzle (wgmma.cuh).
//
// Pipeline: one warp loads Q and dO by the copy engine, another brings the statistics, both a stage
// ahead; a warp for each dQ buffer sends it. While one warpgroup takes exponentials, the other
// multiplies.
#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/attend_backward.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_values.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kTileKeys = 128;  // two m64, so that Q and dO are read once for both
constexpr int kTileRows = 64;   // dK, dV, S and dP of 64 x 64 a warpgroup fill the registers
constexpr int kConsumerWarps = 8;
constexpr int kConsumerThreads = kConsumerWarps * 32;
constexpr int kThreads = kConsumerThreads + 128;
constexpr int kConsumerRegisters = 240;
constexpr int kProducerRegisters = 24;
constexpr int kStages = 2;
constexpr int kRowPanelBytes = kTileRows * 128;
constexpr int kKeyPanelBytes = kTileKeys * 128;
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

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Grows with the numbers and max_keys.
WorkLists CarveLists(const AttentionDims& dims, int64_t num_tokens, int32_t num_segments,
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

// Grid: one warp. Cuts the queries into chunks.
__global__ void __launch_bounds__(32)
    ListChunksKernel(const __grid_constant__ AttendBackwardArgs args,
                     const __grid_constant__ WorkLists lists) {
  const int32_t lane = threadIdx.x;
  // Including this lane's; `total` becomes the sum of all lanes.
  const auto sum_before = [&](int32_t value, int32_t& total) {
    int32_t sum = value;
    for (int32_t delta = 1; delta < 32; delta *= 2) {
      const int32_t other = __shfl_up_sync(kFullWarp, sum, delta);
      if (lane >= delta) sum += other;
    }
    total = __shfl_sync(kFullWarp, sum, 31);
    return sum - value;
  };
  int32_t num_chunks = 0;
  for (int32_t first = 0; first < args.queries.num_segments; first += 32) {
    const int32_t index = args.queries.num_segments - 1 - first - lane;
    Segment segment{};
    if (index >= 0) segment = args.queries.segments[index];
    const int32_t count =
        static_cast<int32_t>((segment.num_tokens + lists.chunk_queries - 1) / lists.chunk_queries);
    int32_t total;
    Chunk* const chunks = lists.chunks + num_chunks + sum_before(count, total);
    for (int32_t i = 0; i < count; ++i) {
      const int64_t begin = int64_t{count - 1 - i} * lists.chunk_queries;
      Chunk chunk;
      chunk.row = segment.row + begin;
      chunk.position = segment.position + begin;
      chunk.num_queries = static_cast<int32_t>(
          min(segment.num_tokens - begin, static_cast<int64_t>(lists.chunk_queries)));
      chunk.document = segment.document;
      chunk.first_tile = static_cast<int32_t>(KeysOf(args.rule, chunk.position).begin / kTileKeys);
      const int64_t end = KeysOf(args.rule, chunk.position + chunk.num_queries - 1).end;
      chunk.num_tiles =
          end == 0 ? 0 : static_cast<int32_t>((end + kTileKeys - 1) / kTileKeys) - chunk.first_tile;
      chunks[i] = chunk;
    }
    num_chunks += total;
  }
  __syncwarp();
  int32_t num_items = 0, num_row_tiles = 0;
  for (int32_t first = 0; first < num_chunks; first += 32) {
    const int32_t index = first + lane;
    int32_t items = 0, row_tiles = 0;
    if (index < num_chunks) {
      items = lists.chunks[index].num_tiles * args.queries.kv_heads.size();
      row_tiles = (lists.chunks[index].num_queries + lists.tile_queries - 1) / lists.tile_queries;
    }
    int32_t all_items, all_row_tiles;
    const int32_t item_begin = num_items + sum_before(items, all_items);
    const int32_t row_tile_begin = num_row_tiles + sum_before(row_tiles, all_row_tiles);
    if (index < num_chunks) {
      lists.chunks[index].item_begin = item_begin;
      lists.chunks[index].row_tile_begin = row_tile_begin;
    }
    num_items += all_items;
    num_row_tiles += all_row_tiles;
  }
  if (lane == 0) *lists.counts = {0, num_chunks, num_items, num_row_tiles};
}

// Grid: any. The rows of a kv head's dk and dv that segments cover become zero; CTA i owns every
// gridDim-th token, beginning with i.
__global__ void __launch_bounds__(128)
    ZeroKeysKernel(const __grid_constant__ AttendBackwardArgs args) {
  const HeadRange heads = args.queries.kv_heads;
  const auto zero = [&](const TokenRows& rows, const GradientRows& gradients, int32_t head_dim) {
    if (gradients.adds) return;
    int64_t token = blockIdx.x;
    for (int32_t s = 0; s < rows.num_segments; ++s) {
      const Segment segment = rows.segments[s];
      float* const base = segment.is_halo != 0 ? gradients.halo : gradients.own;
      for (; token < segment.num_tokens; token += gridDim.x) {
        float* const row = base + (segment.row + token) * gradients.row_stride;
        for (int32_t i = threadIdx.x * 4; i < heads.size() * head_dim; i += 128 * 4) {
          const int64_t head = heads.begin + i / head_dim;
          *reinterpret_cast<float4*>(row + head * gradients.head_stride + i % head_dim) =
              make_float4(0, 0, 0, 0);
        }
      }
      token -= segment.num_tokens;
    }
  };
  zero(args.k, args.dk, args.dims.head_dim_qk);
  zero(args.v, args.dv, args.dims.head_dim_v);
}

// Whether whoever comes first to the dQ of the row tile from `first_query` of a chunk on overwrites
// it: someone comes, since a query sees a key, and all rows of the tile are the chunk's.
__device__ bool IsOverwritten(const VisibleRule& rule, int64_t chunk_position,
                              int32_t chunk_queries, int32_t tile_queries, int32_t first_query) {
  const int32_t end = first_query + tile_queries;
  return end <= chunk_queries && KeysOf(rule, chunk_position + end - 1).end > 0;
}

// Grid: a CTA for each chunk, or fewer. The rows of dq that nobody overwrites become zero.
__global__ void __launch_bounds__(128)
    ZeroQueriesKernel(const __grid_constant__ AttendBackwardArgs args,
                      const __grid_constant__ WorkLists lists) {
  const int64_t row_values =
      int64_t{args.queries.kv_heads.size()} * GroupSize(args.dims) * args.dims.head_dim_qk;
  for (int32_t c = blockIdx.x; c < lists.counts->num_chunks; c += gridDim.x) {
    const Chunk chunk = lists.chunks[c];
    for (int32_t first = 0; first < chunk.num_queries; first += lists.tile_queries) {
      if (IsOverwritten(args.rule, chunk.position, chunk.num_queries, lists.tile_queries, first)) {
        continue;
      }
      float4* const to =
          reinterpret_cast<float4*>(args.queries_gradients.dq + (chunk.row + first) * row_values);
      const int64_t count = min(lists.tile_queries, chunk.num_queries - first) * row_values / 4;
      for (int64_t i = threadIdx.x; i < count; i += 128) to[i] = make_float4(0, 0, 0, 0);
    }
  }
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

template <int kDk, int kDv>
struct Shape {
  static constexpr int kDqBuffers = kDk <= 128 ? 2 : 1;
  static constexpr int kQBytes = kTileRows * kDk * 2;
  static constexpr int kStageBytes = kTileRows * (kDk + kDv) * 2;  // Q, dO
  static constexpr int kDqBytes = kTileRows * kDk * 4;
  static constexpr int kStatisticsBytes = 5 * kTileRows * 4;  // of a stage, see below
  static constexpr int kValues = kTileKeys * kDk * 2;
  static constexpr int kRows = kValues + kTileKeys * kDv * 2;
  static constexpr int kDs = kRows + kStages * kStageBytes;
  static constexpr int kDq = kDs + kTileKeys * kTileRows * 2;
  static constexpr int kStatistics = kDq + kDqBuffers * kDqBytes;
  static constexpr int kItem = kStatistics + kStages * kStatisticsBytes;
  static constexpr int kBarriers = kItem + 2 * 128;
  static constexpr int kBytes = kBarriers + (2 * kStages + 2 * kDqBuffers + 1) * 8;
};
static_assert(sizeof(Item) <= 128);  // two, this one and the next

// What is known of a stage's rows, of two neighbours side by side. [32][4]: lse_log2 of both, gate
// of both. [32][2]: mean_dp. [32][4]: the first key of the tile that each sees, the one behind the
// last.
constexpr int kMeans = kTileRows / 2 * 16;
constexpr int kBounds = kMeans + kTileRows / 2 * 8;

// Shared addresses.
template <class Shape>
struct Shared {
  uint32_t base;
  __device__ uint32_t Keys() const { return base; }
  __device__ uint32_t Values() const { return base + Shape::kValues; }
  __device__ uint32_t Q(int stage) const {
    return base + Shape::kRows + stage * Shape::kStageBytes;
  }
  __device__ uint32_t OutputGradient(int stage) const { return Q(stage) + Shape::kQBytes; }
  __device__ uint32_t Ds() const { return base + Shape::kDs; }
  __device__ uint32_t Dq(int buffer) const { return base + Shape::kDq + buffer * Shape::kDqBytes; }
  __device__ uint32_t Statistics(int stage) const {
    return base + Shape::kStatistics + stage * Shape::kStatisticsBytes;
  }
  // Barriers.
  __device__ uint32_t RowsFull(int stage) const { return base + Shape::kBarriers + stage * 8; }
  __device__ uint32_t RowsEmpty(int stage) const { return RowsFull(kStages + stage); }
  __device__ uint32_t DqFull(int buffer) const { return RowsFull(2 * kStages + buffer); }
  __device__ uint32_t DqEmpty(int buffer) const { return DqFull(Shape::kDqBuffers + buffer); }
  __device__ uint32_t DsRead() const { return DqFull(2 * Shape::kDqBuffers); }
};

// Place of the n-th use of a ring of kCount slots; parity of its round.
template <int kCount>
struct Turn {
  uint32_t n = 0;
  __device__ int slot() const { return n % kCount; }
  __device__ uint32_t parity() const { return n / kCount % 2; }
};

struct TensorMaps {
  CUtensorMap q, d_o, dq;
};

__device__ __forceinline__ uint32_t Uniform(uint32_t value) {
  return __shfl_sync(kFullWarp, value, 0);
}

__device__ __forceinline__ void StoreShared(uint32_t address, float2 value) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y)
               : "memory");
}

__device__ __forceinline__ float4 LoadShared4(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address));
  return value;
}

__device__ __forceinline__ float2 LoadShared2(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address));
  return value;
}

// Barriers of the block's sixteen; the roles meet at them in different places of the code.
constexpr int kConsumerBarrier = 1, kItemBarrier = 2;

// Among the consumers.
__device__ __forceinline__ void SyncConsumers() { SyncThreads(kConsumerBarrier, kConsumerThreads); }

// Where in a panel chunk `chunk` of 16 bytes of a row lies.
__device__ __forceinline__ uint32_t InPanel(int row, int chunk) {
  return row * 128 + ((chunk ^ row % 8) << 4);
}

// The next item. All lanes of a warp.
__device__ Item TakeItem(const AttendBackwardArgs& args, const WorkLists& lists) {
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

// The lane that brings q and dO.
template <int kDk, int kDv>
class Loader {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Loader(const AttendBackwardArgs& args, const TensorMaps& maps, int32_t tile_queries,
                    const Shared<Sizes>& shared)
      : maps_(maps),
        tile_queries_(tile_queries),
        group_size_(GroupSize(args.dims)),
        shared_(shared) {}

  __device__ void Run(const Item& item) {
    if (threadIdx.x % 32 == 0) {
      for (int32_t i = item.end - 1; i >= item.begin; --i) Load(item, i * tile_queries_);
    }
    __syncwarp();
  }

 private:
  __device__ void Load(const Item& item, int32_t first_query) {
    const int stage = turn_.slot();
    const uint32_t full = shared_.RowsFull(stage);
    const int32_t row = static_cast<int32_t>(item.row) + first_query;
    const int32_t head = item.kv_head * group_size_;
    BarrierWait(shared_.RowsEmpty(stage), turn_.parity() ^ 1);
    BarrierArriveExpectBytes(full, tile_queries_ * group_size_ * (kDk + kDv) * 2);
#pragma unroll
    for (int panel = 0; panel < kDk / 64; ++panel) {
      TensorCopy(shared_.Q(stage) + panel * kRowPanelBytes, &maps_.q, panel * 64, head, row, full);
    }
#pragma unroll
    for (int panel = 0; panel < kDv / 64; ++panel) {
      TensorCopy(shared_.OutputGradient(stage) + panel * kRowPanelBytes, &maps_.d_o, panel * 64,
                 head, row, full);
    }
    ++turn_.n;
  }

  const TensorMaps& maps_;
  const int32_t tile_queries_, group_size_;
  const Shared<Sizes> shared_;
  Turn<kStages> turn_;
};

// The warp that tells what is known of the rows; a lane has two neighbours of them.
template <class Shape>
class Teller {
 public:
  __device__ Teller(const AttendBackwardArgs& args, int32_t tile_queries,
                    const Shared<Shape>& shared)
      : args_(args), tile_queries_(tile_queries), shared_(shared) {
    const int32_t group_size = GroupSize(args.dims);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t row = threadIdx.x % 32 * 2 + e;
      query_[e] = row < tile_queries * group_size ? row / group_size : kNone;
      head_[e] = row % group_size;
    }
  }

  __device__ void Run(const Item& item) {
    // Of positions since the first query of the document that sees a key of the tile.
    const int64_t since =
        item.position - QueriesOf(args_.rule, int64_t{item.tile} * kTileKeys, 0).begin;
    const int64_t first_row =
        item.row * args_.dims.num_q_heads + item.kv_head * GroupSize(args_.dims);
    for (int32_t i = item.end - 1; i >= item.begin; --i) {
      Known known[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        known[e] = {};
        const int32_t query = i * tile_queries_ + query_[e];
        if (query_[e] == kNone || query >= item.num_queries) continue;
        const int64_t index = first_row + int64_t{query} * args_.dims.num_q_heads + head_[e];
        known[e].statistics = LoadStatistics(args_.outputs, index);
        const int64_t position = min(since + query, int64_t{1} << 30);
        if (position < 0) continue;
        const int32_t end = static_cast<int32_t>(position) / args_.rule.stride + 1;
        known[e].begin = min(max(end - args_.rule.window, 0), kTileKeys);
        known[e].end = min(end, kTileKeys);
      }
      // What is above is on its way before the stage is free.
      const int stage = turn_.slot();
      BarrierWait(shared_.RowsEmpty(stage), turn_.parity() ^ 1);
      const uint32_t to = shared_.Statistics(stage) + threadIdx.x % 32 * 16;
      StoreShared(to, make_float2(known[0].statistics.lse_log2, known[1].statistics.lse_log2));
      StoreShared(to + 8, make_float2(known[0].statistics.gate, known[1].statistics.gate));
      StoreShared(shared_.Statistics(stage) + kMeans + threadIdx.x % 32 * 8,
                  make_float2(known[0].statistics.mean_dp, known[1].statistics.mean_dp));
      StoreShared(to + kBounds,
                  make_float2(__int_as_float(known[0].begin), __int_as_float(known[1].begin)));
      StoreShared(to + kBounds + 8,
                  make_float2(__int_as_float(known[0].end), __int_as_float(known[1].end)));
      __syncwarp();
      if (threadIdx.x % 32 == 0) BarrierArrive(shared_.RowsFull(stage));
      ++turn_.n;
    }
  }

 private:
  static constexpr int32_t kNone = -1;

  struct Known {
    RowStatistics statistics;
    int32_t begin, end;  // of the keys that it sees, in the tile
  };

  const AttendBackwardArgs& args_;
  const int32_t tile_queries_;
  const Shared<Shape> shared_;
  int32_t query_[2], head_[2];
  Turn<kStages> turn_;
};

// The lane that sends every kDqBuffers-th dQ, those of one buffer.
template <int kDk, int kDv>
class Sender {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Sender(const AttendBackwardArgs& args, const TensorMaps& maps, const WorkLists& lists,
                    const Shared<Sizes>& shared, int buffer)
      : args_(args), maps_(maps), lists_(lists), shared_(shared), buffer_(buffer) {}

  __device__ void Run(const Item& item) {
    if (threadIdx.x % 32 == 0) {
      for (int32_t i = item.end - 1; i >= item.begin; --i, ++turn_.n) {
        if (turn_.slot() == buffer_) Send(item, i);
      }
    }
    __syncwarp();
  }

 private:
  __device__ void Send(const Item& item, int32_t row_tile) {
    const int32_t first_query = row_tile * lists_.tile_queries;
    const int32_t turn =
        item.tile -
        static_cast<int32_t>(KeysOf(args_.rule, item.position + first_query).begin / kTileKeys);
    int32_t* const turns = lists_.query_turns + item.turns + row_tile;
    BarrierWait(shared_.DqFull(buffer_), turn_.parity());
    while (LoadAcquire(turns) != turn) {
    }
    FenceProxyAsyncAll();
    const int32_t head = (item.kv_head - args_.queries.kv_heads.begin) * GroupSize(args_.dims);
    const int32_t row = static_cast<int32_t>(item.row) + first_query;
    const bool overwrites = !args_.queries_gradients.adds && turn == 0 &&
                            IsOverwritten(args_.rule, item.position, item.num_queries,
                                          lists_.tile_queries, first_query);
#pragma unroll
    for (int box = 0; box < kDk / 32; ++box) {
      const uint32_t from = shared_.Dq(buffer_) + box * kRowPanelBytes;
      if (overwrites) {
        TensorStore(&maps_.dq, box * 32, head, row, from);
      } else {
        TensorAdd(&maps_.dq, box * 32, head, row, from);
      }
    }
    BulkCommit();
    BulkWaitRead();
    BarrierArrive(shared_.DqEmpty(buffer_));
    BulkWait();
    FenceProxyAsyncAll();
    StoreRelease(turns, turn + 1);
  }

  const AttendBackwardArgs& args_;
  const TensorMaps& maps_;
  const WorkLists& lists_;
  const Shared<Sizes> shared_;
  const int buffer_;
  Turn<Sizes::kDqBuffers> turn_;
};

// d [64,kDim] += a * b, the four k of b 16 rows apart.
template <class T, int kDim>
__device__ __forceinline__ void AddProducts(float (&d)[kDim / 2], const uint32_t (&a)[16],
                                            uint32_t b) {
  constexpr int kWide = kDim == 192 ? 128 : kDim;
  const uint64_t rows = WgmmaValuesDescriptor(b, kRowPanelBytes);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    WgmmaValues<T>(*reinterpret_cast<float(*)[kWide / 2]>(&d), a[4 * k], a[4 * k + 1], a[4 * k + 2],
                   a[4 * k + 3], rows + k * (16 * 128 >> 4));
    if constexpr (kDim > kWide) {
      WgmmaValues<T>(*reinterpret_cast<float(*)[(kDim - kWide) / 2]>(&d[kWide / 2]), a[4 * k],
                     a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                     rows + (kWide / 64 * kRowPanelBytes >> 4) + k * (16 * 128 >> 4));
    }
  }
}

// 64 keys of a warpgroup; lane 4g + c of warp w works on keys 16w + g and 16w + g + 8, and of each
// eight columns, which are rows of q, on 2c and 2c + 1.
template <class T, int kDk, int kDv>
class Consumer {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Consumer(const AttendBackwardArgs& args, const WorkLists& lists,
                      const Shared<Sizes>& shared)
      : args_(args),
        lists_(lists),
        shared_(shared),
        scale_log2_(args.dims.softmax_scale * 1.4426950408889634f) {}

  __device__ void Run(const Item& item) {
    LoadKeys(item);
#pragma unroll
    for (float& value : dk_) value = 0.0f;
#pragma unroll
    for (float& value : dv_) value = 0.0f;
    // Nothing is in flight between the steps.
    for (int32_t i = item.end - 1; i >= item.begin; --i) {
      if (i >= item.begin_whole && i < item.end_whole) {
        Step<false>();
      } else {
        Step<true>();
      }
    }
    AddKeys(item);
  }

 private:
  __device__ static int Lane() { return threadIdx.x % 32; }
  __device__ static int Warpgroup() { return threadIdx.x / 128; }
  // Of the tile, the first of the lane's two keys.
  __device__ static int KeyRow() { return threadIdx.x / 32 * 16 + Lane() / 4; }

  __device__ void LoadKeys(const Item& item) {
    LoadRows<kDk>(args_.k, item, shared_.Keys());
    LoadRows<kDv>(args_.v, item, shared_.Values());
    CopyAsyncCommit();
    CopyAsyncWait<0>();
    FenceProxyAsync();
    SyncConsumers();
  }

  // Two threads a row; zeros where there is no key.
  template <int kDim>
  __device__ void LoadRows(const TokenRows& tokens, const Item& item, uint32_t to) {
    const int row = threadIdx.x / 2;
    const TokenRun run =
        FindTokens(tokens, 2, item.document, int64_t{item.tile} * kTileKeys + row, item.kv_head);
    const bool exists = run.rows != nullptr;
    const char* const from = exists ? run.rows : static_cast<const char*>(args_.queries.q.data);
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int chunk = 2 * i + static_cast<int>(threadIdx.x % 2);
        CopyAsync16(to + panel * kKeyPanelBytes + InPanel(row, chunk),
                    exists ? from + panel * 128 + chunk * 16 : from, exists);
      }
    }
  }

  // s = K q^T, dp = V dO^T, of 64 keys and 64 rows.
  template <int kDim>
  __device__ static void StartProducts(float (&d)[32], uint32_t keys, uint32_t rows) {
    const uint64_t a = WgmmaDescriptor(keys), b = WgmmaDescriptor(rows);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      WgmmaShared<T>(d, a + (k / 4 * kKeyPanelBytes + k % 4 * 32) / 16,
                     b + (k / 4 * kRowPanelBytes + k % 4 * 32) / 16, k > 0);
    }
    WgmmaCommit();
  }

  template <bool kMasked>
  __device__ void Step() {
    const int stage = turn_.slot();
    const uint32_t q = Uniform(shared_.Q(stage));
    const uint32_t d_o = Uniform(shared_.OutputGradient(stage));
    const uint32_t of_warpgroup = Uniform(Warpgroup() * 64 * 128);
    const uint32_t statistics = shared_.Statistics(stage);
    BarrierWait(shared_.RowsFull(stage), turn_.parity());

    float s[32], dp[32];
    WgmmaFence();
    StartProducts<kDk>(s, shared_.Keys() + of_warpgroup, q);
    StartProducts<kDv>(dp, shared_.Values() + of_warpgroup, d_o);
    WgmmaWait<1>();
    WgmmaTouch(s);

    uint32_t p[16], ds[16];
    uint32_t all_ones = ~0u;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 row = LoadShared4(statistics + j * 64 + Lane() % 4 * 16);
      float4 bounds;
      if constexpr (kMasked) {
        bounds = LoadShared4(statistics + kBounds + j * 64 + Lane() % 4 * 16);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& p0 = s[4 * j + 2 * r];
        float& p1 = s[4 * j + 2 * r + 1];
        p0 = GatedProbability(p0, scale_log2_, row.x, row.z);
        p1 = GatedProbability(p1, scale_log2_, row.y, row.w);
        if constexpr (kMasked) {
          const int key = KeyRow() + 8 * r;
          if (key < __float_as_int(bounds.x) || key >= __float_as_int(bounds.z)) p0 = 0.0f;
          if (key < __float_as_int(bounds.y) || key >= __float_as_int(bounds.w)) p1 = 0.0f;
        }
        p[2 * j + r] = Pack2<T>(p0, p1);
        all_ones &= p[2 * j + r];
      }
    }
    // A condition that always holds, since no NaN is packed as ones alone: the assembler keeps
    // barriers and waits in order, and so does not move the exponentials behind the wait.
    if (Lane() == 0 && all_ones != ~0u) BarrierArrive(shared_.RowsEmpty(stage));
    WgmmaWait<0>();
    WgmmaTouch(dp);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 mean = LoadShared2(statistics + kMeans + j * 32 + Lane() % 4 * 8);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * j + 2 * r;
        ds[2 * j + r] = Pack2<T>(LogitGradient(s[i], dp[i], mean.x),
                                 LogitGradient(s[i + 1], dp[i + 1], mean.y));
      }
    }
    // Both warpgroups have multiplied with the dS before.
    BarrierWait(shared_.DsRead(), ds_parity_ ^ 1);
    ds_parity_ ^= 1;
    StoreDs(ds);
    FenceProxyAsync();
    SyncConsumers();

    WgmmaFence();
    AddProducts<T, kDv>(dv_, p, d_o);
    WgmmaCommit();
    float dq[32], half_dq[16];  // one of them, or both
    StartDq(dq, half_dq);
    WgmmaCommit();
    AddProducts<T, kDk>(dk_, ds, q);
    WgmmaCommit();
    WgmmaWait<1>();
    if constexpr (kWholePanels > 0) WgmmaTouch(dq);
    if constexpr (kHalfPanel) WgmmaTouch(half_dq);
    if (Lane() == 0) BarrierArrive(shared_.DsRead());
    StoreDq(dq, half_dq);
    WgmmaWait<0>();
    WgmmaTouch(dk_);
    WgmmaTouch(dv_);
    if (Lane() == 0) BarrierArrive(shared_.RowsEmpty(stage));
    ++turn_.n;
  }

  // dS^T of this warpgroup's keys becomes its panel of dS [64 rows][128 keys].
  __device__ void StoreDs(const uint32_t (&ds)[16]) {
    const int lane = Lane(), warp = threadIdx.x / 32 % 4;
    const uint32_t to = shared_.Ds() + Warpgroup() * kRowPanelBytes +
                        InPanel(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      StoreMatricesTransposed(to + j * 8 * 128, ds[2 * j], ds[2 * j + 1], ds[2 * j + 2],
                              ds[2 * j + 3]);
    }
  }

  // Of the panels of Dk, each warpgroup has whole ones and half of an odd one.
  static constexpr int kWholePanels = kDk / 128;
  static constexpr bool kHalfPanel = kDk / 64 % 2 != 0;

  // The warpgroup's dimensions of dS K.
  __device__ void StartDq(float (&dq)[32], float (&half_dq)[16]) {
    const uint64_t ds = WgmmaDescriptor(Uniform(shared_.Ds()));
    const uint32_t warpgroup = Uniform(Warpgroup());
    const auto multiply = [&](auto& d, uint32_t first) {
      const uint64_t keys = WgmmaValuesDescriptor(shared_.Keys() + first, kKeyPanelBytes);
#pragma unroll
      for (int k = 0; k < kTileKeys / 16; ++k) {
        WgmmaSharedValues<T>(d, ds + (k / 4 * kRowPanelBytes + k % 4 * 32) / 16,
                             keys + k * (16 * 128 >> 4), k > 0);
      }
    };
    if constexpr (kWholePanels > 0) multiply(dq, warpgroup * kKeyPanelBytes);
    if constexpr (kHalfPanel) multiply(half_dq, (kDk / 64 - 1) * kKeyPanelBytes + warpgroup * 64);
  }

  __device__ void StoreDq(const float (&dq)[32], const float (&half_dq)[16]) {
    const int buffer = dq_turn_.slot();
    BarrierWait(shared_.DqEmpty(buffer), dq_turn_.parity() ^ 1);
    const uint32_t to = shared_.Dq(buffer);
    if constexpr (kWholePanels > 0) StoreDims(dq, to + 2 * Warpgroup() * kRowPanelBytes);
    if constexpr (kHalfPanel) {
      StoreDims(half_dq, to + (2 * (kDk / 64 - 1) + Warpgroup()) * kRowPanelBytes);
    }
    FenceProxyAsync();
    __syncwarp();
    if (Lane() == 0) BarrierArrive(shared_.DqFull(buffer));
    ++dq_turn_.n;
  }

  // Dimensions from that of box `to` on; a box has 32. Lanes of odd rows take the columns in
  // another order, so that a warp meets no bank twice. Zeros are positive, as sums that begin at
  // zero are: rows have the same bits whether overwritten or added.
  template <int kCount>
  __device__ void StoreDims(const float (&dq)[kCount], uint32_t to) {
    const float scale = args_.dims.softmax_scale;
    const int c = Lane() % 4, row = threadIdx.x / 32 % 4 * 16 + Lane() / 4;
    const bool is_odd = row % 2 != 0;
    const uint32_t lane = to + c % 2 * 8;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int even = 4 * j + 2 * r, odd = 4 * (j ^ 2) + 2 * r;
        const int chunk = (j % 4 * 2 + c / 2) ^ (is_odd ? 4 : 0);
        StoreShared(lane + j / 4 * kRowPanelBytes + InPanel(row + 8 * r, chunk),
                    make_float2(__fmaf_rn(scale, is_odd ? dq[odd] : dq[even], 0.0f),
                                __fmaf_rn(scale, is_odd ? dq[odd + 1] : dq[even + 1], 0.0f)));
      }
    }
  }

  // Adds dK and dV to what earlier items have made of them.
  __device__ void AddKeys(const Item& item) {
    if (item.begin < item.end) {
      if (item.before >= 0) {
        while (LoadAcquire(lists_.keys_done + item.before) == 0) {
        }
      }
      AddRows<kDk>(args_.k, args_.dk, item, args_.dims.softmax_scale, dk_);
      AddRows<kDv>(args_.v, args_.dv, item, 1.0f, dv_);
    }
    __threadfence();
    SyncConsumers();
    if (threadIdx.x == 0) StoreRelease(lists_.keys_done + item.index, 1);
  }

  template <int kDim>
  __device__ void AddRows(const TokenRows& tokens, const GradientRows& gradients, const Item& item,
                          float scale, const float (&sums)[kDim / 2]) {
    const int64_t key = int64_t{item.tile} * kTileKeys + KeyRow();
    TokenPlace place = FindPlace(tokens, item.document, key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r == 1) {
        if (place.row >= 0 && place.num_tokens > 8) {
          place.row += 8;
        } else {
          place = FindPlace(tokens, item.document, key + 8);
        }
      }
      if (place.row < 0) continue;
      float* const row = (place.is_halo ? gradients.halo : gradients.own) +
                         place.row * gradients.row_stride + item.kv_head * gradients.head_stride +
                         Lane() % 4 * 2;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        // Not by way of the L1, which does not see what other SMs write.
        float2* const to = reinterpret_cast<float2*>(row + 8 * j);
        float2 value = __ldcg(to);
        value.x = __fmaf_rn(scale, sums[4 * j + 2 * r], value.x);
        value.y = __fmaf_rn(scale, sums[4 * j + 2 * r + 1], value.y);
        __stcg(to, value);
      }
    }
  }

  const AttendBackwardArgs& args_;
  const WorkLists& lists_;
  const Shared<Sizes> shared_;
  const float scale_log2_;
  Turn<kStages> turn_;
  Turn<Sizes::kDqBuffers> dq_turn_;
  uint32_t ds_parity_ = 0;
  float dk_[kDk / 2], dv_[kDv / 2];
};

// Grid: one CTA per SM, which takes one item after another.
template <class T, int kDk, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
    AttendBackwardKernel(const __grid_constant__ AttendBackwardArgs args,
                         const __grid_constant__ WorkLists lists,
                         const __grid_constant__ TensorMaps maps) {
  using Sizes = Shape<kDk, kDv>;
  extern __shared__ __align__(1024) char memory[];
  const Shared<Sizes> shared{Uniform(SharedAddress(memory))};
  Item* const items = reinterpret_cast<Item*>(memory + Sizes::kItem);
  // Rows that no box covers take part in sums, times zero.
  if (lists.tile_queries * GroupSize(args.dims) != kTileRows) {
    for (int i = threadIdx.x * 16; i < kStages * Sizes::kStageBytes; i += kThreads * 16) {
      *reinterpret_cast<uint4*>(memory + Sizes::kRows + i) = make_uint4(0, 0, 0, 0);
    }
    FenceProxyAsync();
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(shared.RowsFull(i), 2);                    // the copy's and the statistics'
      BarrierInit(shared.RowsEmpty(i), 2 * kConsumerWarps);  // once amid a step
    }
    for (int i = 0; i < Sizes::kDqBuffers; ++i) {
      BarrierInit(shared.DqFull(i), kConsumerWarps);
      BarrierInit(shared.DqEmpty(i), 1);
    }
    BarrierInit(shared.DsRead(), kConsumerWarps);
    BarrierInitFence();
  }
  const int warp = threadIdx.x / 32;
  const auto take = [&](Item& item) {
    const Item next = TakeItem(args, lists);
    if (threadIdx.x % 32 == 0) item = next;
  };
  const auto for_each_item = [&](auto& role) {
    for (int n = 0;; ++n) {
      SyncThreads(kItemBarrier, kThreads);  // the item before is done with, this one is known
      const Item& item = items[n % 2];
      if (item.kv_head < 0) break;
      role.Run(item);
      // While the consumers are still at work.
      if (warp == kConsumerWarps) take(items[(n + 1) % 2]);
    }
  };
  if (warp < kConsumerWarps) {
    RaiseRegisters<kConsumerRegisters>();
    Consumer<T, kDk, kDv> consumer(args, lists, shared);
    for_each_item(consumer);
  } else {
    LowerRegisters<kProducerRegisters>();
    if (warp == kConsumerWarps) {
      take(items[0]);
      Loader<kDk, kDv> loader(args, maps, lists.tile_queries, shared);
      for_each_item(loader);
    } else if (warp == kConsumerWarps + 1) {
      Teller<Sizes> teller(args, lists.tile_queries, shared);
      for_each_item(teller);
    } else {
      Sender<kDk, kDv> sender(args, maps, lists, shared, warp - kConsumerWarps - 2);
      for_each_item(sender);
    }
  }
}

cudaError_t MakeTensorMaps(const AttendBackwardArgs& args, int32_t tile_queries, TensorMaps* maps) {
  const EncodeTensorMap encode = FindEncodeTensorMap();
  if (encode == nullptr) return cudaErrorNotSupported;
  const AttentionDims& dims = args.dims;
  const int32_t group_size = GroupSize(dims);
  const auto make = [&](DType dtype, const ConstTensor3& tensor, int32_t num_heads,
                        int32_t head_dim, CUtensorMap* map) {
    return MakeTensorMap(encode,
                         {dtype, tensor.data, args.queries.num_tokens, num_heads, head_dim,
                          tensor.row_stride, tensor.head_stride, group_size, tile_queries},
                         map);
  };
  const int32_t num_heads = args.queries.kv_heads.size() * group_size;
  const ConstTensor3 dq = {args.queries_gradients.dq, int64_t{num_heads} * dims.head_dim_qk,
                           dims.head_dim_qk};
  const bool made =
      make(dims.dtype, args.queries.q, dims.num_q_heads, dims.head_dim_qk, &maps->q) &&
      make(dims.dtype, args.outputs.d_o, dims.num_q_heads, dims.head_dim_v, &maps->d_o) &&
      make(DType::kF32, dq, num_heads, dims.head_dim_qk, &maps->dq);
  return made ? cudaSuccess : cudaErrorInvalidValue;
}

template <class T, int kDk, int kDv>
cudaError_t LaunchShape(const AttendBackwardArgs& args, const WorkLists& lists,
                        const TensorMaps& maps, const Device& device, cudaStream_t stream) {
  constexpr int kBytes = Shape<kDk, kDv>::kBytes;
  const auto kernel = AttendBackwardKernel<T, kDk, kDv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<device.num_sms, kThreads, kBytes, stream>>>(args, lists, maps);
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const AttendBackwardArgs& args, const WorkLists& lists, const TensorMaps& maps,
                   const Device& device, cudaStream_t stream) {
  switch (args.dims.head_dim_qk) {
    case 64:
      return LaunchShape<T, 64, 64>(args, lists, maps, device, stream);
    case 128:
      return LaunchShape<T, 128, 128>(args, lists, maps, device, stream);
    default:
      return LaunchShape<T, 192, 128>(args, lists, maps, device, stream);
  }
}

}  // namespace

size_t AttendBackwardScratchBytes(const AttentionDims& dims, int64_t num_tokens,
                                  int32_t num_segments, int32_t num_kv_heads,
                                  const ChunkLimits& limits) {
  return CarveLists(dims, num_tokens, num_segments, num_kv_heads, limits, nullptr).num_bytes;
}

cudaError_t LaunchAttendBackwardFast(const AttendBackwardArgs& args, const ChunkLimits& limits,
                                     void* scratch, const Device& device, cudaStream_t stream) {
  const Queries& queries = args.queries;
  const WorkLists lists = CarveLists(args.dims, queries.num_tokens, queries.num_segments,
                                     queries.kv_heads.size(), limits, scratch);
  cudaError_t error = cudaSuccess;
  if (!args.dk.adds || !args.dv.adds) {
    const auto zero = ZeroKeysKernel;
    zero<<<8 * device.num_sms, 128, 0, stream>>>(args);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  if (queries.num_tokens == 0) return cudaSuccess;
  TensorMaps maps;
  error = MakeTensorMaps(args, lists.tile_queries, &maps);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(scratch, 0, lists.zeroed_bytes, stream);
  if (error != cudaSuccess) return error;
  const auto list = ListChunksKernel;
  list<<<1, 32, 0, stream>>>(args, lists);
  if (!args.queries_gradients.adds) {
    const auto zero = ZeroQueriesKernel;
    zero<<<8 * device.num_sms, 128, 0, stream>>>(args, lists);
  }
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return args.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(args, lists, maps, device, stream)
                                         : Launch<__half>(args, lists, maps, device, stream);
}

}  // namespace nsa::kernels::cuda
