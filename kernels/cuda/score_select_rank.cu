// Importance of select blocks and top-n on tensor cores, for l / d of 1, 2 and 4 and l' / d of 2, 4
// and 8 where l <= l'.
//
// Grid: one CTA of 2 consumer warpgroups, 7 selector warps and a producer for each SM. An item is
// 256 rows of up to 16 queries in a row. 16 rows are of one query: 16 heads, or fewer and rows of
// zeros; with more than 16 heads, 2 or 4 neighbouring sets of 16 rows are of one query.
//
// A consumer warpgroup owns two blocks of 64 rows. While it takes the exponentials of one, the
// tensor cores multiply the other. A tile of 128 summaries is 64, 32 or 16 select blocks. The
// packed order of summaries gives each thread 16, 8 or 4 whole blocks of its two rows; shuffles sum
// them over the rows and share them out among lanes. Selectors rank these sums a chunk of tiles
// later. The best blocks of a query so far lie sorted in the lanes of a warp, so that length has no
// limit.
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_select_rank.cuh"
#include "kernels/cuda/score_select_selector.cuh"
#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_work.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace nsa::kernels::cuda {
namespace {

using namespace rank;  // NOLINT: of this kernel alone

constexpr float kLog2E = 1.4426950408889634f;

// What a thread adds up of its two rows: its blocks, but for what the summaries before its first
// one add to the first; and what its last summaries add to the block after.
template <int kStrides, int kReach>
__device__ __forceinline__ void SumRows(const float (&s)[64], float scale_log2,
                                        const float (&shift)[2], float (&score)[32 / kStrides],
                                        float& last) {
  float before = 0.0f;
#pragma unroll
  for (int b = 0; b < 32 / kStrides; ++b) {
    float sum[kStrides];
#pragma unroll
    for (int i = 0; i < kStrides; ++i) {
      const int summary = kStrides * b + i;
      float p[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = __fmaf_rn(s[4 * (summary / 2) + 2 * r + summary % 2], scale_log2, shift[r]);
        p[r] = Exp2(x);
      }
      sum[i] = __fadd_rn(p[0], p[1]);
    }
    float next;
    SumBlock<kStrides, kReach>(sum, score[b], next);
    if (kReach > 0 && b > 0) score[b] = __fadd_rn(score[b], before);
    before = next;
  }
  last = before;
}

// Sums with the lane `mask` away, of which one keeps the upper half and the other the lower.
template <int kCount>
__device__ __forceinline__ void HalveOverThreads(const float (&from)[kCount],
                                                 float (&to)[kCount / 2], int32_t mask,
                                                 bool upper) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float keep = upper ? from[kCount / 2 + i] : from[i];
    const float give = upper ? from[i] : from[kCount / 2 + i];
    to[i] = __fadd_rn(keep, __shfl_xor_sync(kFullWarp, give, mask));
  }
}

// Sums over the eight rows of a warp's threads, shared out as ScoreOrder says, each by the same
// tree of additions. `kIsHalf`: the step with the lane 16 away has been done.
template <bool kIsHalf, int kCount, int kLaneCount>
__device__ __forceinline__ void SumOverThreads(const float (&score)[kCount],
                                               float (&sum)[kLaneCount]) {
  const int32_t lane = threadIdx.x % 32;
  const bool upper16 = (lane & 16) != 0, upper8 = (lane & 8) != 0, upper4 = (lane & 4) != 0;
  constexpr int kHalf = kIsHalf ? kCount : kCount / 2;
  float half[kHalf], quarter[kHalf / 2];
  if constexpr (kIsHalf) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) half[i] = score[i];
  } else {
    HalveOverThreads(score, half, 16, upper16);
  }
  HalveOverThreads(half, quarter, 8, upper8);
  if constexpr (kHalf == 2) {
    sum[0] = __fadd_rn(quarter[0], __shfl_xor_sync(kFullWarp, quarter[0], 4));
  } else {
    HalveOverThreads(quarter, sum, 4, upper4);
  }
}

template <class T, int kDk, int kStrides, int kReach>
class Consumer {
 public:
  using S = Shape<kDk, kStrides>;
  using Order = typename S::Order;

