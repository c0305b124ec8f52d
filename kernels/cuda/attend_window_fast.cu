// Sliding-window attention on Hopper's tensor cores, for the shapes that performance is about.
//
// A tile of rows is worked on by three consumer warpgroups of 64 rows each. One warp has the copy
// engine bring tiles of 64 keys and values into a ring; where a tile's tokens do not lie in one
// piece, it copies them itself, row by row. Three warps bring q, one for each consumer. While a
// consumer takes the exponentials of a tile, the tensor cores multiply the one before with its
// values.
#include <cuda.h>

#include <cfloat>
#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_values.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kTileKeys = 64;
constexpr int kConsumers = 3;   // warpgroups
constexpr int kGroupRows = 64;  // of a consumer
constexpr int kTileRows = kConsumers * kGroupRows;
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kThreads = kConsumerWarps * 32 + 128;
constexpr int kConsumerRegisters = 160;
constexpr int kProducerRegisters = 32;
constexpr int kPanelBytes = 64 * 128;  // 64 rows of 64 values

template <int kDk, int kDv>
struct Shape {
  static constexpr int kKeyBytes = kTileKeys * kDk * 2;
  static constexpr int kSlotBytes = kTileKeys * (kDk + kDv) * 2;
  static constexpr int kGroupQBytes = kGroupRows * kDk * 2;
  static constexpr int kQBytes = kConsumers * kGroupQBytes;
  static constexpr int kQBuffers = kDk <= 128 ? 2 : 1;
  static constexpr int kSlots = kDk == 64 ? 8 : kDk == 128 ? 4 : 3;
  // Slots first, then q, then barriers.
  static constexpr int kQ = kSlots * kSlotBytes;
  static constexpr int kBarriers = kQ + kQBuffers * kQBytes;
  static constexpr int kBytes = kBarriers + 2 * (kSlots + kQBuffers * kConsumers) * 8;
};

// Shared addresses.
template <class Shape>
struct Shared {
  uint32_t base;
  __device__ uint32_t Keys(int slot) const { return base + slot * Shape::kSlotBytes; }
  __device__ uint32_t Values(int slot) const { return Keys(slot) + Shape::kKeyBytes; }
  __device__ uint32_t Q(int buffer, int consumer) const {
    return base + Shape::kQ + buffer * Shape::kQBytes + consumer * Shape::kGroupQBytes;
  }
  // Barriers.
  __device__ uint32_t Full(int slot) const { return base + Shape::kBarriers + slot * 8; }
  __device__ uint32_t Empty(int slot) const { return Full(Shape::kSlots + slot); }
  __device__ uint32_t QFull(int buffer, int consumer) const {
    return Full(2 * Shape::kSlots + buffer * kConsumers + consumer);
  }
  __device__ uint32_t QEmpty(int buffer, int consumer) const {
    return QFull(Shape::kQBuffers + buffer, consumer);
  }
};

