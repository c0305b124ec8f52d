// Importance of select blocks and top-n on tensor cores, for l / d = 2 and l' / d = 4.
//
// Grid: one CTA of 4 consumer warpgroups and a producer for each SM. An item is 256 rows of up to
// 16 queries in a row; each warp owns 16 rows of one query: 16 heads, or fewer and rows of zeros.
// With more than 16 heads, 2 or 4 neighbouring warps share a query and the first of them ranks.
//
// A tile of 128 summaries is 32 select blocks. The packed order of summaries gives each thread
// eight whole blocks of its two rows; seven shuffles sum them over the rows and leave one block in
// each lane. The best blocks so far lie sorted in the lanes of the warp and never leave it, so that
// nothing is kept of a block that is not among them, and length has no limit.
#ifndef KERNELS_CUDA_SCORE_SELECT_RANK_CUH_
#define KERNELS_CUDA_SCORE_SELECT_RANK_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_select_best.cuh"
#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_work.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace nsa::kernels::cuda {

struct RankArgs {
  AttentionDims dims;
  WorkList list;
  QueryRows rows;
  const char* keys;   // tiles
  int64_t num_tiles;  // of a kv head
  const float* lse;
  int32_t* block_indices;
  float scale_log2;
  int32_t num_free;  // places that are not forced
};

namespace rank {

constexpr int kWarpgroups = kRankRows / 64;
constexpr int kConsumerWarps = kWarpgroups * 4;
constexpr int kThreads = kConsumerWarps * 32 + 128;
// Of a thread: 4 * consumer + producer is what the block is given, 5 * 96.
constexpr int kConsumerRegisters = 112;
constexpr int kProducerRegisters = 32;
constexpr int kTileBlocks = kTileSummaries / 4;
constexpr float kLog2E = 1.4426950408889634f;

template <int kDk>
struct Shape {
  static constexpr int kQueryBytes = 64 * kDk * 2;  // of a warpgroup
  static constexpr int kKeyBytes = kTileSummaries * kDk * 2;
  static constexpr int kSlots = kDk == 64 ? 8 : kDk == 128 ? 4 : 2;
  static constexpr int kKeys = kWarpgroups * kQueryBytes;
  static constexpr int kBytes = kKeys + kSlots * kKeyBytes;
};

// 2^x for x below about 1, at least 2^-125, to about two units in the last place, without the
// special function unit: a polynomial for the fraction, and the integer added to the exponent.
__device__ __forceinline__ float Exp2Polynomial(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23
  x = fmaxf(x, -125.0f);
  const float rounded = __fadd_rn(x, kRound);
  const float f = __fsub_rn(x, __fsub_rn(rounded, kRound));
  float p = 1.32764725e-3f;
  p = __fmaf_rn(p, f, 9.67554096e-3f);
  p = __fmaf_rn(p, f, 5.55071309e-2f);
  p = __fmaf_rn(p, f, 2.40221202e-1f);
  p = __fmaf_rn(p, f, 6.93146944e-1f);
  p = __fmaf_rn(p, f, 1.00000012f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(rounded) << 23));
}

// What a thread adds up of its two rows: block b of its eight blocks in score[b], but for the
// summary before its first one, and in `last` the row sum of its last summary.
//
// kPolynomials of the eight probabilities of a block (two rows of four summaries) are taken without
// the special function unit, which would otherwise be what limits the kernel. They are the same
// ones in every block, so that blocks of equal summaries still score the same.
template <int kPolynomials>
__device__ __forceinline__ void SumRows(const float (&s)[64], float scale_log2,
                                        const float (&shift)[2], float (&score)[8], float& last) {
  float before = 0.0f;
#pragma unroll
  for (int b = 0; b < 8; ++b) {
    float sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float p[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = __fmaf_rn(s[4 * (2 * b + i / 2) + 2 * r + i % 2], scale_log2, shift[r]);
        p[r] = 2 * (3 - i) + (1 - r) < kPolynomials ? Exp2Polynomial(x) : Exp2(x);
      }
      sum[i] = __fadd_rn(p[0], p[1]);
    }
    // Summary 4j - 1 reaches into block j, 4j + 3 out of it: weights 1, 2, 2, 2, 1.
    score[b] = __fmaf_rn(2.0f, __fadd_rn(__fadd_rn(sum[0], sum[1]), sum[2]), sum[3]);
    if (b > 0) score[b] = __fadd_rn(score[b], before);
    before = sum[3];
  }
  last = before;
}

// Sums over the eight rows of a warp's threads. Lane 4 * b + c gets block b of the threads at place
// c, each by the same tree of additions.
__device__ __forceinline__ float SumOverThreads(const float (&score)[8]) {
  const int32_t lane = threadIdx.x % 32;
  float half[4], quarter[2];
  const bool upper16 = (lane & 16) != 0, upper8 = (lane & 8) != 0, upper4 = (lane & 4) != 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float keep = upper16 ? score[4 + i] : score[i];
    const float give = upper16 ? score[i] : score[4 + i];
    half[i] = __fadd_rn(keep, __shfl_xor_sync(kFullWarp, give, 16));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float keep = upper8 ? half[2 + i] : half[i];
    const float give = upper8 ? half[i] : half[2 + i];
    quarter[i] = __fadd_rn(keep, __shfl_xor_sync(kFullWarp, give, 8));
  }
  const float keep = upper4 ? quarter[1] : quarter[0];
  const float give = upper4 ? quarter[0] : quarter[1];
  return __fadd_rn(keep, __shfl_xor_sync(kFullWarp, give, 4));
}