  __device__ __forceinline__ Consumer(const RankArgs& args, const WorkRing& works, uint32_t shared)
      : args_(args),
        works_(works),
        shared_(shared),
        key_barriers_(shared + S::kKeyBarriers),
        score_barriers_(S::ScoreBarriers(shared, warpgroup_)) {}

  __device__ __forceinline__ void Run() {
    works_.Wait(place_);
    Start(works_.At(place_));
    FinishQueries(warpgroup_);
    while (Uniform(works_.At(place_).kv_head) >= 0) RunItem();
    CompletePending();
  }

 private:
  // What is left to do for a block of rows and a tile: the sum over the rows of a warp's threads.
  // It is done among the exponentials of the next one, which leave most issue slots free. With 16
  // blocks a thread there are not the registers for that: the first step, which halves them, is
  // done at once, and the rest ahead of the next exponentials.
  static constexpr bool kHalves = Order::kThreadBlocks == 16;
  struct Pending {
    float score[kHalves ? Order::kThreadBlocks / 2 : Order::kThreadBlocks];
    float before;      // what goes to the right neighbour's first block
    uint32_t address;  // of this lane's first score; 0: nothing is to be stored
    bool ends_chunk;
    int32_t slot;
  };

  __device__ __forceinline__ uint32_t Query(int block) const {
    return shared_ + (2 * warpgroup_ + block) * S::kQueryBytes;
  }
  // Of 16 rows, among those of the warpgroup.
  __device__ __forceinline__ int32_t SetOf(int block) const { return 4 * block + warp_ % 4; }
  __device__ __forceinline__ int32_t SetsPerQuery() const {
    return args_.rows.rows_per_query / kRankWarpRows;
  }
  __device__ __forceinline__ int32_t QueryOf(int block) const {
    return (kSetsPerWarpgroup * warpgroup_ + SetOf(block)) / SetsPerQuery();
  }

  // Queries of an item to shared memory, and of its statistics this thread's to registers.
  __device__ __forceinline__ void Start(const Work& work) {
    if (Uniform(work.num_tiles) == 0) return;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      StartQueries<kDk>(args_.rows, work, 128 * warpgroup_ + 64 * block, Query(block));
      const int32_t query = QueryOf(block);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int32_t head = SetOf(block) % SetsPerQuery() * kRankWarpRows + lane_ / 4 + 8 * r;
        // A row without a head has no probabilities.
        next_lse_[block][r] = INFINITY;
        if (query < work.num_queries && head < args_.rows.group_size) {
          next_lse_[block][r] = args_.lse[(work.row + query) * args_.dims.num_q_heads +
                                          work.kv_head * args_.rows.group_size + head];
        }
      }
    }
  }

  __device__ __forceinline__ void RunItem() {
    const Work& work = works_.At(place_);
    num_tiles_ = Uniform(work.num_tiles);
    num_full_tiles_ = Uniform(work.num_full_tiles);
    if (num_tiles_ == 0) {
      // Selectors may wait for what is pending, and the producer for them.
      CompletePending();
      StartNext();
    } else {
#pragma unroll
      for (int block = 0; block < 2; ++block) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          // A row that sees nothing has no probabilities either.
          const float lse = next_lse_[block][r];
          shift_[block][r] = lse == -INFINITY ? -INFINITY : -lse * kLog2E;
        }
        last_[block] = 0.0f;
        // Columns of this thread that its rows see, from the first tile on.
        visible_[block] = NumVisible(args_.dims, work.position + QueryOf(block)) - 32 * (lane_ % 4);
      }
      RunTiles();
    }
    works_.Release(place_);
    place_.Advance();
    FinishQueries(warpgroup_);
  }

  __device__ __forceinline__ void RunTiles() {
    float s[2][64];
    key_barriers_.WaitFull(keys_);
    Multiply(s[0], 0);
    Finish(s[0]);
    int32_t tile = 0;
    for (; tile < num_tiles_ - 1; ++tile) {
      const int32_t slot = keys_.slot;
      Multiply(s[1], 1);
      Score(s[0], 0, tile, slot);
      Finish(s[1]);
      keys_.Advance();
      key_barriers_.WaitFull(keys_);
      Multiply(s[0], 0);
      Score(s[1], 1, tile, slot);
      Finish(s[0]);
    }
    Multiply(s[1], 1);
    Score(s[0], 0, tile, keys_.slot);
    Finish(s[1]);
    // Nobody reads q of this item any more.
    StartNext();
    Score(s[1], 1, tile, keys_.slot);
    keys_.Advance();
  }

  // s [64,128] = a block of rows of q * keys^T
  __device__ __forceinline__ void Multiply(float (&s)[64], int block) {
    const uint64_t q = WgmmaDescriptor(Uniform(Query(block)));
    const uint64_t keys = WgmmaDescriptor(Uniform(shared_ + S::kKeys + keys_.slot * S::kKeyBytes));
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kDk / 16; ++k) {
      WgmmaShared<T>(s, q + (k / 4) * (8192 >> 4) + (k % 4) * 2,
                     keys + (k / 4) * (kTileSummaries * 128 >> 4) + (k % 4) * 2, k > 0);
    }
    WgmmaCommit();
  }

  __device__ __forceinline__ void Finish(float (&s)[64]) {
    WgmmaWait<0>();
    WgmmaTouch(s);
  }

  // Sums of a tile's probabilities, one select block in each lane, for the selectors.
  __device__ __forceinline__ void Score(float (&s)[64], int block, int32_t tile, int32_t slot) {
    if (tile >= num_full_tiles_) {
      const int32_t limit = visible_[block] - tile * kTileSummaries;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (2 * j + e >= limit) s[4 * j + e] = s[4 * j + 2 + e] = -INFINITY;
        }
      }
    }
    Pending next;
    float score[Order::kThreadBlocks];
    // What the summaries before a thread's first add is with its left neighbour, of those before a
    // tile with the last thread of the quad since the tile before.
    const float last_of_tile_before = last_[block];
    if constexpr (kHalves) StorePending();
    SumRows<kStrides, kReach>(s, args_.scale_log2, shift_[block], score, last_[block]);
    next.before = lane_ % 4 == 3 ? last_of_tile_before : last_[block];
    if constexpr (!kHalves) StorePending();
    // A condition that always holds: the assembler keeps barriers and waits in order, and so cannot
    // move exponentials behind the wait for the other block.
    float all = score[0];
