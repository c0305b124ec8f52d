// Stages 7 and 8: attention over the selected blocks, then the gate.
//
// The selected branch is bound by the L2: each query reads n records of its own. So a tile is a few
// neighbouring queries of one kv head, whose lists are merged: a record that several of them
// selected is loaded once. One warp walks the merged lists and has the copy engine fill a ring of
// slots; each of eight others works on 16 heads of one query, and passes over the records that this
// query did not select. A query meets its blocks in ascending order whatever its neighbours are, so
// the result does not depend on the tiles. Tiles are ordered by kv head: the records of one are in
// the L2 at a time.
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
// Whole warpgroups, because registers move between warpgroups: of the last one, one warp produces.
constexpr int kSelectedThreads = (kConsumerWarps + 4) * 32;
constexpr int kConsumerRegisters = 232;
constexpr int kProducerRegisters = 40;
constexpr int kMaxTileQueries = kConsumerWarps;
// Entries of each query's list that the producer holds at a time.
constexpr int kListEntries = 16;
constexpr int kNoBlock = INT_MAX;

// How a launch divides the work and the shared memory.
struct SelectedGeometry {
  int32_t warps_per_query;   // each works on 16 heads of one kv head's group
  int32_t queries_per_tile;  // of one kv head
  int32_t parts_per_query;   // tiles that share the heads of a group too large for one
  int64_t num_row_tiles;
  int64_t num_tiles;         // kv heads of the call * num_row_tiles * parts_per_query
  int32_t chunks_per_block;  // of at most kTileKeys tokens; a slot holds one
  int32_t num_slots;
  int32_t slot_bytes;
  int32_t q_bytes;  // of all warps' SharedQ
  int32_t shared_bytes;
};

// What a slot holds, and for whom.
struct SlotNote {
  int32_t block;       // global
  int32_t chunk;       // of the block
  uint32_t wanted_by;  // bit i: query i of the tile
  uint32_t is_last;    // of the tile
};

struct ListEntry {
  int32_t block;     // global; kNoBlock past the end
  int32_t location;  // record
};

// Slots first, aligned for the copy engine; then q, notes, barriers and lists.
struct SelectedShared {
  char* slots;
  uint4* q;
  SlotNote* notes;   // [num_slots]
  uint64_t* full;    // [num_slots]
  uint64_t* empty;   // [num_slots]
  ListEntry* lists;  // [kMaxTileQueries][kListEntries]

  __device__ SelectedShared(char* memory, const SelectedGeometry& geometry) {
    slots = memory;
    q = reinterpret_cast<uint4*>(slots + geometry.num_slots * geometry.slot_bytes);
    notes = reinterpret_cast<SlotNote*>(reinterpret_cast<char*>(q) + geometry.q_bytes);
    full = reinterpret_cast<uint64_t*>(notes + geometry.num_slots);
    empty = full + geometry.num_slots;
    lists = reinterpret_cast<ListEntry*>(empty + geometry.num_slots);
  }
  static constexpr int32_t BytesPerSlot(int32_t slot_bytes) {
    return slot_bytes + static_cast<int32_t>(sizeof(SlotNote) + 2 * sizeof(uint64_t));
  }
  static constexpr int32_t kListBytes = kMaxTileQueries * kListEntries * sizeof(ListEntry);
};

struct SelectedTile {
  int32_t kv_head;
  int32_t part;
  int64_t first_row;

  __device__ SelectedTile(const AttendSelectedParams& params, const SelectedGeometry& geometry,
                          int64_t index) {
    part = static_cast<int32_t>(index % geometry.parts_per_query);
    index /= geometry.parts_per_query;
    first_row = params.query_begin + index % geometry.num_row_tiles * geometry.queries_per_tile;
    kv_head = params.queries.kv_heads.begin + static_cast<int32_t>(index / geometry.num_row_tiles);
  }
};

