// The backward of the selected attention on Hopper's tensor cores: step 2 of selected_backward.cuh.
//
// An item is a block of 64 tokens and some of the queries that picked it. These come in tiles of 64
// rows, whole queries of one kv head's group padded to 16 heads, in a ring. Two consumer warpgroups
// take turns at an item's tiles:
//   S^T = K q^T and dP^T = V dO^T, 64 keys x 64 rows, then P and dS, which as accumulators are
//   operands as they are: dV += (g P)^T dO, dK += dS^T q.
// In the end one of them gets the other's dV and one the other's dK, through the memory of K and V.
// Of the last warpgroup, two warps fill the ring, one by the copy engine, and two bring K and V
// from the order of records to that of wgmma, for the next item while consumers work on one.
//
// Shared memory: kKvBuffers of K and V, panels of 64 dimensions; kSlots of q and dO, likewise; per
// slot lse, gate, delta and pick of each row; barriers.
#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/ring.cuh"
#include "kernels/cuda/selected_backward.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_values.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kKeys = 64;  // of a block
constexpr int kRows = 64;  // of a tile
constexpr int kConsumers = 2;
constexpr int kConsumerThreads = kConsumers * 128;
constexpr int kThreads = kConsumerThreads + 128;
constexpr int kPackThreads = 64;  // that bring K and V
constexpr int kConsumerRegisters = 232;
constexpr int kProducerRegisters = 40;
constexpr int kPanelBytes = 64 * 128;
constexpr int kKvBuffers = 2;
constexpr int kSlots = 4;  // what the shared memory has room for beside two blocks of 128 + 128
constexpr float kLog2E = 1.4426950408889634f;

struct RowValues {
  float lse[kRows];
  float gate[kRows];
  float delta[kRows];
  BlockPick pick[kRows];  // no visible token: no such row
};

template <int kDk, int kDv>
struct Shape {
  static constexpr int kKBytes = kKeys * kDk * 2;
  static constexpr int kKvBytes = kKeys * (kDk + kDv) * 2;
  static constexpr int kQBytes = kRows * kDk * 2;
  static constexpr int kSlotBytes = kRows * (kDk + kDv) * 2;
  static constexpr int kRing = kKvBuffers * kKvBytes;
  static constexpr int kRowValues = kRing + kSlots * kSlotBytes;
  static constexpr int kBarriers = kRowValues + kSlots * static_cast<int>(sizeof(RowValues));
  static constexpr int kBytes = kBarriers + 2 * (kSlots + kKvBuffers) * 8;
};

template <class Shape>
struct Shared {
  char* memory;
  uint32_t base;
  __device__ explicit Shared(char* to) : memory(to), base(SharedAddress(to)) {}
  // Addresses; V lies behind K, and dO behind q.
  __device__ uint32_t Kv(int buffer) const { return base + buffer * Shape::kKvBytes; }
  __device__ uint32_t Q(int slot) const { return base + Shape::kRing + slot * Shape::kSlotBytes; }
  __device__ RowValues& Rows(int slot) const {
    return reinterpret_cast<RowValues*>(memory + Shape::kRowValues)[slot];
  }
  // Barriers.
  __device__ uint32_t Full(int slot) const { return base + Shape::kBarriers + slot * 8; }
  __device__ uint32_t Empty(int slot) const { return Full(kSlots + slot); }
  __device__ uint32_t KvFull(int buffer) const { return Full(2 * kSlots + buffer); }
  __device__ uint32_t KvEmpty(int buffer) const { return KvFull(kKvBuffers + buffer); }
};

// q and dO: [tokens][heads][dim], boxes of one token, one group and 64 values.
struct TensorMaps {
  CUtensorMap q;
  CUtensorMap d_o;
};

// How queries share a tile.
struct TileRows {
  int32_t group_size;
  int32_t query_rows;        // G rounded up to whole fragments
  int32_t queries_per_tile;  // the rows beyond belong to none
  __device__ explicit TileRows(const AttentionDims& dims)
      : group_size(dims.num_q_heads / dims.num_kv_heads),
        query_rows(HeadTiles(dims) * kFragmentRows),
        queries_per_tile(kRows / query_rows) {}
  __device__ int32_t NumTiles(const BlockItem& item) const {
    return (item.count + queries_per_tile - 1) / queries_per_tile;
  }
};

