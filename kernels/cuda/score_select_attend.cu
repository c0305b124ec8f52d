// Attention over summaries on tensor cores: o_cmp and lse.
//
// Grid: one CTA of 2 consumer warpgroups and a producer for each SM. An item is 128 rows, row
// q * G + h being head h of the group and query q of up to 128 / G queries in a row; a warpgroup
// owns 64 of them and walks the document's tiles of 128 summaries from the first on. While it takes
// the exponentials of a tile, the tensor cores multiply the one before with its values; the tile
// before an item's first is the last one of the item before.
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_work.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kWarpgroups = kAttendRows / 64;
constexpr int kConsumerWarps = kWarpgroups * 4;
constexpr int kThreads = kConsumerWarps * 32 + 128;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Where running maxima start: below every logit, but such that -inf minus it is not a NaN.
constexpr float kLowest = -1e30f;

struct AttendArgs {
  AttentionDims dims;
  WorkList list;
  QueryRows rows;
  const char* keys;    // tiles
  const char* values;  // tiles
  int64_t num_tiles;   // of a kv head
  Tensor3 o;
  float* lse;
  float scale_log2;
};

template <int kDk, int kDv>
struct Shape {
  static constexpr int kQueryBytes = 64 * kDk * 2;  // of a warpgroup
  static constexpr int kKeyBytes = kTileSummaries * kDk * 2;
  static constexpr int kValueBytes = kTileSummaries * kDv * 2;
  static constexpr int kSlots = kDk == 64 ? 5 : kDk == 128 ? 3 : 2;
  static constexpr int kKeys = kWarpgroups * kQueryBytes;
  static constexpr int kValues = kKeys + kSlots * kKeyBytes;
  static constexpr int kKeyBarriers = kValues + kSlots * kValueBytes;
  static constexpr int kValueBarriers = kKeyBarriers + RingBarriers<kSlots>::kBytes;
  static constexpr int kBytes = kValueBarriers + RingBarriers<kSlots>::kBytes;
  // Of a thread: 2 * consumer + producer is what the block is given, 3 * 168.
  static constexpr int kConsumerRegisters = kDk == 192 ? 240 : 232;
  static constexpr int kProducerRegisters = 504 - 2 * kConsumerRegisters;
};

// s [64,128] = rows of q * keys^T
template <class T, int kDk>
__device__ __forceinline__ void StartLogits(float (&s)[64], uint32_t q_address,
                                            uint32_t key_address) {
  const uint64_t q = WgmmaDescriptor(q_address), keys = WgmmaDescriptor(key_address);
#pragma unroll
  for (int k = 0; k < kDk / 16; ++k) {
    WgmmaShared<T>(s, q + (k / 4) * (8192 >> 4) + (k % 4) * 2,
                   keys + (k / 4) * (kTileSummaries * 128 >> 4) + (k % 4) * 2, k > 0);
  }
}

// o [64,Dv] += p * values
template <class T, int kDv>
__device__ __forceinline__ void StartOutput(float (&o)[kDv / 2], const uint32_t (&p)[32],
                                            uint32_t value_address) {
  const uint64_t values = WgmmaDescriptor(value_address);
#pragma unroll
  for (int k = 0; k < kTileSummaries / 16; ++k) {
    WgmmaRegisters<T>(o, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3],
                      values + (k / 4) * (kDv * 128 >> 4) + (k % 4) * 2);
  }
}

// Of the two rows of a thread.
struct Rows {
  float max[2];
  float sum[2];      // of this thread's columns
  float rescale[2];  // of what was summed before this tile
};

// Of row i the thread sees its first `limit[i]` columns.
__device__ __forceinline__ void Mask(float (&s)[64], int32_t limit0, int32_t limit1) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (2 * j + e >= limit0) s[4 * j + e] = -INFINITY;
      if (2 * j + e >= limit1) s[4 * j + 2 + e] = -INFINITY;
    }
  }
}