// A place in the ring, and how often it has been around.
struct RingPlace {
  int32_t slot = 0;
  uint32_t parity = 0;
  __device__ void Advance(int32_t num_slots) {
    if (++slot == num_slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// The producer's view of one tile: the merged lists of its queries. Lane i < 8 stands for query i.
class MergedLists {
 public:
  __device__ MergedLists(const AttendSelectedParams& params, const SelectedGeometry& geometry,
                         const SelectedTile& tile, ListEntry* lists)
      : params_(params), kv_head_(tile.kv_head), lists_(lists) {
    const int32_t lane = threadIdx.x % 32;
    for (int32_t i = 0; i < geometry.queries_per_tile; ++i) {
      const int64_t row = tile.first_row + i;
      if (row >= params.query_end) break;
      const QueryPlace place = FindQuery(params.queries, row);
      if (lane == i && place.document >= 0) {
        row_ = row;
        first_block_ =
            static_cast<int32_t>(params.queries.documents[place.document].slc_block_begin);
      }
    }
    Refill(__ballot_sync(kFullWarp, row_ >= 0));
  }

  // The lowest block that is left; kNoBlock: none is.
  __device__ int32_t Lowest() const { return __reduce_min_sync(kFullWarp, head_.block); }

  // Takes `block` off the lists that begin with it. Returns which these are.
  __device__ uint32_t Take(int32_t block, int32_t& location) {
    const bool mine = head_.block == block;
    const uint32_t takers = __ballot_sync(kFullWarp, mine);
    location = __shfl_sync(kFullWarp, head_.location, __ffs(takers) - 1);
    if (mine) {
      ++cursor_;
      head_ = cursor_ < params_.dims.num_selected_blocks ? Entry(cursor_ % kListEntries)
                                                         : ListEntry{kNoBlock, 0};
    }
    const bool empty =
        mine && cursor_ % kListEntries == 0 && cursor_ < params_.dims.num_selected_blocks;
    const uint32_t to_refill = __ballot_sync(kFullWarp, empty);
    if (to_refill != 0) Refill(to_refill);
    return takers;
  }

 private:
  __device__ const ListEntry& Entry(int32_t i) const {
    return lists_[threadIdx.x % 32 * kListEntries + i];
  }

  // Loads the next kListEntries entries of the lists in `which`, two lists at a time.
  __device__ void Refill(uint32_t which) {
    __syncwarp();
    const int32_t lane = threadIdx.x % 32;
    for (uint32_t left = which; left != 0;) {
      const int32_t first = __ffs(left) - 1;
      left &= left - 1;
      const int32_t second = left != 0 ? __ffs(left) - 1 : -1;
      left &= left - 1;
      const int32_t query = lane < kListEntries ? first : second;
      const int64_t row = __shfl_sync(kFullWarp, row_, query & 31);
      const int32_t first_block = __shfl_sync(kFullWarp, first_block_, query & 31);
      const int32_t i = __shfl_sync(kFullWarp, cursor_, query & 31) + lane % kListEntries;
      if (query < 0) continue;
      ListEntry entry{kNoBlock, 0};
      const int32_t n = params_.dims.num_selected_blocks;
      if (i < n) {
        const int32_t pick =
            params_.block_indices[(row * params_.dims.num_kv_heads + kv_head_) * n + i];
        if (pick >= 0) {
          entry.block = first_block + pick;
          entry.location = params_.locations[kv_head_ * params_.num_blocks + entry.block];
        }
      }
      lists_[query * kListEntries + lane % kListEntries] = entry;
    }
    __syncwarp();
    if (which >> lane & 1) head_ = Entry(0);
  }

  const AttendSelectedParams& params_;
  const int32_t kv_head_;
  ListEntry* const lists_;
  int64_t row_ = -1;
  int32_t first_block_ = 0;
  int32_t cursor_ = 0;
  ListEntry head_{kNoBlock, 0};
};

__device__ inline void ProduceSelected(const AttendSelectedParams& params,
                                       const SelectedGeometry& geometry,
                                       const SelectedShared& shared) {
  const int32_t lane = threadIdx.x % 32;
  const AttentionDims& dims = params.dims;
  const int64_t record_bytes = RecordBytes(dims);
  const int32_t k_token_bytes = dims.head_dim_qk * 2, v_token_bytes = dims.head_dim_v * 2;
  RingPlace place;
  for (int64_t index = blockIdx.x; index < geometry.num_tiles; index += gridDim.x) {
    const SelectedTile tile(params, geometry, index);
    MergedLists lists(params, geometry, tile, shared.lists);
    int32_t block = lists.Lowest();
    do {
      int32_t location = 0;
      const uint32_t wanted_by = block == kNoBlock ? 0 : lists.Take(block, location);
      const int32_t next_block = lists.Lowest();
      const char* const record =
          location < params.num_own_records
              ? static_cast<const char*>(params.own_records) + location * record_bytes
              : static_cast<const char*>(params.slots) +
                    (location - params.num_own_records) * record_bytes;
      for (int32_t chunk = 0; chunk < geometry.chunks_per_block; ++chunk) {
        const bool is_last = next_block == kNoBlock && chunk == geometry.chunks_per_block - 1;
        const uint32_t full = SharedAddress(&shared.full[place.slot]);
        BarrierWait(SharedAddress(&shared.empty[place.slot]), place.parity ^ 1);
        if (lane == 0) {
          shared.notes[place.slot] = {block, chunk, wanted_by, is_last};
          if (block == kNoBlock) {
            BarrierArrive(full);  // a tile without a query, which still has to end
          } else {
            const int32_t first_token = chunk * kTileKeys;
            const int32_t width = min(kTileKeys, dims.select_block_tokens - first_token);
            const uint32_t to = SharedAddress(shared.slots + place.slot * geometry.slot_bytes);
            const uint32_t k_bytes = width * k_token_bytes, v_bytes = width * v_token_bytes;
            BarrierArriveExpectBytes(full, k_bytes + v_bytes);
            if (geometry.chunks_per_block == 1) {
              BulkCopy(to, record, k_bytes + v_bytes, full);
            } else {
              BulkCopy(to, record + first_token * k_token_bytes, k_bytes, full);
              BulkCopy(
                  to + k_bytes,
                  record + dims.select_block_tokens * k_token_bytes + first_token * v_token_bytes,
                  v_bytes, full);
            }
          }
        }
        place.Advance(geometry.num_slots);
      }
      block = next_block;
    } while (block != kNoBlock);
  }
}

// The rows of a warp: heads [first_head, first_head + num_heads) of one query.
struct WarpRows {
  int64_t row;
  int32_t first_head;
  int32_t num_heads;  // 0: this warp has nothing to do in this tile
  int64_t position;
  int32_t first_block;  // of the query's document

  __device__ WarpRows(const AttendSelectedParams& params, const SelectedGeometry& geometry,
                      const SelectedTile& tile, int32_t warp) {
    const AttentionDims& dims = params.dims;
    const int32_t group_size = dims.num_q_heads / dims.num_kv_heads;
    const int32_t query = warp / geometry.warps_per_query;
    const int32_t first =
        (tile.part * geometry.warps_per_query + warp % geometry.warps_per_query) * kTileRows;
    row = tile.first_row + query;
    first_head = tile.kv_head * group_size + first;
    num_heads = min(kTileRows, group_size - first);
    position = 0;
    first_block = 0;
    if (query >= geometry.queries_per_tile || row >= params.query_end || num_heads <= 0) {
      num_heads = 0;
      return;
    }
    const QueryPlace place = FindQuery(params.queries, row);
    if (place.document < 0) {
      num_heads = 0;
      return;
    }
    position = place.position;
    first_block = static_cast<int32_t>(params.queries.documents[place.document].slc_block_begin);
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
  q.WaitUntilLoaded();
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
    // All are read before the first is written: o may be o_cmp's memory.
    uint4 cmp[kDv / 32], win[kDv / 32];
#pragma unroll
    for (int group = 0; group < kDv / 32; ++group) {
      cmp[group] = *reinterpret_cast<const uint4*>(o_cmp + group * 32);
      win[group] = *reinterpret_cast<const uint4*>(o_win + group * 32);
    }
    float weights[3];
#pragma unroll
    for (int b = 0; b < 3; ++b) {
      weights[b] = LoadFloat(gate.gate_dtype, gate.gate,
                             rows.row * gate.row_stride + head * gate.head_stride + b);
    }
#pragma unroll
    for (int group = 0; group < kDv / 32; ++group) {
      float values[8];
      attention.Get(group, r, values);
      const uint32_t cmp_words[4] = {cmp[group].x, cmp[group].y, cmp[group].z, cmp[group].w};
      const uint32_t win_words[4] = {win[group].x, win[group].y, win[group].z, win[group].w};
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
        *reinterpret_cast<uint4*>(static_cast<uint16_t*>(params.o_slc.data) + place(params.o_slc) +
                                  group * 32) = make_uint4(slc[0], slc[1], slc[2], slc[3]);
      }
    }
    if (params.lse_slc != nullptr && lane % 4 == 0) {
      params.lse_slc[rows.row * params.dims.num_q_heads + head] = lse[r];
    }
  }
}

// kBlockTokens: l' when it is one chunk of kTileKeys, else 0.
template <class T, int kDv, int kBlockTokens, class Q>
__device__ inline void ConsumeSelected(const AttendSelectedParams& params,
                                       const SelectedGeometry& geometry,
                                       const SelectedShared& shared, Q& q) {
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const AttentionDims& dims = params.dims;
  const uint32_t query_bit = 1u << (warp / geometry.warps_per_query);
  const int32_t block_tokens = kBlockTokens != 0 ? kBlockTokens : dims.select_block_tokens;
  WarpAttention<T, kDv> attention(dims.softmax_scale * 1.4426950408889634f);
  RingPlace place;
  for (int64_t index = blockIdx.x; index < geometry.num_tiles; index += gridDim.x) {
    const SelectedTile tile(params, geometry, index);
    const WarpRows rows(params, geometry, tile, warp);
    LoadQ(params, rows, q);
    attention.Reset();
    bool is_last = false;
    while (!is_last) {
      BarrierWait(SharedAddress(&shared.full[place.slot]), place.parity);
      const SlotNote note = shared.notes[place.slot];
      is_last = note.is_last != 0;
      if ((note.wanted_by & query_bit) != 0 && rows.num_heads > 0) {
        const int64_t first_token =
            int64_t{note.block - rows.first_block} * block_tokens + note.chunk * kTileKeys;
        const int32_t width = kBlockTokens != 0
                                  ? kBlockTokens
                                  : min(kTileKeys, block_tokens - note.chunk * kTileKeys);
        const int64_t num_visible = rows.position + 1 - first_token;
        const uint32_t k = SharedAddress(shared.slots + place.slot * geometry.slot_bytes);
        const uint32_t v = k + width * dims.head_dim_qk * 2;
        if (num_visible >= width) {
          attention.template Attend<kBlockTokens, false>(q, k, v, width, {});
        } else if (num_visible > 0) {
          const int32_t end = static_cast<int32_t>(num_visible);
          attention.template Attend<kBlockTokens, true>(q, k, v, width, {{0, 0}, {end, end}});
        }
      }
      __syncwarp();
      if (lane == 0) BarrierArrive(SharedAddress(&shared.empty[place.slot]));
      place.Advance(geometry.num_slots);
    }
    if (rows.num_heads > 0) StoreGated(params, rows, attention);
  }
}

// Grid: one CTA per SM; CTA i owns tiles i, i + gridDim, ... kDk = 0: any Dk.
template <class T, int kDk, int kDv, int kBlockTokens>
__global__ void __launch_bounds__(kSelectedThreads, 1)
    AttendSelectedKernel(const __grid_constant__ AttendSelectedParams params,
                         const __grid_constant__ SelectedGeometry geometry) {
  extern __shared__ __align__(128) char memory[];
  const SelectedShared shared(memory, geometry);
  if (threadIdx.x == 0) {
    for (int32_t i = 0; i < geometry.num_slots; ++i) {
      BarrierInit(SharedAddress(&shared.full[i]), 1);
      BarrierInit(SharedAddress(&shared.empty[i]), kConsumerWarps);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int32_t warp = threadIdx.x / 32;
  if (warp >= kConsumerWarps) {
    LowerRegisters<kProducerRegisters>();
    if (warp == kConsumerWarps) ProduceSelected(params, geometry, shared);
  } else {
    RaiseRegisters<kConsumerRegisters>();
    if constexpr (kDk != 0) {
      RegisterQ<kDk> q;
      ConsumeSelected<T, kDv, kBlockTokens>(params, geometry, shared, q);
    } else {
      const int32_t head_dim = params.dims.head_dim_qk;
      SharedQ q(shared.q + warp * head_dim * 2, head_dim, params.queries.q.data);
      ConsumeSelected<T, kDv, kBlockTokens>(params, geometry, shared, q);
    }
  }
}

inline SelectedGeometry MakeSelectedGeometry(const AttendSelectedParams& params,
                                             const Device& device, bool q_in_registers) {
  const AttentionDims& dims = params.dims;
  const int32_t row_tiles = (dims.group_size() + kTileRows - 1) / kTileRows;
  SelectedGeometry g{};
  g.warps_per_query = row_tiles < kConsumerWarps ? row_tiles : kConsumerWarps;
  g.queries_per_tile = kConsumerWarps / g.warps_per_query;
  g.parts_per_query = (row_tiles + g.warps_per_query - 1) / g.warps_per_query;
  g.num_row_tiles =
      (params.query_end - params.query_begin + g.queries_per_tile - 1) / g.queries_per_tile;
  g.num_tiles = params.queries.kv_heads.size() * g.num_row_tiles * g.parts_per_query;
  const int32_t block_tokens = dims.select_block_tokens;
  g.chunks_per_block = (block_tokens + kTileKeys - 1) / kTileKeys;
  g.slot_bytes = (block_tokens < kTileKeys ? block_tokens : kTileKeys) *
                 (dims.head_dim_qk + dims.head_dim_v) * 2;
  g.q_bytes = q_in_registers ? 0 : kConsumerWarps * kTileRows * dims.head_dim_qk * 2;
  const int32_t fixed_bytes = g.q_bytes + SelectedShared::kListBytes;
  const int32_t bytes_per_slot = SelectedShared::BytesPerSlot(g.slot_bytes);
  const int32_t fitting = (device.max_shared_bytes - fixed_bytes) / bytes_per_slot;
  constexpr int32_t kMaxSlots = 16;  // more than ever waits to be read
  g.num_slots = fitting < kMaxSlots ? fitting : kMaxSlots;
  g.shared_bytes = fixed_bytes + g.num_slots * bytes_per_slot;
  return g;
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_ATTEND_SELECTED_CUH_