// The picks of an item, 32 at a time, in the lanes of a warp.
class PickCursor {
 public:
  __device__ PickCursor(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                        const BlockItem& item)
      : picks_(piece.picks + item.begin),
        count_(item.count),
        list_(params.dims.num_selected_blocks),
        first_query_(static_cast<int32_t>(piece.query_begin)) {}

  // Makes picks [first, first + count) known, count a divisor of 32.
  __device__ void MoveTo(int32_t first) {
    if (first % 32 != 0) return;
    base_ = first;
    lane_query_ =
        first_query_ +
        picks_[min(first + static_cast<int32_t>(threadIdx.x % 32), count_ - 1)].index / list_;
  }
  // The query of a pick, of the item's last one where there is none.
  __device__ int32_t QueryOf(int32_t pick) const {
    return __shfl_sync(kFullWarp, lane_query_, pick - base_);
  }
  __device__ const BlockPick* at(int32_t pick) const { return picks_ + pick; }

 private:
  const BlockPick* const picks_;
  const int32_t count_, list_, first_query_;
  int32_t base_ = 0;
  int32_t lane_query_ = 0;
};

// The n-th item of this CTA. Items are dealt longest first, back and forth, so that the CTAs get
// almost the same.
__device__ __forceinline__ int32_t DealtItem(int32_t n) {
  return static_cast<int32_t>(n * gridDim.x +
                              (n % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x));
}

// Calls visit(cursor, item, first pick, place) for each tile. All lanes of a warp.
template <class Visit>
__device__ void ForEachTile(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                            const TileRows& rows, const Visit& visit) {
  RingPlace<kSlots> place;
  const int32_t num_items = piece.num_items->items;
  for (int32_t n = 0, index; (index = DealtItem(n)) < num_items; ++n) {
    const BlockItem item = piece.items[index];
    PickCursor cursor(params, piece, item);
    for (int32_t first = 0; first < item.count; first += rows.queries_per_tile) {
      cursor.MoveTo(first);
      visit(cursor, item, first, place);
      place.Advance();
    }
  }
}

// The warp that has the copy engine bring q and dO. Each lane asks for one box of a tile. A tile's
// queries that do not exist are the item's last one once more, and count for nothing.
template <int kDk, int kDv>
__device__ void LoadTiles(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                          const TensorMaps& maps, const Shared<Shape<kDk, kDv>>& shared) {
  constexpr int kPanels = (kDk + kDv) / 64;
  const TileRows rows(params.dims);
  const int32_t lane = threadIdx.x % 32, panel = lane % kPanels;
  const bool has_box = lane < rows.queries_per_tile * kPanels;
  const int32_t query = has_box ? lane / kPanels : 0;
  const bool is_q = panel < kDk / 64;
  const CUtensorMap* const map = is_q ? &maps.q : &maps.d_o;
  const int32_t column = (is_q ? panel : panel - kDk / 64) * 64;
  const int32_t first_head = piece.kv_head * rows.group_size;
  const uint32_t place_in_slot = panel * kPanelBytes + query * rows.query_rows * 128;
  const uint32_t tile_bytes = rows.queries_per_tile * rows.group_size * (kDk + kDv) * 2;
  ForEachTile(params, piece, rows,
              [&](const PickCursor& cursor, const BlockItem&, int32_t first,
                  const RingPlace<kSlots>& place) {
                const int32_t row = cursor.QueryOf(first + query);
                const uint32_t full = shared.Full(place.slot);
                BarrierWait(shared.Empty(place.slot), place.parity ^ 1);
                if (lane == 0) BarrierArriveExpectBytes(full, tile_bytes);
                __syncwarp();
                if (has_box) {
                  TensorCopy(shared.Q(place.slot) + place_in_slot, map, column, first_head, row,
                             full);
                }
              });
}

