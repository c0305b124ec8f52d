// Stages 7 and 8: attention over the selected blocks, then the gate.
//
// Each query reads n records of its own. So a tile is a few neighbouring queries of one kv head,
// whose lists are merged: a record that several of them selected is loaded once. One warp, the
// scout, merges lists ahead of the others and writes the records to load, and for whom, in batches.
// One warp follows it and has the copy engine fill a ring of slots; each of eight others works on
// 16 heads of one query, and on the records that this query selected. A query meets its blocks in
// ascending order whatever its neighbours are, so the result does not depend on the tiles. Tiles
// are ordered by kv head: the records of one are in the L2 at a time.
#ifndef KERNELS_CUDA_ATTEND_SELECTED_CUH_
#define KERNELS_CUDA_ATTEND_SELECTED_CUH_

#include <climits>
#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/record_layout.h"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/warp_attention.cuh"

namespace nsa::kernels::cuda {

constexpr int kConsumerWarps = 8;
// Whole warpgroups, because registers move between warpgroups: of the last one, one warp scouts
// and one loads.
constexpr int kSelectedThreads = (kConsumerWarps + 4) * 32;
constexpr int kConsumerRegisters = 224;
constexpr int kProducerRegisters = 56;
constexpr int kMaxTileQueries = kConsumerWarps;
// Entries of each query's list that the scout holds at a time.
constexpr int kListEntries = 16;
constexpr int kNoBlock = INT_MAX;
constexpr int kBatchRecords = 16;
constexpr int kNumBatches = 4;  // that the scout may be ahead of the slowest warp
// A barrier for each record of these batches, more than there are slots. A warp that passes over
// records waits for none of them but the last of each batch: so it is never a whole round of these
// barriers ahead, and it is never one behind since it holds its batch; so their parity tells.
constexpr int kFullBarriers = kBatchRecords * kNumBatches;

// How a launch divides the work and the shared memory.
struct SelectedGeometry {
  int32_t group_size;        // heads of a query that share a kv head
  int32_t warps_per_query;   // each works on 16 heads of one kv head's group
  int32_t queries_per_tile;  // of one kv head
  int32_t parts_per_query;   // tiles that share the heads of a group too large for one
  int32_t num_row_tiles;
  int32_t num_tiles;         // kv heads of the call * num_row_tiles * parts_per_query
  int32_t chunks_per_block;  // of at most kTileKeys tokens; a slot holds one
  int32_t value_bytes;       // of a token; 0 where only keys are read
  int32_t num_slots;
  int32_t slot_bytes;
  int32_t shared_bytes;
};

// A record, or a chunk of one, to load.
struct RecordNote {
  int32_t block;     // global
  int32_t location;  // record
  uint16_t chunk;    // of the block
  uint8_t slot;
  uint8_t wanted_by;  // bit i: warp i
};

// Notes of one tile, perhaps none.
struct Batch {
  // [queries] Tokens of the tile's kv head that a query sees, if every block had l' of them; 0: no
  // such query.
  int64_t end_token[kMaxTileQueries];
  RecordNote notes[kBatchRecords];
  int32_t num_notes;
  uint32_t is_last;  // of the tile
};

struct ListEntry {
  int32_t block;     // global; kNoBlock past the end
  int32_t location;  // record
};

// Slots first, aligned for the copy engine; then batches, lists and barriers.
struct SelectedShared {
  char* slots;
  Batch* batches;    // [kNumBatches]
  ListEntry* lists;  // [kMaxTileQueries][kListEntries]
  uint32_t barriers;

  __device__ SelectedShared(char* memory, const SelectedGeometry& geometry) {
    slots = memory;
    batches = reinterpret_cast<Batch*>(slots + geometry.num_slots * geometry.slot_bytes);
    lists = reinterpret_cast<ListEntry*>(batches + kNumBatches);
    barriers = SharedAddress(lists + kMaxTileQueries * kListEntries);
  }
  // Barriers.
  __device__ uint32_t Full(uint32_t record) const { return barriers + record % kFullBarriers * 8; }
  __device__ uint32_t Written(int32_t batch) const {
    return barriers + (kFullBarriers + batch) * 8;
  }
  __device__ uint32_t Read(int32_t batch) const { return Written(kNumBatches + batch); }
  __device__ uint32_t Empty(int32_t slot) const { return Read(kNumBatches + slot); }