#pragma unroll
    for (int b = 1; b < Order::kThreadBlocks; ++b) all += score[b];
    if (lane_ == 0 && all != -1.0f) BarrierArrive(key_barriers_.Empty(slot));
    TellPending();

    if constexpr (kHalves) {
      AddBefore(next.before, score);
      HalveOverThreads(score, next.score, 16, (lane_ & 16) != 0);
    } else {
#pragma unroll
      for (int b = 0; b < Order::kThreadBlocks; ++b) next.score[b] = score[b];
    }
    if (block == 0 && chunk_tile_ == 0) score_barriers_.WaitEmpty(scores_);
    const int32_t place = Order::Place(lane_);
    next.address = shared_ + S::ScoreOffset(warpgroup_, scores_.slot) +
                   ((SetOf(block) * S::kChunkTiles + chunk_tile_) * Order::kTileBlocks + place) * 4;
    if (place < 0) next.address = 0;
    next.slot = scores_.slot;
    next.ends_chunk = false;
    if (block == 1) {
      ++chunk_tile_;
      next.ends_chunk = chunk_tile_ == S::kChunkTiles || tile == num_tiles_ - 1;
      if (next.ends_chunk) {
        chunk_tile_ = 0;
        scores_.Advance();
      }
    }
    pending_ = next;
  }

  // `before` is what this lane gives to its right neighbour.
  static __device__ __forceinline__ void AddBefore(float before,
                                                   float (&score)[Order::kThreadBlocks]) {
    if constexpr (kReach > 0) {
      const int32_t lane = threadIdx.x % 32;
      const int32_t left = (lane & ~3) | ((lane + 3) & 3);
      score[0] = __fadd_rn(score[0], __shfl_sync(kFullWarp, before, left));
    }
  }
  __device__ __forceinline__ void StorePending() {
    float sum[Order::kLaneBlocks];
    if constexpr (!kHalves) AddBefore(pending_.before, pending_.score);
    SumOverThreads<kHalves>(pending_.score, sum);
    if (pending_.address == 0) return;
#pragma unroll
    for (int i = 0; i < Order::kLaneBlocks; ++i) StoreShared(pending_.address + 128 * i, sum[i]);
  }
  __device__ __forceinline__ void TellPending() {
    if (!pending_.ends_chunk) return;
    __syncwarp();
    if (lane_ == 0) BarrierArrive(score_barriers_.Full(pending_.slot));
  }
  __device__ __forceinline__ void CompletePending() {
    StorePending();
    TellPending();
    pending_.address = 0;
    pending_.ends_chunk = false;
  }

  __device__ __forceinline__ void StartNext() {
    WorkRing::Place next = place_;
    next.Advance();
    works_.Wait(next);
    SyncWarpgroup(warpgroup_);
    Start(works_.At(next));
  }

  const RankArgs& args_;
  const WorkRing& works_;
  const uint32_t shared_;
  const int32_t warp_ = UniformWarp();
  const int32_t warpgroup_ = warp_ / 4;
  const int32_t lane_ = threadIdx.x % 32;
  const RingBarriers<S::kSlots> key_barriers_;
  const RingBarriers<kScoreSlots> score_barriers_;
  float shift_[2][2], next_lse_[2][2] = {};
  float last_[2];
  int32_t visible_[2];
  int32_t num_tiles_, num_full_tiles_;
  int32_t chunk_tile_ = 0;  // of the current tile in its chunk
  Pending pending_ = {};
  WorkRing::Place place_;
  RingPlace<S::kSlots> keys_;
  RingPlace<kScoreSlots> scores_;
};