// The warp that brings lse, gate, delta and pick of each row.
template <int kDk, int kDv>
__device__ void LoadRowValues(const AttendSelectedBackwardParams& params,
                              const SelectedPiece& piece, const Shared<Shape<kDk, kDv>>& shared) {
  const TileRows rows(params.dims);
  const OutputGradients& outputs = params.outputs;
  constexpr int kLaneRows = kRows / 32;
  int32_t query[kLaneRows], head[kLaneRows];
  bool exists[kLaneRows];
#pragma unroll
  for (int32_t i = 0; i < kLaneRows; ++i) {
    const int32_t row = threadIdx.x % 32 + i * 32, in_query = row % rows.query_rows;
    query[i] = row / rows.query_rows;
    exists[i] = query[i] < rows.queries_per_tile && in_query < rows.group_size;
    if (!exists[i]) query[i] = 0;
    head[i] = piece.kv_head * rows.group_size + (exists[i] ? in_query : 0);
  }
  ForEachTile(params, piece, rows,
              [&](const PickCursor& cursor, const BlockItem& item, int32_t first,
                  const RingPlace<kSlots>& place) {
                BarrierWait(shared.Empty(place.slot), place.parity ^ 1);
                RowValues& values = shared.Rows(place.slot);
#pragma unroll
                for (int32_t i = 0; i < kLaneRows; ++i) {
                  const int32_t row = threadIdx.x % 32 + i * 32;
                  const int32_t pick = min(first + query[i], item.count - 1);
                  const bool copy = exists[i] && first + query[i] < item.count;
                  const int64_t at =
                      int64_t{cursor.QueryOf(pick)} * params.dims.num_q_heads + head[i];
                  CopyAsyncSmall<4>(SharedAddress(&values.lse[row]), outputs.lse + at, copy);
                  CopyAsyncSmall<4>(SharedAddress(&values.gate[row]), outputs.gate + at, copy);
                  CopyAsyncSmall<4>(SharedAddress(&values.delta[row]), outputs.delta + at, copy);
                  CopyAsyncSmall<8>(SharedAddress(&values.pick[row]), cursor.at(pick), copy);
                }
                BarrierArriveAfterCopies(shared.Full(place.slot));
              });
}

// From the order of a record to panels; `thread` of kPackThreads.
template <int kDim>
__device__ void UnpackRecord(const char* record, char* panels, int32_t thread) {
  constexpr int kGroups = kDim / 32;
  const uint4* const from = reinterpret_cast<const uint4*>(record);
#pragma unroll 1
  for (int32_t i = thread; i < kKeys * kGroups; i += kPackThreads) {
    const int32_t group = i / 8 % kGroups, token = i / (8 * kGroups) * 8 + i % 8;
    const uint4* const matrices = from + (token / 8 * kGroups + group) * 32 + token % 8;
    char* const row = panels + group / 2 * kPanelBytes + token * 128;
    // Half of the matrices' values at a time: these threads have few registers.
#pragma unroll
    for (int32_t half = 0; half < 2; ++half) {
      uint2 m[4];
#pragma unroll
      for (int32_t j = 0; j < 4; ++j) {
        m[j] = reinterpret_cast<const uint2*>(matrices + j * 8)[half];
      }
      const int32_t chunk = group % 2 * 4 + half * 2;
      *reinterpret_cast<uint4*>(row + ((chunk ^ (token % 8)) << 4)) =
          make_uint4(m[0].x, m[1].x, m[2].x, m[3].x);
      *reinterpret_cast<uint4*>(row + (((chunk + 1) ^ (token % 8)) << 4)) =
          make_uint4(m[0].y, m[1].y, m[2].y, m[3].y);
    }
  }
}

// The warps that bring K and V.
template <int kDk, int kDv>
__device__ void LoadBlocks(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                           const Shared<Shape<kDk, kDv>>& shared, int32_t thread) {
  RingPlace<kKvBuffers> place;
  const int32_t num_items = piece.num_items->items;
  for (int32_t n = 0, index; (index = DealtItem(n)) < num_items; ++n) {
    const char* const record =
        RecordAt(params, LocationOf(params, piece.kv_head, piece.items[index].block));
    char* const to = shared.memory + place.slot * Shape<kDk, kDv>::kKvBytes;
    BarrierWait(shared.KvEmpty(place.slot), place.parity ^ 1);
    UnpackRecord<kDk>(record, to, thread);
    UnpackRecord<kDv>(record + kKeys * kDk * 2, to + Shape<kDk, kDv>::kKBytes, thread);
    FenceProxyAsync();
    BarrierArrive(shared.KvFull(place.slot));
    place.Advance();
  }
}