// s becomes exp2(scale * s - max).
__device__ __forceinline__ void Softmax(float (&s)[64], Rows& rows, float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float max[4] = {rows.max[r], s[2 * r], s[2 * r + 1], s[4 + 2 * r]};
#pragma unroll
    for (int j = 1; j < 16; ++j) {
      max[(2 * j) % 4] = fmaxf(max[(2 * j) % 4], s[4 * j + 2 * r]);
      max[(2 * j + 1) % 4] = fmaxf(max[(2 * j + 1) % 4], s[4 * j + 2 * r + 1]);
    }
    float m = fmaxf(fmaxf(max[0], max[1]), fmaxf(max[2], max[3]));
    m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, 1));
    m = fmaxf(m, __shfl_xor_sync(kFullWarp, m, 2));
    rows.rescale[r] = Exp2(__fmul_rn(__fsub_rn(rows.max[r], m), scale_log2));
    rows.max[r] = m;
    const float shift = __fmul_rn(m, -scale_log2);
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int j = 0; j < 16; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& value = s[4 * j + 2 * r + e];
        value = Exp2(__fmaf_rn(value, scale_log2, shift));
        sum[e] = __fadd_rn(sum[e], value);
      }
    }
    rows.sum[r] = __fmaf_rn(rows.sum[r], rows.rescale[r], __fadd_rn(sum[0], sum[1]));
  }
}

// Accumulators as an operand in registers.
template <class T>
__device__ __forceinline__ void PackProbabilities(const float (&s)[64], uint32_t (&p)[32]) {
#pragma unroll
  for (int i = 0; i < 32; ++i) p[i] = Pack2<T>(s[2 * i], s[2 * i + 1]);
}

template <int kDv>
__device__ __forceinline__ void Rescale(float (&o)[kDv / 2], const Rows& rows) {
  const bool changes = rows.rescale[0] != 1.0f || rows.rescale[1] != 1.0f;
  if (!__any_sync(kFullWarp, changes)) return;
#pragma unroll
  for (int i = 0; i < kDv / 2; ++i) o[i] = __fmul_rn(o[i], rows.rescale[i / 2 % 2]);
}

template <class T, int kDk, int kDv>
class Consumer {
 public:
  using S = Shape<kDk, kDv>;

  __device__ __forceinline__ Consumer(const AttendArgs& args, const WorkRing& works,
                                      uint32_t shared)
      : args_(args),
        works_(works),
        shared_(shared),
        key_barriers_(shared + S::kKeyBarriers),
        value_barriers_(shared + S::kValueBarriers) {}

  __device__ __forceinline__ void Run() {
    works_.Wait(place_);
    StartQueriesOf(place_);
    for (;;) {
      CompleteEmpty();
      if (Uniform(works_.At(place_).kv_head) < 0) return;
      float o[kDv / 2];
      uint32_t p[32];
      BeginFirst(p);
      Clear(o);
      for (;;) {
        for (tile_ = 1; tile_ < num_tiles_; ++tile_) Step<false>(o, p);
        previous_ = place_;
        place_.Advance();
        if (Uniform(works_.At(place_).num_tiles) == 0) break;
        Step<true>(o, p);
      }
      CompleteLast(o, p);
    }
  }

 private:
  __device__ __forceinline__ uint32_t Query() const {
    return shared_ + warpgroup_ * S::kQueryBytes;
  }
  __device__ __forceinline__ uint32_t Keys() const {
    return shared_ + S::kKeys + keys_.slot * S::kKeyBytes;
  }
  __device__ __forceinline__ uint32_t Values() const {
    return shared_ + S::kValues + values_.slot * S::kValueBytes;
  }
  static __device__ __forceinline__ void Clear(float (&o)[kDv / 2]) {
#pragma unroll
    for (int i = 0; i < kDv / 2; ++i) o[i] = 0.0f;
  }

  __device__ __forceinline__ void StartQueriesOf(const WorkRing::Place& place) {
    const Work& work = works_.At(place);
    if (Uniform(work.num_tiles) > 0) {
      StartQueries<kDk>(args_.rows, work, 64 * warpgroup_, Query());
    }
  }
  // When nobody reads q of the current item any more.
  __device__ __forceinline__ void StartNextQueries() {
    WorkRing::Place next = place_;
    next.Advance();
    works_.Wait(next);
    SyncWarpgroup(warpgroup_);
    StartQueriesOf(next);
  }

