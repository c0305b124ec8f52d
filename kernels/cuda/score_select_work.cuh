// What the attending and the ranking kernel have in common: persistent CTAs of one producer warp
// and several consumer warpgroups. The producer takes groups of queries from a counter, tells
// consumers about them one ahead, and keeps a ring of tiles full; consumers fetch their own rows of
// q.
#ifndef KERNELS_CUDA_SCORE_SELECT_WORK_CUH_
#define KERNELS_CUDA_SCORE_SELECT_WORK_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/ring.cuh"
#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_tiles.cuh"

namespace nsa::kernels::cuda {

// How a call's queries are cut into items, one for each (kv head, group of queries).
struct WorkList {
  const Segment* segments;
  const Document* documents;
  const int32_t* group_begin;  // [num_segments + 1]
  int32_t* next_item;          // scalar
  int32_t num_segments;
  HeadRange kv_heads;
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
  if (num_groups == 0 || item / num_groups >= list.kv_heads.size()) return work;
  work.kv_head = list.kv_heads.begin + item / num_groups;
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

// A value that is the same in all lanes, such that the compiler knows it: what is computed from it
// then takes the scalar unit, which is where wgmma wants its descriptors. All lanes of a warp.
__device__ __forceinline__ int32_t Uniform(int32_t value) {
  return __shfl_sync(kFullWarp, value, 0);
}

// This warp in its block.
__device__ __forceinline__ int32_t UniformWarp() {
  return Uniform(static_cast<int32_t>(threadIdx.x / 32));
}

__device__ __forceinline__ void StoreShared(uint32_t address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

// Barriers of a ring: full when a slot can be read, empty when it can be written.
template <int kSlots>
class RingBarriers {
 public:
  static constexpr int kBytes = 2 * kSlots * 8;

  // `address` of kBytes of shared memory.
  __device__ __forceinline__ explicit RingBarriers(uint32_t address) : address_(address) {}

  // One thread of the block.
  __device__ void Init(uint32_t num_writers, uint32_t num_readers) const {
    for (int i = 0; i < kSlots; ++i) {
      BarrierInit(Full(i), num_writers);
      BarrierInit(Empty(i), num_readers);
    }
  }
  __device__ __forceinline__ uint32_t Full(int32_t slot) const { return address_ + 8 * slot; }
  __device__ __forceinline__ uint32_t Empty(int32_t slot) const {
    return address_ + 8 * (kSlots + slot);
  }
  // Reader: waits until the slot is full. Writer: until it has been read; the first round is free.
  __device__ __forceinline__ void WaitFull(const RingPlace<kSlots>& place) const {
    BarrierWait(Full(place.slot), place.parity);
  }
  __device__ __forceinline__ void WaitEmpty(const RingPlace<kSlots>& place) const {
    BarrierWait(Empty(place.slot), place.parity ^ 1);
  }
  // Starts to fill a slot that is empty; one thread.
  __device__ __forceinline__ void Fill(const RingPlace<kSlots>& place, uint32_t to,
                                       const char* from, uint32_t num_bytes) const {
    BarrierArriveExpectBytes(Full(place.slot), num_bytes);
    BulkCopy(to, from, num_bytes, Full(place.slot));
  }

 private:
  uint32_t address_;
};

// Consumers may still be on one item while the producer fills tiles of the next one and has told of
// the one after.
constexpr int kWorkSlots = 4;

// In shared memory.
struct WorkSlots {
  Work work[kWorkSlots];
  uint64_t barriers[RingBarriers<kWorkSlots>::kBytes / 8];
};

// What the warps of a block are told to work on.
class WorkRing {
 public:
  using Place = RingPlace<kWorkSlots>;

  __device__ __forceinline__ explicit WorkRing(WorkSlots& slots)
      : slots_(slots), barriers_(SharedAddress(slots.barriers)) {}

  // One thread of the block; as many warps release each item.
  __device__ __forceinline__ void Init(uint32_t num_warps) const { barriers_.Init(1, num_warps); }

  // All lanes of the producer.
  __device__ __forceinline__ void Tell(Place& place, const Work& item) const {
    barriers_.WaitEmpty(place);
    if (threadIdx.x % 32 == 0) {
      slots_.work[place.slot] = item;
      BarrierArrive(barriers_.Full(place.slot));
    }
    place.Advance();
  }
  __device__ __forceinline__ void Wait(const Place& place) const { barriers_.WaitFull(place); }
  // After Wait and before Release.
  __device__ __forceinline__ const Work& At(const Place& place) const {
    return slots_.work[place.slot];
  }
  // All lanes of a warp.
  __device__ __forceinline__ void Release(const Place& place) const {
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(barriers_.Empty(place.slot));
  }

 private:
  WorkSlots& slots_;
  const RingBarriers<kWorkSlots> barriers_;
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

// Of the four warps of a warpgroup.
__device__ __forceinline__ void SyncWarpgroup(int32_t warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
}

// Returns when wgmma may read what StartQueries copied.
__device__ __forceinline__ void FinishQueries(int32_t warpgroup) {
  CopyAsyncWait<0>();
  FenceProxyAsync();
  SyncWarpgroup(warpgroup);
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_WORK_CUH_