// A warpgroup; lane 4g + c of warp w works on keys 16w + g and 16w + g + 8.
template <class T, int kDk, int kDv>
class Consumer {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Consumer(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                      const Shared<Sizes>& shared)
      : params_(params),
        piece_(piece),
        shared_(shared),
        scale_log2_(params.dims.softmax_scale * kLog2E),
        head_tiles_(HeadTiles(params.dims)) {}

  __device__ void Run() {
    const TileRows rows(params_.dims);
    RingPlace<kSlots> place;
    RingPlace<kKvBuffers> kv_place;
    const int32_t num_items = piece_.num_items->items;
    for (int32_t n = 0, index; (index = DealtItem(n)) < num_items; ++n) {
      const BlockItem item = piece_.items[index];
      const int32_t num_tiles = rows.NumTiles(item);
#pragma unroll
      for (float& value : dk_) value = 0.0f;
#pragma unroll
      for (float& value : dv_) value = 0.0f;
      const uint32_t kv = shared_.Kv(kv_place.slot);
      BarrierWait(shared_.KvFull(kv_place.slot), kv_place.parity);
      for (int32_t tile = 0; tile < num_tiles; ++tile) {
        if (tile % kConsumers == Group()) {
          BarrierWait(shared_.Full(place.slot), place.parity);
          const RowValues& values = shared_.Rows(place.slot);
          const bool whole = values.pick[Lane()].num_visible == kKeys &&
                             values.pick[Lane() + 32].num_visible == kKeys;
          if (__all_sync(kFullWarp, whole)) {
            Multiply<false>(kv, shared_.Q(place.slot), values);
          } else {
            Multiply<true>(kv, shared_.Q(place.slot), values);
          }
          __syncwarp();
          if (Lane() == 0) BarrierArrive(shared_.Empty(place.slot));
        }
        place.Advance();
      }
      Finish(item, kv_place.slot);
      kv_place.Advance();
    }
  }

 private:
  __device__ static int Lane() { return threadIdx.x % 32; }
  __device__ static int Warp() { return threadIdx.x / 32 % 4; }
  __device__ static int Group() { return threadIdx.x / 128; }