// Tiles are those of blocks that can still be chosen by some query of the group: each begins with a
// summary that the query sees, as l <= l', so that all of them are seen in part at least.
template <int kTileBlocks>
__device__ __forceinline__ Work TakeRankWork(const RankArgs& args) {
  Work work = TakeWork(args.list);
  if (work.kv_head < 0) return work;
  const uint32_t last = work.position + work.num_queries - 1;
  const int32_t num_candidates = static_cast<int32_t>(last / args.dims.select_block_tokens) + 1;
  if (args.num_free == 0 || num_candidates <= args.dims.num_selected_blocks) return work;
  work.num_full_tiles = NumVisible(args.dims, work.position) / kTileSummaries;
  work.num_tiles = (num_candidates - args.dims.num_local_blocks + kTileBlocks - 1) / kTileBlocks;
  return work;
}

template <int kDk, int kStrides>
__device__ __forceinline__ void Produce(const RankArgs& args, const WorkRing& works,
                                        uint32_t shared) {
  using S = Shape<kDk, kStrides>;
  const RingBarriers<S::kSlots> key_barriers(shared + S::kKeyBarriers);
  WorkRing::Place place;
  RingPlace<S::kSlots> keys;
  Work next = TakeRankWork<S::Order::kTileBlocks>(args);
  works.Tell(place, next);
  while (next.kv_head >= 0) {
    const Work work = next;
    next = TakeRankWork<S::Order::kTileBlocks>(args);
    works.Tell(place, next);
    if (threadIdx.x % 32 != 0) continue;
    const char* tile = args.keys + (work.kv_head * args.num_tiles + work.first_tile) * S::kKeyBytes;
    for (int32_t i = 0; i < work.num_tiles; ++i) {
      key_barriers.WaitEmpty(keys);
      key_barriers.Fill(keys, shared + S::kKeys + keys.slot * S::kKeyBytes, tile, S::kKeyBytes);
      keys.Advance();
      tile += S::kKeyBytes;
    }
  }
}