  static constexpr int32_t kBytesPerSlot = 8;  // of its barrier
  static constexpr int32_t kFixedBytes =
      static_cast<int32_t>(kNumBatches * sizeof(Batch) +
                           kMaxTileQueries * kListEntries * sizeof(ListEntry)) +
      (kFullBarriers + 2 * kNumBatches) * 8;
};

// Of the barrier of a record.
__device__ inline uint32_t FullParity(uint32_t record) { return record / kFullBarriers % 2; }

struct SelectedTile {
  int32_t kv_head;
  int32_t part;
  int64_t first_row;

  __device__ SelectedTile(const AttendSelectedParams& params, const SelectedGeometry& geometry,
                          int32_t index) {
    part = index % geometry.parts_per_query;
    index /= geometry.parts_per_query;
    first_row =
        params.query_begin + int64_t{index % geometry.num_row_tiles} * geometry.queries_per_tile;
    kv_head = params.queries.kv_heads.begin + index / geometry.num_row_tiles;
  }
};

// A place in a ring, and how often it has been around.
struct RingPlace {
  int32_t slot = 0;
  uint32_t parity = 0;
  __device__ void Advance(int32_t size) {
    if (++slot == size) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The merged lists of a tile's queries, for one warp. Lane i < 8 stands for query i.
class MergedLists {
 public:
  __device__ MergedLists(const AttendSelectedParams& params, const SelectedGeometry& geometry,
                         const SelectedTile& tile, ListEntry* lists)
      : params_(params),
        picks_(params.block_indices + (tile.first_row * params.dims.num_kv_heads + tile.kv_head) *
                                          params.dims.num_selected_blocks),
        locations_(params.locations + tile.kv_head * params.num_blocks),
        lists_(lists) {
    const int32_t lane = threadIdx.x % 32;
    const int32_t num_queries = static_cast<int32_t>(
        min(int64_t{geometry.queries_per_tile}, params.query_end - tile.first_row));
    for (int32_t i = 0, end; i < num_queries; i = end) {
      const QueryPlace place = FindQuery(params.queries, tile.first_row + i);
      const bool found = place.document >= 0;
      end = found ? static_cast<int32_t>(min(i + place.num_queries, int64_t{num_queries})) : i + 1;
      if (found && lane >= i && lane < end) {
        first_block_ =
            static_cast<int32_t>(params.queries.documents[place.document].slc_block_begin);
        end_token_ =
            place.position + lane - i + 1 + int64_t{first_block_} * params.dims.select_block_tokens;
      }
    }
    Refill(__ballot_sync(kFullWarp, end_token_ > 0));
  }

  // As in Batch.
  __device__ int64_t end_token() const { return end_token_; }

  // The lowest block that is left; kNoBlock: none is.
  __device__ int32_t Lowest() const { return __reduce_min_sync(kFullWarp, head_.block); }

  // Takes `block` off the lists that begin with it. Returns which these are.
  __device__ uint32_t Take(int32_t block, int32_t& location) {
    const bool mine = head_.block == block;
    const uint32_t takers = __ballot_sync(kFullWarp, mine);
    location = __shfl_sync(kFullWarp, head_.location, __ffs(takers) - 1);
    const int32_t n = params_.dims.num_selected_blocks;
    if (mine) {
      ++cursor_;
      head_ = cursor_ < n ? lists_[threadIdx.x % 32 * kListEntries + cursor_ % kListEntries]
                          : ListEntry{kNoBlock, 0};
    }
    if (n > kListEntries) {
      Refill(__ballot_sync(kFullWarp, mine && cursor_ % kListEntries == 0 && cursor_ < n));
    }
    return takers;
  }

 private:
  // Loads the next kListEntries entries of the lists in `which`, two lists at a time.
  __device__ void Refill(uint32_t which) {
    if (which == 0) return;
    __syncwarp();
    const int32_t lane = threadIdx.x % 32;
    const int32_t n = params_.dims.num_selected_blocks;
#pragma unroll 1
    for (int32_t pair = 0; pair < kMaxTileQueries; pair += 2) {
      const int32_t query = pair + lane / kListEntries;
      const int32_t first_block = __shfl_sync(kFullWarp, first_block_, query);
      const int32_t i = __shfl_sync(kFullWarp, cursor_, query) + lane % kListEntries;
      if ((which >> query & 1) == 0) continue;
      ListEntry entry{kNoBlock, 0};
      if (i < n) {
        const int32_t pick = picks_[query * params_.dims.num_kv_heads * n + i];
        if (pick >= 0) entry = {first_block + pick, locations_[first_block + pick]};
      }
      lists_[query * kListEntries + lane % kListEntries] = entry;
    }
    __syncwarp();
    if (which >> lane & 1) head_ = lists_[lane * kListEntries];
  }

  const AttendSelectedParams& params_;
  const int32_t* const picks_;      // of the first query
  const int32_t* const locations_;  // of the kv head
  ListEntry* const lists_;
  int32_t first_block_ = 0;
  int32_t cursor_ = 0;
  int64_t end_token_ = 0;
  ListEntry head_{kNoBlock, 0};
};

// Brings heads of a row to the L2.
__device__ inline void PrefetchHeads(const ConstTensor3& tensor, int64_t row, int32_t first_head,
                                     int32_t num_heads, int32_t head_dim) {
  if (tensor.head_stride != head_dim) return;
  PrefetchL2(static_cast<const uint16_t*>(tensor.data) + row * tensor.row_stride +
                 first_head * tensor.head_stride,
             num_heads * head_dim * 2);
}

// Brings to the L2 what consumers read of a tile's queries.
__device__ inline void PrefetchTile(const AttendSelectedParams& params,
                                    const SelectedGeometry& geometry, const SelectedTile& tile) {
  const AttentionDims& dims = params.dims;
  const int64_t row = tile.first_row + threadIdx.x % 32;
  if (threadIdx.x % 32 >= geometry.queries_per_tile || row >= params.query_end) return;
  const int32_t num_heads = geometry.group_size, first_head = tile.kv_head * num_heads;
  const GateParams& gate = params.gate;
  PrefetchHeads(params.queries.q, row, first_head, num_heads, dims.head_dim_qk);
  PrefetchHeads(gate.o_cmp, row, first_head, num_heads, dims.head_dim_v);
  PrefetchHeads(gate.o_win, row, first_head, num_heads, dims.head_dim_v);
  PrefetchLine(static_cast<const char*>(gate.gate) +
               (row * gate.row_stride + first_head * gate.head_stride) * SizeOf(gate.gate_dtype));
}

// The warp that writes batches. prefetch(tile) brings to the L2 what consumers read of its queries.
template <class Prefetch>
__device__ inline void ScoutSelected(const AttendSelectedParams& params,
                                     const SelectedGeometry& geometry, const SelectedShared& shared,
                                     const Prefetch& prefetch) {
  const int32_t lane = threadIdx.x % 32;
  // Of warp `lane`; there is no query 31.
  const int32_t query = lane < kConsumerWarps ? lane / geometry.warps_per_query : 31;
  RingPlace batch_place, slot_place;
  for (int32_t index = blockIdx.x; index < geometry.num_tiles; index += gridDim.x) {
    const SelectedTile tile(params, geometry, index);
    prefetch(tile);
    MergedLists lists(params, geometry, tile, shared.lists);
    int32_t block = lists.Lowest(), location = 0, chunk = 0;
    uint32_t wanted_by = 0;
    do {
      BarrierWait(shared.Read(batch_place.slot), batch_place.parity ^ 1);
      Batch& batch = shared.batches[batch_place.slot];
      int32_t num_notes = 0;
      for (; num_notes < kBatchRecords && block != kNoBlock; ++num_notes) {
        if (chunk == 0) {
          const uint32_t queries = lists.Take(block, location);
          wanted_by = __ballot_sync(kFullWarp, queries >> query & 1);
        }
        if (lane == 0) {
          batch.notes[num_notes] = {block, location, static_cast<uint16_t>(chunk),
                                    static_cast<uint8_t>(slot_place.slot),
                                    static_cast<uint8_t>(wanted_by)};
        }
        slot_place.Advance(geometry.num_slots);
        if (++chunk == geometry.chunks_per_block) {
          chunk = 0;
          block = lists.Lowest();
        }
      }
      if (lane < kMaxTileQueries) batch.end_token[lane] = lists.end_token();
      if (lane == 0) {
        batch.num_notes = num_notes;
        batch.is_last = block == kNoBlock;
      }
      __syncwarp();
      if (lane == 0) BarrierArrive(shared.Written(batch_place.slot));
      batch_place.Advance(kNumBatches);
    } while (block != kNoBlock);
  }
}

// The thread that has the copy engine fill slots.
__device__ inline void LoadSelected(const AttendSelectedParams& params,
                                    const SelectedGeometry& geometry,
                                    const SelectedShared& shared) {
  const AttentionDims& dims = params.dims;
  const int64_t record_bytes = RecordBytes(dims);
  const int32_t k_token_bytes = dims.head_dim_qk * 2, v_token_bytes = geometry.value_bytes;
  RingPlace batch_place, slot_place;
  uint32_t record = 0;
  for (int32_t index = blockIdx.x; index < geometry.num_tiles; index += gridDim.x) {
    bool is_last = false;
    while (!is_last) {
      BarrierWait(shared.Written(batch_place.slot), batch_place.parity);
      const Batch& batch = shared.batches[batch_place.slot];
      is_last = batch.is_last != 0;
      const int32_t num_notes = batch.num_notes;
      for (int32_t i = 0; i < num_notes; ++i, ++record) {
        const RecordNote note = batch.notes[i];
        const char* const from =
            note.location < params.num_own_records
                ? static_cast<const char*>(params.own_records) + note.location * record_bytes
                : static_cast<const char*>(params.slots) +
                      (note.location - params.num_own_records) * record_bytes;
        const uint32_t full = shared.Full(record), empty = shared.Empty(slot_place.slot);
        BarrierWait(empty, slot_place.parity ^ 1);
        const int32_t first_token = note.chunk * kTileKeys;
        const int32_t width = min(kTileKeys, dims.select_block_tokens - first_token);
        const uint32_t to = SharedAddress(shared.slots + slot_place.slot * geometry.slot_bytes);
        const uint32_t k_bytes = width * k_token_bytes, v_bytes = width * v_token_bytes;
        BarrierArriveExpectBytes(full, k_bytes + v_bytes);
        if (geometry.chunks_per_block == 1) {
          BulkCopy(to, from, k_bytes + v_bytes, full);
        } else {
          BulkCopy(to, from + first_token * k_token_bytes, k_bytes, full);
          BulkCopy(to + k_bytes,
                   from + dims.select_block_tokens * k_token_bytes + first_token * v_token_bytes,
                   v_bytes, full);
        }
        // For the warps that will pass over it.
        const int32_t num_idle = kConsumerWarps - __popc(note.wanted_by);
        if (num_idle > 0) BarrierArrive(empty, num_idle);
        slot_place.Advance(geometry.num_slots);
      }
      BarrierArrive(shared.Read(batch_place.slot));
      batch_place.Advance(kNumBatches);
    }
  }
}

// The rows of a warp: heads [first_head, first_head + num_heads) of one query.
struct WarpRows {
  int64_t row;
  int32_t first_head;
  int32_t num_heads;  // 0: this warp has nothing to do in this tile

  __device__ WarpRows(const AttendSelectedParams& params, const SelectedGeometry& geometry,
                      int32_t tile_index, int32_t warp) {
    const SelectedTile tile(params, geometry, tile_index);
    const int32_t group_size = geometry.group_size;
    const int32_t query = warp / geometry.warps_per_query;
    const int32_t first =
        (tile.part * geometry.warps_per_query + warp % geometry.warps_per_query) * kTileRows;
    row = tile.first_row + query;
    first_head = tile.kv_head * group_size + first;
    const bool exists = tile_index < geometry.num_tiles && query < geometry.queries_per_tile &&
                        row < params.query_end;
    num_heads = exists ? max(0, min(kTileRows, group_size - first)) : 0;
  }
};

template <class Q>
__device__ inline void LoadQ(const AttendSelectedParams& params, const WarpRows& rows, Q& q) {
  const ConstTensor3& tensor = params.queries.q;
  q.Load([&](int i) {
    return i < rows.num_heads
               ? static_cast<const char*>(tensor.data) +
                     (rows.row * tensor.row_stride + (rows.first_head + i) * tensor.head_stride) * 2
               : nullptr;
  });
}

// Writes o_slc and lse_slc if asked to, and o.
template <class T, int kDv>
__device__ inline void StoreGated(const AttendSelectedParams& params, const WarpRows& rows,
                                  WarpAttention<T, kDv>& attention) {
  const int32_t lane = threadIdx.x % 32;
  const GateParams& gate = params.gate;
  float lse[2];
  attention.Finish(lse);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int32_t i = lane / 4 + 8 * r;
    if (i >= rows.num_heads) continue;
    const int64_t head = rows.first_head + i;
    const auto place = [&](const auto& tensor) {
      return rows.row * tensor.row_stride + head * tensor.head_stride + lane % 4 * 8;
    };
    const uint16_t* const o_cmp = static_cast<const uint16_t*>(gate.o_cmp.data) + place(gate.o_cmp);
    const uint16_t* const o_win = static_cast<const uint16_t*>(gate.o_win.data) + place(gate.o_win);
    uint16_t* const o = static_cast<uint16_t*>(gate.o.data) + place(gate.o);
    float weights[3];
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      weights[b] = LoadFloat(gate.gate_dtype, gate.gate,
                             rows.row * gate.row_stride + head * gate.head_stride + b);
    }
    // A few groups of 32 values at a time, for want of registers; all of these are read before the
    // first is written: o may be o_cmp's memory.
    constexpr int kGroups = kDv / 32, kAtOnce = kGroups % 4 == 0 ? 4 : 2;
#pragma unroll
    for (int first = 0; first < kGroups; first += kAtOnce) {
      uint4 cmp[kAtOnce], win[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        cmp[i] = *reinterpret_cast<const uint4*>(o_cmp + (first + i) * 32);
        win[i] = *reinterpret_cast<const uint4*>(o_win + (first + i) * 32);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int group = first + i;
        float values[8];
        attention.Get(group, r, values);
        const uint32_t cmp_words[4] = {cmp[i].x, cmp[i].y, cmp[i].z, cmp[i].w};
        const uint32_t win_words[4] = {win[i].x, win[i].y, win[i].z, win[i].w};
        uint32_t slc[4], gated[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 c = Unpack2<T>(cmp_words[w]), v = Unpack2<T>(win_words[w]);
          const float s0 = values[2 * w], s1 = values[2 * w + 1];
          slc[w] = Pack2<T>(s0, s1);
          gated[w] = Pack2<T>(fmaf(weights[2], v.x, fmaf(weights[0], c.x, weights[1] * s0)),
                              fmaf(weights[2], v.y, fmaf(weights[0], c.y, weights[1] * s1)));
        }
        *reinterpret_cast<uint4*>(o + group * 32) =
            make_uint4(gated[0], gated[1], gated[2], gated[3]);
        if (params.o_slc.data != nullptr) {
          *reinterpret_cast<uint4*>(static_cast<uint16_t*>(params.o_slc.data) +
                                    place(params.o_slc) + group * 32) =
              make_uint4(slc[0], slc[1], slc[2], slc[3]);
        }
      }
    }
    if (params.lse_slc != nullptr && lane % 4 == 0) {
      params.lse_slc[rows.row * params.dims.num_q_heads + head] = lse[r];
    }
  }
}

// The eight warps. kBlockTokens: l' when it is one chunk of kTileKeys, else 0. `work` is what they
// do: Load begins to load what it needs of rows, Begin waits for it, Attend takes a chunk of a
// block of which the query sees `num_visible` tokens, and End stores what has become of the rows.
template <int kBlockTokens, class Work>
__device__ inline void ConsumeSelected(const AttendSelectedParams& params,
                                       const SelectedGeometry& geometry,
                                       const SelectedShared& shared, Work& work) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const AttentionDims& dims = params.dims;
  const int32_t query = min(warp / geometry.warps_per_query, geometry.queries_per_tile - 1);
  const int32_t block_tokens = kBlockTokens != 0 ? kBlockTokens : dims.select_block_tokens;
  RingPlace place;
  uint32_t record = 0;  // the first of the batch
  work.Load(WarpRows(params, geometry, blockIdx.x, warp));
  for (int32_t index = blockIdx.x; index < geometry.num_tiles; index += gridDim.x) {
    const WarpRows rows(params, geometry, index, warp);
    work.Begin();
    bool is_last = false, exists = false;
    while (!is_last) {
      BarrierWait(shared.Written(place.slot), place.parity);
      const Batch& batch = shared.batches[place.slot];
      exists = batch.end_token[query] > 0;
      is_last = batch.is_last != 0;
      const int32_t num_notes = batch.num_notes;
      uint32_t wanted = __ballot_sync(
          kFullWarp, lane < num_notes && (batch.notes[lane].wanted_by >> warp & 1) != 0);
      for (; wanted != 0; wanted &= wanted - 1) {
        const int32_t i = __ffs(wanted) - 1;
        const RecordNote note = batch.notes[i];
        BarrierWait(shared.Full(record + i), FullParity(record + i));
        if (rows.num_heads > 0) {
          const int32_t width = kBlockTokens != 0
                                    ? kBlockTokens
                                    : min(kTileKeys, block_tokens - note.chunk * kTileKeys);
          const int64_t num_visible =
              batch.end_token[query] - int64_t{note.block} * block_tokens - note.chunk * kTileKeys;
          const uint32_t k = SharedAddress(shared.slots + note.slot * geometry.slot_bytes);
          work.Attend(note, k, width, num_visible);
        }
        __syncwarp();
        if (lane == 0) BarrierArrive(shared.Empty(note.slot));
      }
      record += num_notes;
      if (num_notes > 0) BarrierWait(shared.Full(record - 1), FullParity(record - 1));
      __syncwarp();
      if (lane == 0) BarrierArrive(shared.Read(place.slot));
      place.Advance(kNumBatches);
    }
    work.Load(WarpRows(params, geometry, index + gridDim.x, warp));
    if (rows.num_heads > 0 && exists) work.End(rows);
  }
}