  // product [64 keys,64 rows] = keys * rows^T
  template <int kDim>
  __device__ static void Multiply(uint32_t keys, uint32_t rows, float (&product)[32]) {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const uint32_t panel = k / 4 * kPanelBytes;
      WgmmaShared<T>(product, WgmmaDescriptor(keys + panel) + k % 4 * 2,
                     WgmmaDescriptor(rows + panel) + k % 4 * 2, k > 0);
    }
    WgmmaCommit();
  }

  // sums += operand [64 keys,64 rows] * rows
  template <int kSize>
  __device__ static void MultiplyRows(const uint32_t (&operand)[16], uint32_t rows,
                                      float (&sums)[kSize]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      WgmmaValues<T>(sums, operand[4 * k], operand[4 * k + 1], operand[4 * k + 2],
                     operand[4 * k + 3], WgmmaValuesDescriptor(rows + k * 2048, kPanelBytes));
    }
    WgmmaCommit();
  }

  template <bool kMasked>
  __device__ void Multiply(uint32_t kv, uint32_t q, const RowValues& values) {
    const uint32_t d_o = q + Sizes::kQBytes;
    const int c = Lane() % 4, key = Warp() * 16 + Lane() / 4;
    float s[32], dp[32];
    WgmmaFence();
    Multiply<kDk>(kv, q, s);
    Multiply<kDv>(kv + Sizes::kKBytes, d_o, dp);
    WgmmaWait<0>();
    WgmmaTouch(s);
    WgmmaTouch(dp);
    // The other warpgroup's products run meanwhile.
    uint32_t p[16], ds[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int row = 8 * j + 2 * c;
      const float2 lse = *reinterpret_cast<const float2*>(&values.lse[row]);
      const float2 gate = *reinterpret_cast<const float2*>(&values.gate[row]);
      const float2 delta = *reinterpret_cast<const float2*>(&values.delta[row]);
      const float base[2] = {lse.x == -INFINITY ? -INFINITY : -lse.x * kLog2E,
                             lse.y == -INFINITY ? -INFINITY : -lse.y * kLog2E};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * j + 2 * r;
        float weights[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          weights[e] = Exp2(fmaf(s[i + e], scale_log2_, base[e]));
          if (kMasked && key + r * 8 >= values.pick[row + e].num_visible) weights[e] = 0.0f;
        }
        p[2 * j + r] = Pack2<T>(gate.x * weights[0], gate.y * weights[1]);
        ds[2 * j + r] = Pack2<T>(weights[0] * fmaf(gate.x, dp[i], -delta.x),
                                 weights[1] * fmaf(gate.y, dp[i + 1], -delta.y));
      }
    }
    WgmmaFence();
    MultiplyRows(p, d_o, dv_);
    MultiplyRows(ds, q, dk_);
    StoreDs(values, ds);
    WgmmaWait<0>();
    WgmmaTouch(dk_);
    WgmmaTouch(dv_);
  }

  __device__ void StoreDs(const RowValues& values, const uint32_t (&ds)[16]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      // The first fragment of the query that fragment k is of.
      const int first = head_tiles_ == 1   ? k
                        : head_tiles_ == 2 ? k / 2 * 2
                        : head_tiles_ == 3 ? k / 3 * 3
                                           : 0;
      const BlockPick pick = values.pick[first * kFragmentRows];
      const int64_t fragment =
          (int64_t{pick.index} * head_tiles_ + k - first) * (kKeys / kFragmentRows) + Warp();
      if (pick.num_visible == 0) continue;
      piece_.ds[fragment * 32 + Lane()] =
          make_uint4(ds[4 * k], ds[4 * k + 1], ds[4 * k + 2], ds[4 * k + 3]);
    }
  }

  // To or from the memory of the other warpgroup's thread of the same place.
  template <int kSize>
  __device__ static void Give(const float (&sums)[kSize], float4* memory) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
      memory[i * 128 + threadIdx.x % 128] =
          make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
    }
  }
  template <int kSize>
  __device__ static void Take(float (&sums)[kSize], const float4* memory) {
#pragma unroll
    for (int i = 0; i < kSize / 4; ++i) {
      const float4 value = memory[i * 128 + threadIdx.x % 128];
      sums[4 * i] += value.x, sums[4 * i + 1] += value.y;
      sums[4 * i + 2] += value.z, sums[4 * i + 3] += value.w;
    }
  }

  template <int kSize>
  __device__ static void Store(const float (&sums)[kSize], float factor, bool adds, float* to) {
    constexpr int kDim = kSize * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float2* const row =
          reinterpret_cast<float2*>(to + (Warp() * 16 + Lane() / 4 + r * 8) * kDim) + Lane() % 4;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        const float2 before = adds ? row[j * 4] : make_float2(0.0f, 0.0f);
        row[j * 4] = make_float2(fmaf(sums[4 * j + 2 * r], factor, before.x),
                                 fmaf(sums[4 * j + 2 * r + 1], factor, before.y));
      }
    }
  }

  // Both warpgroups' sums of an item together: dV by the second one, dK by the first.
  __device__ void Finish(const BlockItem& item, int buffer) {
    static_assert(kDk == kDv, "K and V take the memory of either's sums");
    constexpr int kBarrier = 1;
    float4* const memory = reinterpret_cast<float4*>(shared_.memory + buffer * Sizes::kKvBytes);
    float* const to = SumsOf(params_, piece_, item);
    SyncThreads(kBarrier, kConsumerThreads);  // K and V have been read
    if (Group() == 0) Give(dv_, memory);
    SyncThreads(kBarrier, kConsumerThreads);
    if (Group() == 1) Take(dv_, memory);
    SyncThreads(kBarrier, kConsumerThreads);
    if (Group() == 1) Give(dk_, memory);
    SyncThreads(kBarrier, kConsumerThreads);
    if (Group() == 0) {
      Take(dk_, memory);
      __syncwarp();
      if (Lane() == 0) BarrierArrive(shared_.KvEmpty(buffer));
      Store(dk_, params_.dims.softmax_scale, item.partial < 0, to);
    } else {
      Store(dv_, 1.0f, item.partial < 0, to + kKeys * kDk);
    }
  }

  const AttendSelectedBackwardParams& params_;
  const SelectedPiece& piece_;
  const Shared<Sizes> shared_;
  const float scale_log2_;
  const int32_t head_tiles_;
  float dk_[kDk / 2];
  float dv_[kDv / 2];
};

