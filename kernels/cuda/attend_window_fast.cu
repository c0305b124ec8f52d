// Sliding-window attention on Hopper's tensor cores, for the shapes that performance is about.
//
// A tile of rows is worked on by two consumer warpgroups of 64 rows each, while a third warpgroup
// copies tiles of 64 keys and values into a ring, row by row, from wherever their segments lie.
// While a consumer takes the exponentials of a tile, the tensor cores multiply the one before with
// its values.
#include <cfloat>
#include <cstdint>

#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_values.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kTileKeys = 64;
constexpr int kGroupRows = 64;  // of a warpgroup
constexpr int kConsumerWarps = 8;
constexpr int kProducerThreads = 128;
constexpr int kThreads = kConsumerWarps * 32 + kProducerThreads;
constexpr int kConsumerRegisters = 224;
constexpr int kProducerRegisters = 56;
constexpr int kPanelBytes = 64 * 128;  // 64 rows of 64 values
static_assert(kWindowTileRows == 2 * kGroupRows);

template <int kDk, int kDv>
struct Shape {
  static constexpr int kKeyBytes = kTileKeys * kDk * 2;
  static constexpr int kSlotBytes = kTileKeys * (kDk + kDv) * 2;
  static constexpr int kQBytes = kWindowTileRows * kDk * 2;
  static constexpr int kSlots = kDk == 64 ? 8 : kDk == 128 ? 6 : 4;
  static constexpr int kBarriers = kQBytes + kSlots * kSlotBytes;  // q first, then the slots
  static constexpr int kBytes = kBarriers + (2 * kSlots + 2) * 8;
};

// Shared addresses of the barriers.
template <class Shape>
struct Barriers {
  uint32_t base;
  __device__ uint32_t Full(int slot) const { return base + slot * 8; }
  __device__ uint32_t Empty(int slot) const { return base + (Shape::kSlots + slot) * 8; }
  __device__ uint32_t QFull() const { return base + 2 * Shape::kSlots * 8; }
  __device__ uint32_t QEmpty() const { return QFull() + 8; }
};