template <int kCount>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void Advance() {
    if (++slot == kCount) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// K and V as the copy engine sees them: [rows][heads][dim], boxes of 64 rows of 64 values.
struct TensorMaps {
  CUtensorMap keys[2];  // own, halo
  CUtensorMap values[2];
  int32_t are_set;  // 0: the tensors are not such that they can be
};

// Where in a panel chunk `chunk` of 16 bytes of a row lies.
__device__ __forceinline__ uint32_t InPanel(int row, int chunk) {
  return row * 128 + ((chunk ^ row % 8) << 4);
}

// Where tokens of one document lie, asked for in ascending order as a rule.
class TokenCursor {
 public:
  __device__ explicit TokenCursor(const TokenRows& tokens) : tokens_(tokens) {}

  __device__ void Start(int32_t document) {
    document_ = document;
    begin_ = end_ = -1;
  }

  __device__ TokenPlace Find(int64_t position) {
    if (position < begin_ || position >= end_) {
      place_ = FindPlace(tokens_, document_, position);
      begin_ = position;
      end_ = position + place_.num_tokens;
    }
    const int64_t offset = position - begin_;
    return {place_.row < 0 ? -1 : place_.row + offset, place_.is_halo, place_.num_tokens - offset};
  }

 private:
  const TokenRows& tokens_;
  int32_t document_ = -1;
  TokenPlace place_;
  int64_t begin_ = -1, end_ = -1;  // positions that place_ is known for
};

// The warp that brings keys and values.
template <int kDk, int kDv>
class TileLoader {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ TileLoader(const AttendWindowParams& params, const TensorMaps& maps,
                        const Shared<Sizes>& shared)
      : params_(params), maps_(maps), shared_(shared), keys_(params.k), values_(params.v) {}

  __device__ void Run(const WindowRun& run) {
    keys_.Start(run.document);
    values_.Start(run.document);
    const int64_t end = run.EndKey();
    int64_t key = run.FirstKey(params_.dims.window_tokens) / kTileKeys * kTileKeys;
    for (; key < end; key += kTileKeys) Load(run.kv_head, key);
  }

 private:
  __device__ void Load(int32_t kv_head, int64_t first_key) {
    const TokenPlace k = keys_.Find(first_key), v = values_.Find(first_key);
    const bool in_one_piece = maps_.are_set != 0 && k.row >= 0 && k.num_tokens >= kTileKeys &&
                              v.row >= 0 && v.num_tokens >= kTileKeys;
    const uint32_t full = shared_.Full(place_.slot);
    BarrierWait(shared_.Empty(place_.slot), place_.parity ^ 1);
    if (in_one_piece) {
      if (threadIdx.x % 32 == 0) {
        BarrierArriveExpectBytes(full, Sizes::kSlotBytes);
#pragma unroll
        for (int panel = 0; panel < kDk / 64; ++panel) {
          TensorCopy(shared_.Keys(place_.slot) + panel * kPanelBytes, &maps_.keys[k.is_halo],
                     panel * 64, kv_head, static_cast<int32_t>(k.row), full);
        }
#pragma unroll
        for (int panel = 0; panel < kDv / 64; ++panel) {
          TensorCopy(shared_.Values(place_.slot) + panel * kPanelBytes, &maps_.values[v.is_halo],
                     panel * 64, kv_head, static_cast<int32_t>(v.row), full);
        }
      }
      __syncwarp();  // to a lane two rounds behind, parities would say something else
    } else {
      CopyRows<kDk>(params_.k, keys_, kv_head, first_key, shared_.Keys(place_.slot));
      CopyRows<kDv>(params_.v, values_, kv_head, first_key, shared_.Values(place_.slot));
      CopyAsyncWait<0>();
      FenceProxyAsync();
      __syncwarp();
      if (threadIdx.x % 32 == 0) BarrierArrive(full);
    }
    place_.Advance();
  }

  // Row by row; zeros for tokens that no segment covers.
  template <int kDim>
  __device__ void CopyRows(const TokenRows& tokens, TokenCursor& cursor, int32_t kv_head,
                           int64_t first_key, uint32_t to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = lane / 8; row < kTileKeys; row += 4) {
      const TokenPlace place = cursor.Find(first_key + row);
      const ConstTensor3& tensor = place.is_halo ? tokens.halo : tokens.own;
      const bool covered = place.row >= 0;
      const uint16_t* const from = covered ? static_cast<const uint16_t*>(tensor.data) +
                                                 place.row * tensor.row_stride +
                                                 kv_head * tensor.head_stride + lane % 8 * 8
                                           : static_cast<const uint16_t*>(params_.queries.q.data);
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel) {
        CopyAsync16(to + panel * kPanelBytes + InPanel(row, lane % 8),
                    covered ? from + panel * 64 : from, covered);
      }
    }
  }

  const AttendWindowParams& params_;
  const TensorMaps& maps_;
  const Shared<Sizes> shared_;
  TokenCursor keys_, values_;
  RingPlace<Sizes::kSlots> place_;
};