  // Items that see no tile, up to one that does or the end.
  __device__ __forceinline__ void CompleteEmpty() {
    while (Uniform(works_.At(place_).kv_head) >= 0 && Uniform(works_.At(place_).num_tiles) == 0) {
      const Rows nothing{{kLowest, kLowest}, {0.0f, 0.0f}, {1.0f, 1.0f}};
      const float zeros[kDv / 2] = {};
      Store(works_.At(place_), nothing, zeros);
      StartNextQueries();
      works_.Release(place_);
      place_.Advance();
    }
  }

  // The item before one that sees no tile, or before the end.
  __device__ __forceinline__ void CompleteLast(float (&o)[kDv / 2], const uint32_t (&p)[32]) {
    value_barriers_.WaitFull(values_);
    WgmmaFence();
    StartOutput<T, kDv>(o, p, Uniform(Values()));
    WgmmaCommit();
    WgmmaWait<0>();
    WgmmaTouch(o);
    ReleaseValues();
    Store(works_.At(previous_), rows_, o);
    works_.Release(previous_);
  }

  // Makes place_ the item that is worked on.
  __device__ __forceinline__ void BeginItem() {
    const Work& work = works_.At(place_);
    rows_ = {{kLowest, kLowest}, {0.0f, 0.0f}, {1.0f, 1.0f}};
    tile_ = 0;
    num_tiles_ = Uniform(work.num_tiles);
    num_full_tiles_ = Uniform(work.num_full_tiles);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      visible_[r] = NumVisible(args_.dims, work.position + QueryOf(RowOf(r))) - 32 * (lane_ % 4);
    }
    FinishQueries(warpgroup_);
  }

  // The first tile of an item with none before.
  __device__ __forceinline__ void BeginFirst(uint32_t (&p)[32]) {
    float s[64];
    BeginItem();
    key_barriers_.WaitFull(keys_);
    WgmmaFence();
    StartLogits<T, kDk>(s, Uniform(Query()), Uniform(Keys()));
    WgmmaCommit();
    WgmmaWait<0>();
    WgmmaTouch(s);
    TakeExponentials(s);
    PackProbabilities<T>(s, p);
  }

  // Logits and exponentials of a tile, while the tile before is multiplied with its values. That
  // one is the last of the item before when this is the first of an item.
  template <bool kFirst>
  __device__ __forceinline__ void Step(float (&o)[kDv / 2], uint32_t (&p)[32]) {
    float s[64];
    Rows previous_rows;
    if constexpr (kFirst) {
      previous_rows = rows_;
      BeginItem();
    }
    const uint32_t q = Uniform(Query()), keys = Uniform(Keys()), values = Uniform(Values());
    key_barriers_.WaitFull(keys_);
    value_barriers_.WaitFull(values_);
    WgmmaFence();
    StartLogits<T, kDk>(s, q, keys);
    WgmmaCommit();
    StartOutput<T, kDv>(o, p, values);
    WgmmaCommit();
    WgmmaWait<1>();
    WgmmaTouch(s);
    TakeExponentials(s);
    WgmmaWait<0>();
    WgmmaTouch(o);
    ReleaseValues();
    if constexpr (kFirst) {
      Store(works_.At(previous_), previous_rows, o);
      works_.Release(previous_);
      Clear(o);
    } else {
      Rescale<kDv>(o, rows_);
    }
    PackProbabilities<T>(s, p);
  }

  __device__ __forceinline__ void TakeExponentials(float (&s)[64]) {
    if (tile_ == num_tiles_ - 1) StartNextQueries();
    if (tile_ >= num_full_tiles_) {
      const int32_t before = tile_ * kTileSummaries;
      Mask(s, visible_[0] - before, visible_[1] - before);
    }
    Softmax(s, rows_, args_.scale_log2);
    // A condition that always holds: the assembler keeps barriers and waits in order, and so cannot
    // move the exponentials behind the next wait.
    const bool done = rows_.sum[0] != -1.0f && rows_.sum[1] != -1.0f;
    if (lane_ == 0 && done) BarrierArrive(key_barriers_.Empty(keys_.slot));
    keys_.Advance();
  }

  __device__ __forceinline__ void ReleaseValues() {
    if (lane_ == 0) BarrierArrive(value_barriers_.Empty(values_.slot));
    values_.Advance();
  }

  __device__ __forceinline__ int32_t RowOf(int r) const {
    return 64 * warpgroup_ + 16 * (warp_ % 4) + lane_ / 4 + 8 * r;
  }
  __device__ __forceinline__ int32_t QueryOf(int32_t row) const {
    return static_cast<int32_t>(row * args_.rows.query_of_row >> 16);
  }

  __device__ __forceinline__ void Store(const Work& work, Rows rows, const float (&o)[kDv / 2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rows.sum[r] = __fadd_rn(rows.sum[r], __shfl_xor_sync(kFullWarp, rows.sum[r], 1));
      rows.sum[r] = __fadd_rn(rows.sum[r], __shfl_xor_sync(kFullWarp, rows.sum[r], 2));
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = rows.sum[r];
      const int32_t query = QueryOf(RowOf(r));
      if (query >= work.num_queries) continue;
      const int32_t group_size = args_.rows.group_size;
      const int64_t token = work.row + query;
      const int32_t head = work.kv_head * group_size + RowOf(r) - query * group_size;
      const bool sees = sum > 0.0f;
      const float inverse = sees ? __fdividef(1.0f, sum) : 0.0f;
      if (lane_ % 4 == 0) {
        args_.lse[token * args_.dims.num_q_heads + head] =
            sees ? __fmaf_rn(rows.max[r], args_.dims.softmax_scale, Log2(sum) * kLn2) : -INFINITY;
      }
      char* const to = static_cast<char*>(args_.o.data) +
                       2 * (token * args_.o.row_stride + head * args_.o.head_stride);
#pragma unroll
      for (int g = 0; g < kDv / 32; ++g) {
        uint32_t words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          // + 0 makes a zero positive, whatever tiles of zeros were added to it.
          const float* const pair = &o[4 * (4 * g + j) + 2 * r];
          words[j] = Pack2<T>(__fmaf_rn(pair[0], inverse, 0.0f), __fmaf_rn(pair[1], inverse, 0.0f));
        }
        *reinterpret_cast<uint4*>(to + 2 * (32 * g + 8 * (lane_ % 4))) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }

  const AttendArgs& args_;
  const WorkRing& works_;
  const uint32_t shared_;
  const RingBarriers<S::kSlots> key_barriers_, value_barriers_;
  const int32_t warp_ = UniformWarp();
  const int32_t lane_ = threadIdx.x % 32;
  const int32_t warpgroup_ = warp_ / 4;
  Rows rows_;
  int32_t tile_, num_tiles_, num_full_tiles_;
  int32_t visible_[2];  // columns of this thread that its rows see, from the first tile on
  WorkRing::Place place_, previous_;
  RingPlace<S::kSlots> keys_;
  RingPlace<S::kSlots> values_;
};