template <class Shape>
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  __device__ void Advance() {
    if (++slot == Shape::kSlots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Rows of tokens of one document and kv head, asked for in ascending order as a rule.
class TokenCursor {
 public:
  __device__ TokenCursor(const TokenRows& tokens) : tokens_(tokens) {}

  __device__ void Start(int32_t document, int32_t kv_head) {
    document_ = document;
    kv_head_ = kv_head;
    begin_ = end_ = -1;
  }

  // Null for a token that no segment covers.
  __device__ const char* Find(int64_t position) {
    if (position < begin_ || position >= end_) Search(position);
    return run_.rows == nullptr ? nullptr : run_.rows + (position - begin_) * run_.row_bytes;
  }

  // Null unless `count` tokens lie in consecutive rows.
  __device__ const char* FindAll(int64_t position, int count) {
    const char* const rows = Find(position);
    return position + count <= end_ ? rows : nullptr;
  }

  __device__ int64_t row_bytes() const { return run_.row_bytes; }

 private:
  __device__ __noinline__ void Search(int64_t position) {
    run_ = FindTokens(tokens_, 2, document_, position, kv_head_);
    begin_ = position;
    end_ = position + run_.num_tokens;
  }

  const TokenRows& tokens_;
  int32_t document_ = -1, kv_head_ = 0;
  TokenRun run_;
  int64_t begin_ = -1, end_ = -1;  // positions that run_ is known for
};

// A thread of the producing warpgroup. Copies complete out of sight of the barriers, so a thread
// reports them later: when it has started two more, or when it is about to wait.
template <class Shape>
class Producer {
 public:
  __device__ Producer(const AttendWindowParams& params, uint32_t shared,
                      const Barriers<Shape>& barriers)
      : params_(params), shared_(shared), barriers_(barriers), keys_(params.k), values_(params.v) {}

  template <int kDk>
  __device__ void LoadQ(const WindowRun& run) {
    WaitUntilFree(barriers_.QEmpty(), q_parity_ ^ 1);
    const ConstTensor3& q = params_.queries.q;
#pragma unroll 1
    for (int row = FirstRow(); row < kWindowTileRows; row += kRowsAtOnce) {
      const bool active = run.Holds(row);
      const int some_row = active ? row : run.begin;
      const uint16_t* const from = static_cast<const uint16_t*>(q.data) +
                                   run.Query(some_row) * q.row_stride +
                                   run.Head(some_row) * q.head_stride + Chunk() * 8;
      const uint32_t to =
          shared_ + row / kGroupRows * (kGroupRows * kDk * 2) + row % kGroupRows * 128 + Swizzled();
#pragma unroll
      for (int panel = 0; panel < kDk / 64; ++panel) {
        CopyAsync16(to + panel * kPanelBytes, from + panel * 64, active);
      }
    }
    q_parity_ ^= 1;
    Started(barriers_.QFull());
  }

  __device__ void StartRun(const WindowRun& run) {
    keys_.Start(run.document, run.kv_head);
    values_.Start(run.document, run.kv_head);
  }

  template <int kDk, int kDv>
  __device__ void LoadTile(int64_t first_key) {
    WaitUntilFree(barriers_.Empty(place_.slot), place_.parity ^ 1);
    const uint32_t slot = shared_ + Shape::kQBytes + place_.slot * Shape::kSlotBytes;
    LoadRows<kDk>(keys_, first_key, slot);
    LoadRows<kDv>(values_, first_key, slot + Shape::kKeyBytes);
    Started(barriers_.Full(place_.slot));
    place_.Advance();
  }

  __device__ void Finish() {
    CopyAsyncWait<0>();
    if (older_ != 0) Report(older_);
    if (newer_ != 0) Report(newer_);
    older_ = newer_ = 0;
  }

 private:
  // A thread copies 16 bytes of every kRowsAtOnce-th row of a panel, always at the same place.
  static constexpr int kRowsAtOnce = kProducerThreads / 8;
  __device__ static int FirstRow() { return (threadIdx.x - kConsumerWarps * 32) / 8; }
  __device__ static int Chunk() { return threadIdx.x % 8; }
  __device__ static uint32_t Swizzled() { return (Chunk() ^ FirstRow() % 8) << 4; }

  template <int kDim>
  __device__ void LoadRows(TokenCursor& cursor, int64_t first_key, uint32_t to) const {
    to += FirstRow() * 128 + Swizzled();
    const char* rows = cursor.FindAll(first_key, kTileKeys);
    if (rows != nullptr) {
      const int64_t step = kRowsAtOnce * cursor.row_bytes();
      rows += FirstRow() * cursor.row_bytes() + Chunk() * 16;
#pragma unroll
      for (int row = 0; row < kTileKeys; row += kRowsAtOnce, rows += step) {
#pragma unroll
        for (int panel = 0; panel < kDim / 64; ++panel) {
          CopyAsync16(to + panel * kPanelBytes + row * 128, rows + panel * 128, true);
        }
      }
      return;
    }
#pragma unroll 1
    for (int row = 0; row < kTileKeys; row += kRowsAtOnce) {
      const char* const found = cursor.Find(first_key + row + FirstRow());
      const void* const from = found == nullptr ? params_.queries.q.data : found + Chunk() * 16;
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel) {
        const int64_t offset = found == nullptr ? 0 : panel * 128;
        CopyAsync16(to + panel * kPanelBytes + row * 128, static_cast<const char*>(from) + offset,
                    found != nullptr);
      }
    }
  }

  __device__ void Started(uint32_t barrier) {
    CopyAsyncCommit();
    if (older_ != 0) {
      CopyAsyncWait<2>();
      Report(older_);
    }
    older_ = newer_;
    newer_ = barrier;
  }

  // The copies of a barrier are complete.
  __device__ static void Report(uint32_t barrier) {
    FenceProxyAsync();
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(barrier);
  }

  __device__ void WaitUntilFree(uint32_t barrier, uint32_t parity) {
    if (BarrierTest(barrier, parity)) return;
    Finish();  // who is to free it may wait for these
    BarrierWait(barrier, parity);
  }

  const AttendWindowParams& params_;
  const uint32_t shared_;
  const Barriers<Shape> barriers_;
  TokenCursor keys_, values_;
  RingPlace<Shape> place_;
  uint32_t q_parity_ = 0;
  uint32_t older_ = 0, newer_ = 0;  // barriers of copies that are not reported
};

// 64 rows of a warpgroup; lane 4g + c of warp w works on rows 16w + g and 16w + g + 8.
template <class T, int kDk, int kDv>
class Consumer {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Consumer(const AttendWindowParams& params, uint32_t shared,
                      const Barriers<Sizes>& barriers)
      : params_(params),
        shared_(shared),
        barriers_(barriers),
        scale_log2_(params.dims.softmax_scale * 1.4426950408889634f) {}

  __device__ void Run(const WindowRun& run) {
    const int32_t window = params_.dims.window_tokens;
    const int group_first = Group() * kGroupRows;
    const int begin = max(group_first, run.begin);
    const int end = min(group_first + kGroupRows, run.end);
    LoadQ();
    const int64_t first_tile = run.FirstKey(window) / kTileKeys;
    const int64_t end_tile = (run.EndKey() + kTileKeys - 1) / kTileKeys;
    if (begin >= end) {
      Skip(end_tile - first_tile);
      return;
    }
    // Tiles that some row of this warpgroup sees, and among them those that all rows see whole.
    const int64_t low = run.Position(begin), high = run.Position(end - 1);
    const int64_t begin_seen = max(low - window + 1, int64_t{0}) / kTileKeys;
    const int64_t end_seen = high / kTileKeys + 1;
    const int64_t begin_whole =
        min((max(high - window + 1, int64_t{0}) + kTileKeys - 1) / kTileKeys, end_seen);
    const int64_t end_whole = max((low + 1) / kTileKeys, begin_whole);

    const int row = group_first + Warp() % 4 * 16 + Lane() / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows outside the run see what its nearest row sees; nobody reads them.
      last_key_[r] = run.Position(min(max(row + 8 * r, begin), end - 1));
    }

    Skip(begin_seen - first_tile);
    Reset();
    int64_t tile = begin_seen;
    Begin(tile++);
    // Nothing is in flight between the steps, and no step has a branch while something is.
    for (; tile < begin_whole; ++tile) Step<true>(tile);
    for (; tile < end_whole; ++tile) Step<false>(tile);
    for (; tile < end_seen; ++tile) Step<true>(tile);
    End();
    Skip(end_tile - end_seen);
    Store(run, row);
  }

 private:
  __device__ static int Lane() { return threadIdx.x % 32; }
  __device__ static int Warp() { return threadIdx.x / 32; }
  __device__ static int Group() { return threadIdx.x / 128; }

  __device__ float MaxLog2(float max) const { return fmaxf(max * scale_log2_, -FLT_MAX); }

  __device__ void LoadQ() {
    BarrierWait(barriers_.QFull(), q_parity_);
    q_parity_ ^= 1;
    const uint32_t group = shared_ + Group() * (kGroupRows * kDk * 2);
    const int row = Warp() % 4 * 16 + Lane() % 16;
#pragma unroll
    for (int k = 0; k < kDk / 16; ++k) {
      const int chunk = 2 * k + Lane() / 16;
      LoadMatrices(q_[k],
                   group + chunk / 8 * kPanelBytes + row * 128 + ((chunk % 8 ^ row % 8) << 4));
    }
    __syncwarp();
    if (Lane() == 0) BarrierArrive(barriers_.QEmpty());
  }

  // Done with the keys, or with the values, of a slot.
  __device__ void Release(int slot, bool condition = true) {
    __syncwarp();
    if (Lane() == 0 && condition) BarrierArrive(barriers_.Empty(slot));
  }

  // Passes over tiles of which this warpgroup sees nothing.
  __device__ void Skip(int64_t num_tiles) {
    for (int64_t i = 0; i < num_tiles; ++i) {
      BarrierWait(barriers_.Full(place_.slot), place_.parity);
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

  __device__ uint32_t Slot(int slot) const {
    return shared_ + Sizes::kQBytes + slot * Sizes::kSlotBytes;
  }

  // s = q k^T of the tile in place_.
  __device__ void StartLogits() {
#pragma unroll
    for (float& value : s_) value = 0.0f;
    const uint64_t keys = WgmmaDescriptor(Slot(place_.slot));
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kDk / 16; ++k) {
      WgmmaRegisters<T>(s_, q_[k][0], q_[k][1], q_[k][2], q_[k][3],
                        keys + (k / 4 * kPanelBytes + k % 4 * 32) / 16);
    }
    WgmmaCommit();
  }

  // o += p v of the tile in `slot`.
  __device__ void StartOutputs(int slot) {
    const uint64_t values = WgmmaValuesDescriptor(Slot(slot) + Sizes::kKeyBytes, kPanelBytes);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      WgmmaValues<T>(o_, p_[2 * k][0], p_[2 * k][1], p_[2 * k + 1][0], p_[2 * k + 1][1],
                     values + k * (16 * 128) / 16);
    }
    WgmmaCommit();
  }

  // Hides keys that a row does not see.
  __device__ void Mask(int64_t tile) {
    const int64_t first_key = tile * kTileKeys;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int end = static_cast<int>(min(last_key_[r] + 1 - first_key, int64_t{kTileKeys}));
      const int begin = static_cast<int>(
          max(last_key_[r] - params_.dims.window_tokens + 1 - first_key, int64_t{0}));
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = j * 8 + Lane() % 4 * 2 + e;
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
  __device__ void Begin(int64_t tile) {
    BarrierWait(barriers_.Full(place_.slot), place_.parity);
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
  __device__ void Step(int64_t tile) {
    BarrierWait(barriers_.Full(place_.slot), place_.parity);
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
  const uint32_t shared_;
  const Barriers<Sizes> barriers_;
  const float scale_log2_;
  RingPlace<Sizes> place_;
  int previous_slot_ = 0;
  uint32_t q_parity_ = 0;
  uint32_t q_[kDk / 16][4];
  float s_[kTileKeys / 2];
  uint32_t p_[kTileKeys / 8][2];
  float o_[kDv / 2];
  float max_[2], sum_[2];
  int64_t last_key_[2];
};

// Grid: one CTA per SM; CTA i owns tiles i, i + gridDim, ... of rows, one kv head after another.
template <class T, int kDk, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
    AttendWindowKernel(const __grid_constant__ AttendWindowParams params) {
  using Sizes = Shape<kDk, kDv>;
  extern __shared__ __align__(1024) char memory[];
  const uint32_t shared = SharedAddress(memory);
  const Barriers<Sizes> barriers{shared + Sizes::kBarriers};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Sizes::kSlots; ++i) {
      BarrierInit(barriers.Full(i), kProducerThreads / 32);
      BarrierInit(barriers.Empty(i), 2 * kConsumerWarps);  // once for keys, once for values
    }
    BarrierInit(barriers.QFull(), kProducerThreads / 32);
    BarrierInit(barriers.QEmpty(), kConsumerWarps);
  }
  __syncthreads();
  const int64_t num_tiles = NumWindowTiles(params);
  if (threadIdx.x >= kConsumerWarps * 32) {
    LowerRegisters<kProducerRegisters>();
    Producer<Sizes> producer(params, shared, barriers);
    for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
      ForEachRun(params, tile, [&](const WindowRun& run) {
        producer.template LoadQ<kDk>(run);
        producer.StartRun(run);
        int64_t key = run.FirstKey(params.dims.window_tokens) / kTileKeys * kTileKeys;
        for (; key < run.EndKey(); key += kTileKeys) producer.template LoadTile<kDk, kDv>(key);
      });
    }
    producer.Finish();
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consumer<T, kDk, kDv> consumer(params, shared, barriers);
    for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
      ForEachRun(params, tile, [&](const WindowRun& run) { consumer.Run(run); });
    }
  }
}

template <class T, int kDk, int kDv>
cudaError_t LaunchShape(const AttendWindowParams& params, const Device& device,
                        cudaStream_t stream) {
  constexpr int kBytes = Shape<kDk, kDv>::kBytes;
  const auto kernel = AttendWindowKernel<T, kDk, kDv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<device.num_sms, kThreads, kBytes, stream>>>(params);
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