// A warp that brings q of one consumer.
template <int kDk, int kDv>
class QLoader {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ QLoader(const AttendWindowParams& params, const Shared<Sizes>& shared, int consumer)
      : params_(params), shared_(shared), consumer_(consumer) {}

  __device__ void Run(const WindowRun& run) {
    const int lane = threadIdx.x % 32;
    const ConstTensor3& q = params_.queries.q;
    BarrierWait(shared_.QEmpty(place_.slot, consumer_), place_.parity ^ 1);
    const uint32_t to = shared_.Q(place_.slot, consumer_);
#pragma unroll 2
    for (int i = lane / 8; i < kGroupRows; i += 4) {
      const int row = consumer_ * kGroupRows + i;
      const bool active = run.Holds(row);
      const int some_row = active ? row : run.begin;
      const uint16_t* const from = static_cast<const uint16_t*>(q.data) +
                                   run.Query(some_row) * q.row_stride +
                                   run.Head(some_row) * q.head_stride + lane % 8 * 8;
#pragma unroll
      for (int panel = 0; panel < kDk / 64; ++panel) {
        CopyAsync16(to + panel * kPanelBytes + InPanel(i, lane % 8), from + panel * 64, active);
      }
    }
    CopyAsyncWait<0>();
    FenceProxyAsync();
    __syncwarp();
    if (lane == 0) BarrierArrive(shared_.QFull(place_.slot, consumer_));
    place_.Advance();
  }

 private:
  const AttendWindowParams& params_;
  const Shared<Sizes> shared_;
  const int consumer_;
  RingPlace<Sizes::kQBuffers> place_;
};

// 64 rows of a warpgroup; lane 4g + c of warp w works on rows 16w + g and 16w + g + 8.
template <class T, int kDk, int kDv>
class Consumer {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Consumer(const AttendWindowParams& params, const Shared<Sizes>& shared)
      : params_(params),
        shared_(shared),
        scale_log2_(params.dims.softmax_scale * 1.4426950408889634f) {}

  __device__ void Run(const WindowRun& run) {
    const int32_t window = params_.dims.window_tokens;
    const int group_first = Group() * kGroupRows;
    const int begin = max(group_first, run.begin);
    const int end = min(group_first + kGroupRows, run.end);
    const int first_tile = TileOf(run.FirstKey(window));
    const int end_tile = TileOf(run.EndKey() + kTileKeys - 1);
    BarrierWait(shared_.QFull(q_place_.slot, Group()), q_place_.parity);
    if (begin >= end) {
      ReleaseQ();
      Skip(end_tile - first_tile);
      return;
    }
    // Tiles that some row of this warpgroup sees, and among them those that all rows see whole.
    const int64_t low = run.Position(begin), high = run.Position(end - 1);
    const int begin_seen = TileOf(max(low - window + 1, int64_t{0}));
    const int end_seen = TileOf(high) + 1;
    const int begin_whole =
        min(TileOf(max(high - window + 1, int64_t{0}) + kTileKeys - 1), end_seen);
    const int end_whole = max(TileOf(low + 1), begin_whole);

    const int row = group_first + Warp() % 4 * 16 + Lane() / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows outside the run see what its nearest row sees; nobody reads them.
      last_key_[r] = run.Position(min(max(row + 8 * r, begin), end - 1));
    }