// Attention of the rows, and the gate.
template <class T, int kDk, int kDv, int kBlockTokens>
class AttendRows {
 public:
  __device__ explicit AttendRows(const AttendSelectedParams& params)
      : params_(params), attention_(params.dims.softmax_scale * 1.4426950408889634f) {}

  __device__ void Load(const WarpRows& rows) { LoadQ(params_, rows, q_); }
  __device__ void Begin() {
    q_.WaitUntilLoaded();
    attention_.Reset();
  }
  __device__ void Attend(const RecordNote&, uint32_t k, int32_t width, int64_t num_visible) {
    const uint32_t v = k + width * kDk * 2;
    if (num_visible >= width) {
      attention_.template Attend<kBlockTokens, false>(q_, k, v, width, {});
    } else if (num_visible > 0) {
      const int32_t end = static_cast<int32_t>(num_visible);
      attention_.template Attend<kBlockTokens, true>(q_, k, v, width, {{0, 0}, {end, end}});
    }
  }
  __device__ void End(const WarpRows& rows) { StoreGated(params_, rows, attention_); }

 private:
  const AttendSelectedParams& params_;
  RegisterQ<kDk> q_;
  WarpAttention<T, kDv> attention_;
};

// The body of a kernel of kSelectedThreads: sets up the barriers and gives warps their parts;
// consume() is that of the eight.
template <class Prefetch, class Consume>
__device__ inline void RunSelected(const AttendSelectedParams& params,
                                   const SelectedGeometry& geometry, const SelectedShared& shared,
                                   const Prefetch& prefetch, const Consume& consume) {
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < kFullBarriers; ++i) BarrierInit(shared.Full(i), 1);
    for (int32_t i = 0; i < kNumBatches; ++i) {
      BarrierInit(shared.Written(i), 1);
      BarrierInit(shared.Read(i), kConsumerWarps + 1);  // and the loader
    }
    for (int32_t i = 0; i < geometry.num_slots; ++i) BarrierInit(shared.Empty(i), kConsumerWarps);
    BarrierInitFence();
  }
  __syncthreads();
  const int32_t warp = threadIdx.x / 32;
  if (warp >= kConsumerWarps) {
    LowerRegisters<kProducerRegisters>();
    if (warp == kConsumerWarps) ScoutSelected(params, geometry, shared, prefetch);
    if (threadIdx.x == (kConsumerWarps + 1) * 32) LoadSelected(params, geometry, shared);
  } else {
    RaiseRegisters<kConsumerRegisters>();
    consume();
  }
}

