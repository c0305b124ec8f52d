// What the attending and the ranking kernel have in common: persistent CTAs of one producer warp
// and several consumer warpgroups. The producer takes groups of queries from a counter, tells
// consumers about them one ahead, and keeps a ring of tiles full; consumers fetch their own rows of
// q.
#ifndef KERNELS_CUDA_SCORE_SELECT_WORK_CUH_
#define KERNELS_CUDA_SCORE_SELECT_WORK_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_select_stages.h"

namespace nsa::kernels::cuda {

// How a call's queries are cut into items, one for each (kv head, group of queries).
struct WorkList {
  const Segment* segments;
  const Document* documents;
  const int32_t* group_begin;  // [num_segments + 1]
  int32_t* next_item;          // scalar
  int32_t num_segments;
  int32_t num_kv_heads;
  int32_t queries_per_group;
};

// A group of queries of one segment and one kv head.
struct Work {
  int64_t row;         // of the first query
  int64_t first_tile;  // of the document
  uint32_t position;   // of the first query in the document
  int32_t num_queries;
  int32_t kv_head;  // -1: there is no more work
  int32_t num_tiles;
  int32_t num_full_tiles;  // that the first query, and so every one, sees whole
};

// Compression blocks that the token at `position` of its document sees.
__device__ __forceinline__ int32_t NumVisible(const AttentionDims& dims, uint32_t position) {
  const uint32_t length = dims.compress_block_tokens;
  if (position + 1 < length) return 0;
  return static_cast<int32_t>((position + 1 - length) / dims.compress_stride_tokens + 1);
}

// The next item but for its tiles. Later queries first: they see more, and what is short fills the
// gaps at the end. One kv head after another, so that its tiles stay in the L2. All lanes of a
// warp.
__device__ inline Work TakeWork(const WorkList& list) {
  const int32_t lane = threadIdx.x % 32;
  int32_t item = 0;
  if (lane == 0) item = atomicAdd(list.next_item, 1);
  item = __shfl_sync(kFullWarp, item, 0);
  const int32_t num_groups = list.group_begin[list.num_segments];
  Work work{};
  work.kv_head = -1;
  if (num_groups == 0 || item / num_groups >= list.num_kv_heads) return work;
  work.kv_head = item / num_groups;
  const int32_t group = num_groups - 1 - item % num_groups;
  // The last segment that begins at or before the group, 32 probes at a time.
  int32_t low = 0, high = list.num_segments;
  while (high - low > 1) {
    const int32_t step = (high - low + 31) / 32;
    const int32_t probe = low + lane * step;
    const bool before = probe < high && list.group_begin[probe] <= group;
    low += (__popc(__ballot_sync(kFullWarp, before)) - 1) * step;
    high = low + step < high ? low + step : high;
  }
  const Segment segment = list.segments[low];
  const int64_t offset =
      static_cast<int64_t>(group - list.group_begin[low]) * list.queries_per_group;
  const int64_t left = segment.num_tokens - offset;
  work.row = segment.row + offset;
  work.first_tile = TileBegin(list.documents[segment.document].cmp_block_begin, segment.document);
  work.position = static_cast<uint32_t>(segment.position + offset);
  work.num_queries =
      static_cast<int32_t>(left < list.queries_per_group ? left : list.queries_per_group);
  return work;
}

// A place in a ring of `kSlots` slots and the parity of its current round.
template <int kSlots>
struct RingPlace {
  int32_t slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Advance() {
    if (++slot == kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Barriers of a ring: full[i] when slot i can be read, empty[i] when it can be written.
template <int kSlots>
struct RingBarriers {
  uint64_t full[kSlots];
  uint64_t empty[kSlots];

  __device__ void Init(uint32_t num_writers, uint32_t num_readers) {
    for (int i = 0; i < kSlots; ++i) {
      BarrierInit(SharedAddress(&full[i]), num_writers);
      BarrierInit(SharedAddress(&empty[i]), num_readers);
    }
  }
  // Reader: waits until the slot is full. Writer: until it has been read; the first round is free.
  __device__ __forceinline__ void WaitFull(const RingPlace<kSlots>& place) {
    BarrierWait(SharedAddress(&full[place.slot]), place.parity);
  }
  __device__ __forceinline__ void WaitEmpty(const RingPlace<kSlots>& place) {
    BarrierWait(SharedAddress(&empty[place.slot]), place.parity ^ 1);
  }
  __device__ __forceinline__ void Release(const RingPlace<kSlots>& place) {
    BarrierArrive(SharedAddress(&empty[place.slot]));
  }
  // Starts to fill a slot that is empty; one thread.
  __device__ __forceinline__ void Fill(const RingPlace<kSlots>& place, uint32_t to,
                                       const char* from, uint32_t num_bytes) {
    const uint32_t barrier = SharedAddress(&full[place.slot]);
    BarrierArriveExpectBytes(barrier, num_bytes);
    BulkCopy(to, from, num_bytes, barrier);
  }
};

// Consumers may still be on one item while the producer fills tiles of the next one and has told of
// the one after.
constexpr int kWorkSlots = 4;

struct WorkRing {
  Work work[kWorkSlots];
  RingBarriers<kWorkSlots> barriers;

  // All lanes of the producer.
  __device__ __forceinline__ void Tell(RingPlace<kWorkSlots>& place, const Work& item) {
    barriers.WaitEmpty(place);
    if (threadIdx.x % 32 == 0) {
      work[place.slot] = item;
      BarrierArrive(SharedAddress(&barriers.full[place.slot]));
    }
    place.Advance();
  }
};

// Rows of q as an operand of wgmma.
struct QueryRows {
  const char* q;
  int64_t row_bytes;
  int64_t head_bytes;
  int32_t group_size;
  int32_t rows_per_query;  // >= group_size; the rest are zero
  uint32_t query_of_row;   // row / rows_per_query is row * this >> 16
};

constexpr uint32_t QueryOfRowFactor(int32_t rows_per_query) {
  return (65536 + rows_per_query - 1) / rows_per_query;
}

// Starts to copy rows [first_row, first_row + 64) of an item to `to`, as panels [Dk/64][64][64].
// All threads of a warpgroup; rows without a query become zero.
template <int kDk>
__device__ __forceinline__ void StartQueries(const QueryRows& rows, const Work& work,
                                             int32_t first_row, uint32_t to) {
  const int32_t chunk = threadIdx.x % 8;
  const char* const from = rows.q + work.row * rows.row_bytes +
                           work.kv_head * rows.group_size * rows.head_bytes + chunk * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t row = threadIdx.x % 128 / 8 + 16 * i;
    const int32_t item_row = first_row + row;
    const int32_t query = static_cast<int32_t>(item_row * rows.query_of_row >> 16);
    const int32_t head = item_row - query * rows.rows_per_query;
    const bool present = query < work.num_queries && head < rows.group_size;
    const int64_t offset =
        (present ? query : 0) * rows.row_bytes + (present ? head : 0) * rows.head_bytes;
    const uint32_t place = to + row * 128 + ((chunk ^ row % 8) << 4);
#pragma unroll
    for (int panel = 0; panel < kDk / 64; ++panel) {
      CopyAsync16(place + panel * 8192, from + offset + panel * 128, present);
    }
  }
}

// This warp in its block, such that the compiler knows it to be the same in all lanes.
__device__ __forceinline__ int32_t UniformWarp() {
  return __shfl_sync(kFullWarp, static_cast<int32_t>(threadIdx.x / 32), 0);
}

// Of the four warps of a warpgroup.
__device__ __forceinline__ void SyncWarpgroup(int32_t warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// Returns when wgmma may read what StartQueries copied.
__device__ __forceinline__ void FinishQueries(int32_t warpgroup) {
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  FenceProxyAsync();
  SyncWarpgroup(warpgroup);
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_WORK_CUH_