template <class T, int kDk, int kStrides, int kReach>
__global__ void __launch_bounds__(kThreads, 1)
    RankBlocksKernel(const __grid_constant__ RankArgs args) {
  using S = Shape<kDk, kStrides>;
  extern __shared__ char dynamic[];
  __shared__ WorkSlots work_slots;
  const uint32_t padding = (1024 - SharedAddress(dynamic) % 1024) % 1024;
  const uint32_t shared = Uniform(SharedAddress(dynamic) + padding);
  const WorkRing works(work_slots);
  if (threadIdx.x == 0) {
    works.Init(kConsumerWarps + kSelectorWarps);
    // Once for each block of rows.
    RingBarriers<S::kSlots>(shared + S::kKeyBarriers).Init(1, 2 * kConsumerWarps);
    for (int i = 0; i < kWarpgroups; ++i) {
      S::ScoreBarriers(shared, i).Init(4, kSelectorWarps);
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int32_t warp = UniformWarp();
  if (warp < kConsumerWarps) {
    RaiseRegisters<kConsumerRegisters>();
    Consumer<T, kDk, kStrides, kReach>(args, works, shared).Run();
  } else {
    LowerRegisters<kSelectorRegisters>();
    if (warp < kConsumerWarps + kSelectorWarps) {
      Selector<kDk, kStrides>(args, works, shared, dynamic + padding).Run();
    } else {
      Produce<kDk, kStrides>(args, works, shared);
    }
  }
}

template <class T, int kDk, int kStrides, int kReach>
cudaError_t Launch(const RankArgs& args, int num_ctas, cudaStream_t stream) {
  constexpr int kBytes = Shape<kDk, kStrides>::kBytes + 1024;
  const auto kernel = RankBlocksKernel<T, kDk, kStrides, kReach>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<num_ctas, kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

template <class T, int kStrides, int kReach>
cudaError_t LaunchDk(const RankArgs& args, int num_ctas, cudaStream_t stream) {
  switch (args.dims.head_dim_qk) {
    case 64:
      return Launch<T, 64, kStrides, kReach>(args, num_ctas, stream);
    case 128:
      return Launch<T, 128, kStrides, kReach>(args, num_ctas, stream);
    default:
      return Launch<T, 192, kStrides, kReach>(args, num_ctas, stream);
  }
}

template <int kStrides, int kReach>
cudaError_t LaunchBlocks(const RankArgs& args, int num_ctas, cudaStream_t stream) {
  return args.dims.dtype == DType::kBF16
             ? LaunchDk<__nv_bfloat16, kStrides, kReach>(args, num_ctas, stream)
             : LaunchDk<__half, kStrides, kReach>(args, num_ctas, stream);
}

template <int kStrides>
cudaError_t LaunchStrides(const RankArgs& args, int num_ctas, cudaStream_t stream) {
  switch (args.dims.compress_block_tokens / args.dims.compress_stride_tokens) {
    case 1:
      return LaunchBlocks<kStrides, 0>(args, num_ctas, stream);
    case 2:
      return LaunchBlocks<kStrides, 1>(args, num_ctas, stream);
    default:
      if constexpr (kStrides >= 4) return LaunchBlocks<kStrides, 3>(args, num_ctas, stream);
      return cudaErrorInvalidValue;
  }
}

RankArgs MakeRankArgs(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch) {
  const AttentionDims& dims = params.dims;
  const Queries& queries = params.queries;
  const int32_t group_size = dims.group_size();
  const int32_t warps_per_query = RankWarpsPerQuery(group_size);
  RankArgs args{};
  args.dims = dims;
  args.list = {queries.segments,
               queries.documents,
               scratch.rank_begin,
               scratch.next_item + 1,
               queries.num_segments,
               queries.kv_heads,
               kRankRows / kRankWarpRows / warps_per_query};
  const int32_t rows_per_query = warps_per_query * kRankWarpRows;
  args.rows = {static_cast<const char*>(queries.q.data),
               queries.q.row_stride * 2,
               queries.q.head_stride * 2,
               group_size,
               rows_per_query,
               QueryOfRowFactor(rows_per_query)};
  args.keys = static_cast<const char*>(scratch.keys);
  args.num_tiles = scratch.num_tiles;
  args.lse = scratch.lse;
  args.block_indices = params.block_indices;
  args.scale_log2 = dims.softmax_scale * kLog2E;
  args.num_free = dims.num_selected_blocks - dims.num_initial_blocks - dims.num_local_blocks;
  return args;
}

}  // namespace

cudaError_t LaunchRankBlocks(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                             int num_sms, cudaStream_t stream) {
  const RankArgs args = MakeRankArgs(params, scratch);
  switch (params.dims.select_block_tokens / params.dims.compress_stride_tokens) {
    case 2:
      return LaunchStrides<2>(args, num_sms, stream);
    case 4:
      return LaunchStrides<4>(args, num_sms, stream);
    default:
      return LaunchStrides<8>(args, num_sms, stream);
  }
}

}  // namespace nsa::kernels::cuda