// Grid: one CTA per SM; CTA i owns tiles i, i + gridDim, ...
template <class T, int kDk, int kDv, int kBlockTokens>
__global__ void __launch_bounds__(kSelectedThreads, 1)
    AttendSelectedKernel(const __grid_constant__ AttendSelectedParams params,
                         const __grid_constant__ SelectedGeometry geometry) {
  extern __shared__ __align__(128) char memory[];
  const SelectedShared shared(memory, geometry);
  const auto prefetch = [&](const SelectedTile& tile) { PrefetchTile(params, geometry, tile); };
  RunSelected(params, geometry, shared, prefetch, [&] {
    AttendRows<T, kDk, kDv, kBlockTokens> work(params);
    ConsumeSelected<kBlockTokens>(params, geometry, shared, work);
  });
}

// value_bytes as in SelectedGeometry.
inline SelectedGeometry MakeSelectedGeometry(const AttendSelectedParams& params,
                                             const Device& device, int32_t value_bytes) {
  const AttentionDims& dims = params.dims;
  SelectedGeometry g{};
  g.group_size = dims.group_size();
  const int32_t row_tiles = (g.group_size + kTileRows - 1) / kTileRows;
  g.warps_per_query = row_tiles < kConsumerWarps ? row_tiles : kConsumerWarps;
  g.queries_per_tile = kConsumerWarps / g.warps_per_query;
  g.parts_per_query = (row_tiles + g.warps_per_query - 1) / g.warps_per_query;
  // The outputs of 2^31 tiles are more than any GPU holds.
  g.num_row_tiles = static_cast<int32_t>(
      (params.query_end - params.query_begin + g.queries_per_tile - 1) / g.queries_per_tile);
  g.num_tiles = params.queries.kv_heads.size() * g.num_row_tiles * g.parts_per_query;
  const int32_t block_tokens = dims.select_block_tokens;
  g.chunks_per_block = (block_tokens + kTileKeys - 1) / kTileKeys;
  g.slot_bytes =
      (block_tokens < kTileKeys ? block_tokens : kTileKeys) * (dims.head_dim_qk * 2 + value_bytes);
  g.value_bytes = value_bytes;
  const int32_t fixed_bytes = SelectedShared::kFixedBytes;
  const int32_t bytes_per_slot = g.slot_bytes + SelectedShared::kBytesPerSlot;
  const int32_t fitting = (device.max_shared_bytes - fixed_bytes) / bytes_per_slot;
  constexpr int32_t kMaxSlots = 16;  // more than ever waits to be read
  g.num_slots = fitting < kMaxSlots ? fitting : kMaxSlots;
  g.shared_bytes = fixed_bytes + g.num_slots * bytes_per_slot;
  return g;
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_ATTEND_SELECTED_CUH_