// Scores of a tile's blocks from warps that share a query; of two tiles in a row.
struct SharedScores {
  float score[2][kConsumerWarps][32];
};

template <class T, int kDk, int kPolynomials>
class Consumer {
 public:
  using S = Shape<kDk>;

  __device__ __forceinline__ Consumer(const RankArgs& args, WorkRing& works,
                                      RingBarriers<S::kSlots>& barriers, SharedScores& scores,
                                      uint32_t shared)
      : args_(args), works_(works), barriers_(barriers), scores_(scores), shared_(shared) {}

  __device__ __forceinline__ void Run() {
    works_.barriers.WaitFull(place_);
    Start(works_.work[place_.slot]);
    FinishQueries(warpgroup_);
    while (works_.work[place_.slot].kv_head >= 0) RunItem();
  }

 private:
  __device__ __forceinline__ uint32_t Query() const {
    return shared_ + warpgroup_ * S::kQueryBytes;
  }
  __device__ __forceinline__ int32_t WarpsPerQuery() const {
    return args_.rows.rows_per_query / kRankWarpRows;
  }

  // Queries of an item to shared memory, and of its statistics this thread's to registers.
  __device__ __forceinline__ void Start(const Work& work) {
    if (work.num_tiles == 0) return;
    StartQueries<kDk>(args_.rows, work, 64 * warpgroup_, Query());
    const int32_t query = warp_ / WarpsPerQuery();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t head = warp_ % WarpsPerQuery() * kRankWarpRows + lane_ / 4 + 8 * r;
      // A row without a head, and one that sees nothing, has no probabilities.
      float lse = INFINITY;
      if (query < work.num_queries && head < args_.rows.group_size) {
        lse = args_.lse[(work.row + query) * args_.dims.num_q_heads +
                        work.kv_head * args_.rows.group_size + head];
      }
      next_shift_[r] = lse == -INFINITY ? -INFINITY : -lse * kLog2E;
    }
  }

  __device__ __forceinline__ void RunItem() {
    const Work& work = works_.work[place_.slot];
    const int32_t num_tiles = work.num_tiles;
    const int32_t query = warp_ / WarpsPerQuery();
    const uint32_t position = work.position + query;
    const int32_t num_candidates =
        static_cast<int32_t>(position / args_.dims.select_block_tokens) + 1;
    const float shift[2] = {next_shift_[0], next_shift_[1]};
    BestBlocks best;
    float last = 0.0f;
    for (int32_t tile = 0; tile < num_tiles; ++tile) {
      float score[8];
      {
        float s[64];
        barriers_.WaitFull(keys_);
        WgmmaFence();
        const uint64_t q = WgmmaDescriptor(Query());
        const uint64_t keys = WgmmaDescriptor(shared_ + S::kKeys + keys_.slot * S::kKeyBytes);
#pragma unroll
        for (int k = 0; k < kDk / 16; ++k) {
          WgmmaShared<T>(s, q + (k / 4) * (8192 >> 4) + (k % 4) * 2,
                         keys + (k / 4) * (kTileSummaries * 128 >> 4) + (k % 4) * 2, k > 0);
        }
        WgmmaCommit();
        WgmmaWait<0>();
        WgmmaTouch(s);
        if (lane_ == 0) barriers_.Release(keys_);
        keys_.Advance();
        if (tile >= work.num_full_tiles) {
          const int32_t limit =
              NumVisible(args_.dims, position) - tile * kTileSummaries - 32 * (lane_ % 4);
#pragma unroll
          for (int j = 0; j < 16; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (2 * j + e >= limit) s[4 * j + e] = s[4 * j + 2 + e] = -INFINITY;
            }
          }
        }
        // The row sum of the summary before a thread's first is with its left neighbour, that
        // before a tile with the last thread of the quad since the tile before.
        const float last_of_tile_before = last;
        SumRows<kPolynomials>(s, args_.scale_log2, shift, score, last);
        const float give = lane_ % 4 == 3 ? last_of_tile_before : last;
        const float before = __shfl_sync(kFullWarp, give, (lane_ & ~3) | ((lane_ + 3) & 3));
        score[0] = __fadd_rn(score[0], before);
      }
      float sum = SumOverThreads(score);
      if (WarpsPerQuery() > 1) sum = SumOverWarps(sum, tile);
      if (warp_ % WarpsPerQuery() == 0) {
        const int32_t block = tile * kTileBlocks + 8 * (lane_ % 4) + lane_ / 4;
        const bool is_free = block >= args_.dims.num_initial_blocks &&
                             block < num_candidates - args_.dims.num_local_blocks;
        best.Add(sum, block, is_free, args_.num_free);
      }
    }
    StartNext();
    if (warp_ % WarpsPerQuery() == 0 && query < work.num_queries) {
      int32_t* const to =
          args_.block_indices + ((work.row + query) * args_.dims.num_kv_heads + work.kv_head) *
                                    args_.dims.num_selected_blocks;
      best.Store(args_.dims, num_candidates, args_.num_free, to);
    }
    __syncwarp();
    if (lane_ == 0) works_.barriers.Release(place_);
    place_.Advance();
    FinishQueries(warpgroup_);
  }

  // The score of this lane's block from all warps that share the query.
  __device__ __forceinline__ float SumOverWarps(float score, int32_t tile) {
    scores_.score[tile % 2][warp_][lane_] = score;
    SyncWarpgroup(warpgroup_);
    const int32_t first = warp_ / WarpsPerQuery() * WarpsPerQuery();
    float sum = 0.0f;
    for (int32_t i = 0; i < WarpsPerQuery(); ++i) {
      sum = __fadd_rn(sum, scores_.score[tile % 2][first + i][lane_]);
    }
    return sum;
  }

  __device__ __forceinline__ void StartNext() {
    RingPlace<kWorkSlots> next = place_;
    next.Advance();
    works_.barriers.WaitFull(next);
    SyncWarpgroup(warpgroup_);
    Start(works_.work[next.slot]);
  }

  const RankArgs& args_;
  WorkRing& works_;
  RingBarriers<S::kSlots>& barriers_;
  SharedScores& scores_;
  const uint32_t shared_;
  const int32_t warp_ = UniformWarp();
  const int32_t lane_ = threadIdx.x % 32;
  const int32_t warpgroup_ = UniformWarp() / 4;
  float next_shift_[2] = {0.0f, 0.0f};
  RingPlace<kWorkSlots> place_;
  RingPlace<S::kSlots> keys_;
};