__device__ __forceinline__ Work TakeAttendWork(const AttendArgs& args) {
  Work work = TakeWork(args.list);
  if (work.kv_head < 0) return work;
  const int32_t first = NumVisible(args.dims, work.position);
  const int32_t last = NumVisible(args.dims, work.position + work.num_queries - 1);
  work.num_full_tiles = first / kTileSummaries;
  work.num_tiles = (last + kTileSummaries - 1) / kTileSummaries;
  return work;
}

template <int kDk, int kDv>
__device__ __forceinline__ void Produce(const AttendArgs& args, const WorkRing& works,
                                        uint32_t shared) {
  using S = Shape<kDk, kDv>;
  const RingBarriers<S::kSlots> key_barriers(shared + S::kKeyBarriers);
  const RingBarriers<S::kSlots> value_barriers(shared + S::kValueBarriers);
  WorkRing::Place place;
  RingPlace<S::kSlots> keys, values;
  Work next = TakeAttendWork(args);
  works.Tell(place, next);
  while (next.kv_head >= 0) {
    const Work work = next;
    next = TakeAttendWork(args);
    works.Tell(place, next);
    if (threadIdx.x % 32 != 0) continue;
    const int64_t first = work.kv_head * args.num_tiles + work.first_tile;
    const char* key_tile = args.keys + first * S::kKeyBytes;
    const char* value_tile = args.values + first * S::kValueBytes;
    // In the order of use: the values of a tile after the keys of the next.
    for (int32_t tile = 0; tile <= work.num_tiles && work.num_tiles > 0; ++tile) {
      if (tile < work.num_tiles) {
        key_barriers.WaitEmpty(keys);
        key_barriers.Fill(keys, shared + S::kKeys + keys.slot * S::kKeyBytes, key_tile,
                          S::kKeyBytes);
        keys.Advance();
        key_tile += S::kKeyBytes;
      }
      if (tile > 0) {
        value_barriers.WaitEmpty(values);
        value_barriers.Fill(values, shared + S::kValues + values.slot * S::kValueBytes, value_tile,
                            S::kValueBytes);
        values.Advance();
        value_tile += S::kValueBytes;
      }
    }
  }
}