    Skip(begin_seen - first_tile);
    Reset();
    int tile = begin_seen;
    Begin(tile++);
    // Nothing is in flight between the steps, and no step has a branch while something is.
    for (; tile < begin_whole; ++tile) Step<true>(tile);
    for (; tile < end_whole; ++tile) Step<false>(tile);
    for (; tile < end_seen; ++tile) Step<true>(tile);
    ReleaseQ();
    End();
    Skip(end_tile - end_seen);
    Store(run, row);
  }

 private:
  __device__ static int Lane() { return threadIdx.x % 32; }
  __device__ static int Warp() { return threadIdx.x / 32; }
  __device__ static int Group() { return threadIdx.x / 128; }
  __device__ static int TileOf(int64_t key) { return static_cast<int>(key / kTileKeys); }

  __device__ float MaxLog2(float max) const { return fmaxf(max * scale_log2_, -FLT_MAX); }

  __device__ void ReleaseQ() {
    __syncwarp();
    if (Lane() == 0) BarrierArrive(shared_.QEmpty(q_place_.slot, Group()));
    q_place_.Advance();
  }

  // Done with the keys, or with the values, of a slot.
  __device__ void Release(int slot, bool condition = true) {
    __syncwarp();
    if (Lane() == 0 && condition) BarrierArrive(shared_.Empty(slot));
  }

  // Passes over tiles of which this warpgroup sees nothing.
  __device__ void Skip(int num_tiles) {
#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i) {
      BarrierWait(shared_.Full(place_.slot), place_.parity);
      Release(place_.slot);
      Release(place_.slot);
      place_.Advance();
    }
  }

  __device__ void Reset() {
#pragma unroll
    for (float& value : o_) value = 0.0f;
    max_[0] = max_[1] = -FLT_MAX;
    sum_[0] = sum_[1] = 0.0f;
  }

  // s = q k^T of the tile in place_.
  __device__ void StartLogits() {
    const uint64_t q = WgmmaDescriptor(shared_.Q(q_place_.slot, Group()));
    const uint64_t keys = WgmmaDescriptor(shared_.Keys(place_.slot));
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kDk / 16; ++k) {
      const int offset = (k / 4 * kPanelBytes + k % 4 * 32) / 16;
      WgmmaShared<T>(s_, q + offset, keys + offset, k > 0);
    }
    WgmmaCommit();
  }

  // o += p v of the tile in `slot`.
  __device__ void StartOutputs(int slot) {
    const uint64_t values = WgmmaValuesDescriptor(shared_.Values(slot), kPanelBytes);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      WgmmaValues<T>(o_, p_[2 * k][0], p_[2 * k][1], p_[2 * k + 1][0], p_[2 * k + 1][1],
                     values + k * (16 * 128) / 16);
    }
    WgmmaCommit();
  }

  // Hides keys that a row does not see.
  __device__ void Mask(int tile) {
    // Of the first key of this lane: what is left to compare are constants.
    const int64_t first_key = int64_t{tile} * kTileKeys + Lane() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int end = static_cast<int>(min(last_key_[r] + 1 - first_key, int64_t{kTileKeys}));
      const int begin = static_cast<int>(
          max(last_key_[r] - params_.dims.window_tokens + 1 - first_key, int64_t{-kTileKeys}));
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = j * 8 + e;
          float& value = s_[4 * j + 2 * r + e];
          value = key < begin || key >= end ? -INFINITY : value;
        }
      }
    }
  }

  // s = exp(s - max); factor is what the sums so far shrink by. True when a maximum has moved.
  __device__ bool Exponentials(float (&factor)[2]) {
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float row_max = max_[r];
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
        row_max = fmaxf(row_max, fmaxf(s_[4 * j + 2 * r], s_[4 * j + 2 * r + 1]));
      }
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 2));
      const float max_log2 = MaxLog2(row_max);
      factor[r] = Exp2(MaxLog2(max_[r]) - max_log2);
      changed |= row_max != max_[r];
      max_[r] = row_max;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = s_[4 * j + 2 * r + e];
          value = Exp2(fmaf(value, scale_log2_, -max_log2));
          sum += value;
        }
      }
      sum_[r] = fmaf(sum_[r], factor[r], sum);
    }
    return changed;
  }

  __device__ void PackP() {
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) p_[j][r] = Pack2<T>(s_[4 * j + 2 * r], s_[4 * j + 2 * r + 1]);
    }
  }

  // The first tile: its outputs are started by the next step.
  __device__ void Begin(int tile) {
    BarrierWait(shared_.Full(place_.slot), place_.parity);
    StartLogits();
    WgmmaWait<0>();
    WgmmaTouch(s_);
    Release(place_.slot);
    Mask(tile);
    float factor[2];
    Exponentials(factor);
    PackP();
    previous_slot_ = place_.slot;
    place_.Advance();
  }

  template <bool kMasked>
  __device__ void Step(int tile) {
    BarrierWait(shared_.Full(place_.slot), place_.parity);
    StartLogits();
    StartOutputs(previous_slot_);
    WgmmaWait<1>();
    WgmmaTouch(s_);
    if constexpr (kMasked) Mask(tile);
    float factor[2];
    const bool changed = Exponentials(factor);
    // A condition that always holds: barriers and waits are kept in order, and so the exponentials
    // are not moved behind the wait.
    Release(place_.slot, sum_[0] != -1.0f && sum_[1] != -1.0f);
    WgmmaWait<0>();
    WgmmaTouch(o_);
    Release(previous_slot_);
    PackP();
    // To multiply by one changes nothing.
    if (__any_sync(kFullWarp, changed)) {
#pragma unroll
      for (int i = 0; i < kDv / 2; ++i) o_[i] *= factor[i / 2 % 2];
    }
    previous_slot_ = place_.slot;
    place_.Advance();
  }

  __device__ void End() {
    StartOutputs(previous_slot_);
    WgmmaWait<0>();
    WgmmaTouch(o_);
    Release(previous_slot_);
  }

  __device__ void Store(const WindowRun& run, int first_row) {
    const int c = Lane() % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      float sum = sum_[r];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const float inverse = __fdividef(1.0f, sum);  // a row sees its own key at least
      const int64_t query = run.Query(row), head = run.Head(row);
      uint16_t* const to = static_cast<uint16_t*>(params_.o_win.data) +
                           query * params_.o_win.row_stride + head * params_.o_win.head_stride;
      const bool active = run.Holds(row);
#pragma unroll
      for (int j = 0; j < kDv / 8; j += 4) {
        // Lane c has values 2c and 2c + 1 of each 8; it gets all of the 8 that are number j + c.
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // + 0 makes a zero positive, whatever tiles of zeros were added to it.
          words[i] = Pack2<T>(fmaf(o_[4 * (j + i) + 2 * r], inverse, 0.0f),
                              fmaf(o_[4 * (j + i) + 2 * r + 1], inverse, 0.0f));
        }
        TransposeQuad(words);
        if (active) {
          *reinterpret_cast<uint4*>(to + (j + c) * 8) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
      if (params_.lse_win != nullptr && active && c == 0) {
        params_.lse_win[query * params_.dims.num_q_heads + head] =
            (MaxLog2(max_[r]) + Log2(sum)) * 0.6931471805599453f;
      }
    }
  }

  // words[i] of lane c becomes words[c] of lane i, among the four lanes of a quad.
  __device__ static void TransposeQuad(uint32_t (&words)[4]) {
    const int c = Lane() % 4;
    Exchange(words[0], words[1], c % 2 != 0, 1);
    Exchange(words[2], words[3], c % 2 != 0, 1);
    Exchange(words[0], words[2], c >= 2, 2);
    Exchange(words[1], words[3], c >= 2, 2);
  }

  // A lane gives its `low` if it is `upper`, else its `high`, and gets what the other gives.
  __device__ static void Exchange(uint32_t& low, uint32_t& high, bool upper, int distance) {
    const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? low : high, distance);
    low = upper ? got : low;
    high = upper ? high : got;
  }

  const AttendWindowParams& params_;
  const Shared<Sizes> shared_;
  const float scale_log2_;
  RingPlace<Sizes::kSlots> place_;
  RingPlace<Sizes::kQBuffers> q_place_;
  int previous_slot_ = 0;
  float s_[kTileKeys / 2];
  uint32_t p_[kTileKeys / 8][2];
  float o_[kDv / 2];
  float max_[2], sum_[2];
  int64_t last_key_[2];
};