// Tiles are those of blocks that can still be chosen by some query of the group: each begins with a
// summary that the query sees, so that all of them are seen in part at least.
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

template <int kDk>
__device__ __forceinline__ void Produce(const RankArgs& args, WorkRing& works,
                                        RingBarriers<Shape<kDk>::kSlots>& barriers,
                                        uint32_t shared) {
  using S = Shape<kDk>;
  RingPlace<kWorkSlots> place;
  RingPlace<S::kSlots> keys;
  Work next = TakeRankWork(args);
  works.Tell(place, next);
  while (next.kv_head >= 0) {
    const Work work = next;
    next = TakeRankWork(args);
    works.Tell(place, next);
    if (threadIdx.x % 32 != 0) continue;
    const char* tile = args.keys + (work.kv_head * args.num_tiles + work.first_tile) * S::kKeyBytes;
    for (int32_t i = 0; i < work.num_tiles; ++i) {
      barriers.WaitEmpty(keys);
      barriers.Fill(keys, shared + S::kKeys + keys.slot * S::kKeyBytes, tile, S::kKeyBytes);
      keys.Advance();
      tile += S::kKeyBytes;
    }
  }
}

template <class T, int kDk, int kPolynomials>
__global__ void __launch_bounds__(kThreads, 1)
    RankBlocksKernel(const __grid_constant__ RankArgs args) {
  using S = Shape<kDk>;
  extern __shared__ char dynamic[];
  __shared__ WorkRing works;
  __shared__ RingBarriers<S::kSlots> barriers;
  __shared__ SharedScores scores;
  const uint32_t shared = (SharedAddress(dynamic) + 1023) & ~1023u;
  if (threadIdx.x == 0) {
    works.barriers.Init(1, kConsumerWarps);
    barriers.Init(1, kConsumerWarps);
    BarrierInitFence();
  }
  __syncthreads();
  if (threadIdx.x / 32 >= kConsumerWarps) {
    LowerRegisters<kProducerRegisters>();
    if (threadIdx.x / 32 == kConsumerWarps) Produce<kDk>(args, works, barriers, shared);
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consumer<T, kDk, kPolynomials>(args, works, barriers, scores, shared).Run();
  }
}

template <class T, int kDk, int kPolynomials>
cudaError_t LaunchRankBlocksOf(const RankArgs& args, int num_ctas, cudaStream_t stream) {
  constexpr int kBytes = Shape<kDk>::kBytes + 1024;
  const auto kernel = RankBlocksKernel<T, kDk, kPolynomials>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<num_ctas, kThreads, kBytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace rank

inline RankArgs MakeRankArgs(const ScoreAndSelectParams& params,
                             const ScoreSelectScratch& scratch) {
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
               dims.num_kv_heads,
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
  args.scale_log2 = dims.softmax_scale * rank::kLog2E;
  args.num_free = dims.num_selected_blocks - dims.num_initial_blocks - dims.num_local_blocks;
  return args;
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SCORE_SELECT_RANK_CUH_