template <class T, int kDk, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
    AttendSummariesKernel(const __grid_constant__ AttendArgs args) {
  using S = Shape<kDk, kDv>;
  extern __shared__ char dynamic[];
  __shared__ WorkSlots work_slots;
  const uint32_t shared = Uniform((SharedAddress(dynamic) + 1023) & ~1023u);
  const WorkRing works(work_slots);
  if (threadIdx.x == 0) {
    works.Init(kConsumerWarps);
    RingBarriers<S::kSlots>(shared + S::kKeyBarriers).Init(1, kConsumerWarps);
    RingBarriers<S::kSlots>(shared + S::kValueBarriers).Init(1, kConsumerWarps);
    BarrierInitFence();
  }
  __syncthreads();
  const int32_t warp = UniformWarp();
  if (warp < kConsumerWarps) {
    RaiseRegisters<S::kConsumerRegisters>();
    Consumer<T, kDk, kDv>(args, works, shared).Run();
  } else {
    LowerRegisters<S::kProducerRegisters>();
    if (warp == kConsumerWarps) Produce<kDk, kDv>(args, works, shared);
  }
}

template <class T, int kDk, int kDv>
cudaError_t Launch(const AttendArgs& args, int num_ctas, cudaStream_t stream) {
  constexpr int kBytes = Shape<kDk, kDv>::kBytes + 1024;
  const auto kernel = AttendSummariesKernel<T, kDk, kDv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<num_ctas, kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <class T>
cudaError_t LaunchOf(const AttendArgs& args, int num_ctas, cudaStream_t stream) {
  switch (args.dims.head_dim_qk) {
    case 64:
      return Launch<T, 64, 64>(args, num_ctas, stream);
    case 128:
      return Launch<T, 128, 128>(args, num_ctas, stream);
    default:
      return Launch<T, 192, 128>(args, num_ctas, stream);
  }
}

}  // namespace

cudaError_t LaunchAttendSummaries(const ScoreAndSelectParams& params,
                                  const ScoreSelectScratch& scratch, int num_sms,
                                  cudaStream_t stream) {
  const AttentionDims& dims = params.dims;
  const Queries& queries = params.queries;
  const int32_t group_size = dims.group_size();
  AttendArgs args{};
  args.dims = dims;
  args.list = {queries.segments,     queries.documents, scratch.attend_begin,    scratch.next_item,
               queries.num_segments, queries.kv_heads,  kAttendRows / group_size};
  args.rows = {static_cast<const char*>(queries.q.data),
               queries.q.row_stride * 2,
               queries.q.head_stride * 2,
               group_size,
               group_size,
               QueryOfRowFactor(group_size)};
  args.keys = static_cast<const char*>(scratch.keys);
  args.values = static_cast<const char*>(scratch.values);
  args.num_tiles = scratch.num_tiles;
  args.o = params.o_cmp;
  args.lse = scratch.lse;
  args.scale_log2 = dims.softmax_scale * kLog2E;
  return dims.dtype == DType::kBF16 ? LaunchOf<__nv_bfloat16>(args, num_sms, stream)
                                    : LaunchOf<__half>(args, num_sms, stream);
}

}  // namespace nsa::kernels::cuda