// Grid: one CTA per SM; CTA i owns tiles i, i + gridDim, ... of rows, one kv head after another.
template <class T, int kDk, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
    AttendWindowKernel(const __grid_constant__ AttendWindowParams params,
                       const __grid_constant__ TensorMaps maps) {
  using Sizes = Shape<kDk, kDv>;
  extern __shared__ __align__(1024) char memory[];
  const Shared<Sizes> shared{SharedAddress(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Sizes::kSlots; ++i) {
      BarrierInit(shared.Full(i), 1);
      BarrierInit(shared.Empty(i), 2 * kConsumerWarps);  // once for keys, once for values
    }
    for (int buffer = 0; buffer < Sizes::kQBuffers; ++buffer) {
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        BarrierInit(shared.QFull(buffer, consumer), 1);
        BarrierInit(shared.QEmpty(buffer, consumer), 4);
      }
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int64_t num_tiles = NumWindowTiles<kTileRows>(params);
  const auto for_each_run = [&](auto& role) {
    for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
      ForEachRun<kTileRows>(params, tile, [&](const WindowRun& run) { role.Run(run); });
    }
  };
  const int warp = threadIdx.x / 32;
  if (warp >= kConsumerWarps) {
    LowerRegisters<kProducerRegisters>();
    if (warp == kConsumerWarps) {
      TileLoader<kDk, kDv> loader(params, maps, shared);
      for_each_run(loader);
    } else {
      QLoader<kDk, kDv> loader(params, shared, warp - kConsumerWarps - 1);
      for_each_run(loader);
    }
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consumer<T, kDk, kDv> consumer(params, shared);
    for_each_run(consumer);
  }
}