// Grid: one CTA per SM.
template <class T, int kDk, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
    SelectedKeysKernel(const __grid_constant__ AttendSelectedBackwardParams params,
                       const __grid_constant__ SelectedPiece piece,
                       const __grid_constant__ TensorMaps maps) {
  extern __shared__ __align__(1024) char memory[];
  using Sizes = Shape<kDk, kDv>;
  const Shared<Sizes> shared(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kSlots; ++i) {
      BarrierInit(shared.Full(i), 1 + 32);
      BarrierInit(shared.Empty(i), 4);
    }
    for (int i = 0; i < kKvBuffers; ++i) {
      BarrierInit(shared.KvFull(i), kPackThreads);
      BarrierInit(shared.KvEmpty(i), 4);
    }
    BarrierInitFence();
  }
  // Rows of no query are never written: they stay zero.
  for (int i = threadIdx.x; i < kSlots * Sizes::kSlotBytes / 16; i += kThreads) {
    reinterpret_cast<uint4*>(memory + Sizes::kRing)[i] = make_uint4(0, 0, 0, 0);
  }
  FenceProxyAsync();
  __syncthreads();
  const int warp = threadIdx.x / 32 - kConsumerThreads / 32;
  if (warp >= 0) {
    LowerRegisters<kProducerRegisters>();
    if (warp == 0) LoadTiles<kDk, kDv>(params, piece, maps, shared);
    if (warp == 1) LoadRowValues<kDk, kDv>(params, piece, shared);
    if (warp >= 2) {
      LoadBlocks<kDk, kDv>(params, piece, shared, threadIdx.x - (kThreads - kPackThreads));
    }
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consumer<T, kDk, kDv>(params, piece, shared).Run();
  }
}

bool MakeTensorMaps(const AttendSelectedBackwardParams& params, TensorMaps* maps) {
  const EncodeTensorMap encode = FindEncodeTensorMap();
  const AttentionDims& dims = params.dims;
  const auto make = [&](const ConstTensor3& tensor, int32_t head_dim, CUtensorMap* map) {
    return MakeTensorMap(encode,
                         {dims.dtype, tensor.data, params.queries.num_tokens, dims.num_q_heads,
                          head_dim, tensor.row_stride, tensor.head_stride, dims.group_size(), 1},
                         map);
  };
  return encode != nullptr && make(params.queries.q, dims.head_dim_qk, &maps->q) &&
         make(params.outputs.d_o, dims.head_dim_v, &maps->d_o);
}

template <class T, int kDim>
cudaError_t LaunchShape(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                        const TensorMaps& maps, const Device& device, cudaStream_t stream) {
  constexpr int kBytes = Shape<kDim, kDim>::kBytes;
  const auto kernel = SelectedKeysKernel<T, kDim, kDim>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<device.num_sms, kThreads, kBytes, stream>>>(params, piece, maps);
  return cudaGetLastError();
}

template <class T>
cudaError_t LaunchKeys(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                       const Device& device, cudaStream_t stream) {
  TensorMaps maps;
  if (!MakeTensorMaps(params, &maps)) return LaunchSelectedKeysAny(params, piece, device, stream);
  return params.dims.head_dim_qk == 64 ? LaunchShape<T, 64>(params, piece, maps, device, stream)
                                       : LaunchShape<T, 128>(params, piece, maps, device, stream);
}

}  // namespace

bool HasFastAttendSelectedBackward(const AttentionDims& dims) {
  const int32_t dk = dims.head_dim_qk;
  return (dk == 64 || dk == 128) && dims.head_dim_v == dk && dims.select_block_tokens == kKeys &&
         dims.group_size() <= kRows;
}

cudaError_t LaunchAttendSelectedBackwardFast(const AttendSelectedBackwardParams& params,
                                             const Device& device, cudaStream_t stream) {
  const bool is_bf16 = params.dims.dtype == DType::kBF16;
  return LaunchSelectedBackward(params, device,
                                is_bf16 ? LaunchKeys<__nv_bfloat16> : LaunchKeys<__half>,
                                LaunchSelectedQueriesFast, stream);
}

}  // namespace nsa::kernels::cuda