TensorMaps MakeTensorMaps(const AttendWindowParams& params) {
  TensorMaps maps{};
  const EncodeTensorMap encode = FindEncodeTensorMap();
  const AttentionDims& dims = params.dims;
  // The number of rows is not known; boxes are asked for only where all of their rows are tokens.
  const auto make = [&](const ConstTensor3& tensor, int32_t head_dim, CUtensorMap* map) {
    return tensor.data == nullptr ||  // never used
           MakeTensorMap(encode,
                         {dims.dtype, tensor.data, int64_t{1} << 31, dims.num_kv_heads, head_dim,
                          tensor.row_stride, tensor.head_stride, 1, kTileKeys},
                         map);
  };
  maps.are_set = encode != nullptr && make(params.k.own, dims.head_dim_qk, &maps.keys[0]) &&
                 make(params.k.halo, dims.head_dim_qk, &maps.keys[1]) &&
                 make(params.v.own, dims.head_dim_v, &maps.values[0]) &&
                 make(params.v.halo, dims.head_dim_v, &maps.values[1]);
  return maps;
}

template <class T, int kDk, int kDv>
cudaError_t LaunchShape(const AttendWindowParams& params, const Device& device,
                        cudaStream_t stream) {
  constexpr int kBytes = Shape<kDk, kDv>::kBytes;
  const auto kernel = AttendWindowKernel<T, kDk, kDv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<device.num_sms, kThreads, kBytes, stream>>>(params, MakeTensorMaps(params));
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const AttendWindowParams& params, const Device& device, cudaStream_t stream) {
  switch (params.dims.head_dim_qk) {
    case 64:
      return LaunchShape<T, 64, 64>(params, device, stream);
    case 128:
      return LaunchShape<T, 128, 128>(params, device, stream);
    default:
      return LaunchShape<T, 192, 128>(params, device, stream);
  }
}

}  // namespace

bool HasFastAttendWindow(const AttentionDims& dims) {
  const int32_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  return (dk == 64 && dv == 64) || (dk == 128 && dv == 128) || (dk == 192 && dv == 128);
}

cudaError_t LaunchAttendWindowFast(const AttendWindowParams& params, const Device& device,
                                   cudaStream_t stream) {
  if (params.queries.num_tokens == 0) return cudaSuccess;
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, device, stream)
                                           : Launch<__half>(params, device, stream);
}

}  // namespace nsa::kernels::cuda
