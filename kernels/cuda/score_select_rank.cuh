// Importance of select blocks and top-n on tensor cores, for l / d = 2 and l' / d = 4.
//
// Grid: one CTA of 2 consumer warpgroups, 7 selector warps and a producer for each SM. An item is
// 256 rows of up to 16 queries in a row. 16 rows are of one query: 16 heads, or fewer and rows of
// zeros; with more than 16 heads, 2 or 4 neighbouring sets of 16 rows are of one query.
//
// A consumer warpgroup owns two blocks of 64 rows. While it takes the exponentials of one, the
// tensor cores multiply the other. A tile of 128 summaries is 32 select blocks. The packed order of
// summaries gives each thread eight whole blocks of its two rows; seven shuffles sum them over the
// rows and leave one block in each lane. Selectors rank these sums a chunk of tiles later. The best
// blocks of a query so far lie sorted in the lanes of a warp, so that length has no limit.
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

constexpr int kWarpgroups = kRankRows / 128;
constexpr int kConsumerWarps = kWarpgroups * 4;
constexpr int kSelectorWarps = 7;
constexpr int kThreads = (kConsumerWarps + kSelectorWarps + 1) * 32;
// Of a thread: 2 * consumer + 2 * selector is what the block is given, 4 * 128.
constexpr int kConsumerRegisters = 176;
constexpr int kSelectorRegisters = 80;
constexpr int kSets = kRankRows / kRankWarpRows;  // of 16 rows
constexpr int kSetsPerWarpgroup = kSets / kWarpgroups;
constexpr int kTileBlocks = kTileSummaries / 4;
constexpr int kScoreSlots = 2;
constexpr float kLog2E = 1.4426950408889634f;

template <int kDk>
struct Shape {
  static constexpr int kQueryBytes = 64 * kDk * 2;  // of a block of rows
  static constexpr int kKeyBytes = kTileSummaries * kDk * 2;
  static constexpr int kSlots = kDk == 64 ? 6 : kDk == 128 ? 3 : 2;
  static constexpr int kChunkTiles = kDk == 192 ? 8 : 16;
  static constexpr int kScoreBytes = kSetsPerWarpgroup * kChunkTiles * kTileBlocks * 4;
  static constexpr int kKeys = kRankRows / 64 * kQueryBytes;
  static constexpr int kScores = kKeys + kSlots * kKeyBytes;
  static constexpr int kKeyBarriers = kScores + kWarpgroups * kScoreSlots * kScoreBytes;
  static constexpr int kScoreBarriers = kKeyBarriers + RingBarriers<kSlots>::kBytes;
  static constexpr int kBytes = kScoreBarriers + kWarpgroups * RingBarriers<kScoreSlots>::kBytes;

  // Of the scores that a warpgroup leaves for its selectors, and the scores
  // [set][tile of the chunk][lane] themselves.
  static __device__ __forceinline__ RingBarriers<kScoreSlots> ScoreBarriers(uint32_t shared,
                                                                            int32_t warpgroup) {
    return RingBarriers<kScoreSlots>(shared + kScoreBarriers +
                                     warpgroup * RingBarriers<kScoreSlots>::kBytes);
  }
  static constexpr __device__ int32_t ScoreOffset(int32_t warpgroup, int32_t slot) {
    return kScores + (warpgroup * kScoreSlots + slot) * kScoreBytes;
  }
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

template <class T, int kDk, int kPolynomials>
class Consumer {
 public:
  using S = Shape<kDk>;

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
  // It is done among the exponentials of the next one, which leave most issue slots free.
  struct Pending {
    float score[8];
    float before;      // the row sum that goes to the right neighbour's first block
    uint32_t address;  // of this lane's score; 0: nothing is pending
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
    // The row sum of the summary before a thread's first is with its left neighbour, that before a
    // tile with the last thread of the quad since the tile before.
    const float last_of_tile_before = last_[block];
    SumRows<kPolynomials>(s, args_.scale_log2, shift_[block], next.score, last_[block]);
    next.before = lane_ % 4 == 3 ? last_of_tile_before : last_[block];
    StorePending();
    // A condition that always holds: the assembler keeps barriers and waits in order, and so cannot
    // move exponentials behind the wait for the other block.
    float all = next.score[0];
#pragma unroll
    for (int b = 1; b < 8; ++b) all += next.score[b];
    if (lane_ == 0 && all != -1.0f) BarrierArrive(key_barriers_.Empty(slot));
    TellPending();

    if (block == 0 && chunk_tile_ == 0) score_barriers_.WaitEmpty(scores_);
    next.address = shared_ + S::ScoreOffset(warpgroup_, scores_.slot) +
                   ((SetOf(block) * S::kChunkTiles + chunk_tile_) * kTileBlocks + lane_) * 4;
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

  __device__ __forceinline__ void StorePending() {
    const float before = __shfl_sync(kFullWarp, pending_.before, (lane_ & ~3) | ((lane_ + 3) & 3));
    pending_.score[0] = __fadd_rn(pending_.score[0], before);
    const float sum = SumOverThreads(pending_.score);
    if (pending_.address != 0) StoreShared(pending_.address, sum);
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

// Ranks every seventh query.
template <int kDk>
class Selector {
 public:
  using S = Shape<kDk>;

  // `data` is `shared` as a pointer.
  __device__ __forceinline__ Selector(const RankArgs& args, const WorkRing& works, uint32_t shared,
                                      char* data)
      : args_(args), works_(works), shared_(shared), data_(data) {}

  __device__ __forceinline__ void Run() {
    for (;;) {
      works_.Wait(place_);
      const Work& work = works_.At(place_);
      if (Uniform(work.kv_head) < 0) return;
      RunItem(work);
      works_.Release(place_);
      place_.Advance();
      // Who has a query more than others changes from item to item.
      if (++selector_ == kSelectorWarps) selector_ = 0;
    }
  }

 private:
  static constexpr int kMaxQueries = (kSets + kSelectorWarps - 1) / kSelectorWarps;

  __device__ __forceinline__ void RunItem(const Work& work) {
    const int32_t sets_per_query = args_.rows.rows_per_query / kRankWarpRows;
    const int32_t num_tiles = Uniform(work.num_tiles), num_queries = Uniform(work.num_queries);
    if (num_tiles == 0) {
      for (int32_t query = selector_; query < num_queries; query += kSelectorWarps) {
        Store(work, query, BestBlocks(), nullptr);
      }
      return;
    }
    BestBlocks best[kMaxQueries];
    for (int32_t chunk = 0; chunk < num_tiles; chunk += S::kChunkTiles) {
      int32_t query = selector_;
      BestBlocks* of_query = best;
#pragma unroll 1  // the code of one query is long enough
      for (int32_t warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
        const RingBarriers<kScoreSlots> barriers = S::ScoreBarriers(shared_, warpgroup);
        barriers.WaitFull(scores_);
        auto* const slot =
            reinterpret_cast<float*>(data_ + S::ScoreOffset(warpgroup, scores_.slot));
        const int32_t first_query = warpgroup * kSetsPerWarpgroup / sets_per_query;
        const int32_t end_query = first_query + kSetsPerWarpgroup / sets_per_query;
#pragma unroll 1
        for (; query < end_query && query < num_queries; query += kSelectorWarps) {
          float* const scores =
              slot + (query - first_query) * sets_per_query * (S::kChunkTiles * kTileBlocks);
          BestBlocks ranked = *of_query;
          Rank(scores, sets_per_query, chunk, NumCandidates(work, query), ranked);
          *of_query++ = ranked;
          if (chunk + S::kChunkTiles >= num_tiles) Store(work, query, ranked, scores);
        }
        __syncwarp();
        if (lane_ == 0) BarrierArrive(barriers.Empty(scores_.slot));
      }
      scores_.Advance();
    }
  }

  // Scores that were read serve as scratch.
  __device__ __forceinline__ void Store(const Work& work, int32_t query, const BestBlocks& best,
                                        float* scratch) const {
    best.Store(args_.dims, NumCandidates(work, query), args_.num_free,
               reinterpret_cast<uint64_t*>(scratch),
               args_.block_indices + ((work.row + query) * args_.dims.num_kv_heads + work.kv_head) *
                                         args_.dims.num_selected_blocks);
  }

  __device__ __forceinline__ int32_t NumCandidates(const Work& work, int32_t query) const {
    return static_cast<int32_t>((work.position + query) / args_.dims.select_block_tokens) + 1;
  }

  // Adds the blocks of tiles [chunk, chunk + kChunkTiles) to the best of a query.
  __device__ __forceinline__ void Rank(float* scores, int32_t sets_per_query, int32_t chunk,
                                       int32_t num_candidates, BestBlocks& best) {
    float score[S::kChunkTiles];
#pragma unroll
    for (int j = 0; j < S::kChunkTiles; ++j) score[j] = scores[j * kTileBlocks + lane_];
#pragma unroll 1
    for (int32_t set = 1; set < sets_per_query; ++set) {
#pragma unroll
      for (int j = 0; j < S::kChunkTiles; ++j) {
        score[j] = __fadd_rn(score[j], scores[(set * S::kChunkTiles + j) * kTileBlocks + lane_]);
      }
    }
    __syncwarp();
    auto* const scratch = reinterpret_cast<uint64_t*>(scores);
    // Of free blocks only. What lies past the last tile was left by others, and is past the last
    // free block as well.
    const int32_t first_block = chunk * kTileBlocks + 8 * (lane_ % 4) + lane_ / 4;
    const int32_t begin = args_.dims.num_initial_blocks - first_block;
    const int32_t end = num_candidates - args_.dims.num_local_blocks - first_block;
    uint32_t key[S::kChunkTiles];
#pragma unroll
    for (int j = 0; j < S::kChunkTiles; ++j) {
      key[j] = j * kTileBlocks >= begin && j * kTileBlocks < end ? ScoreKey(score[j]) : 0;
    }
    // Each lane's best, then each lane's second best, until none is better than what there is.
    for (;;) {
      uint32_t top[2] = {0, 0};  // of either half, for a shorter chain
      int32_t top_tile[2] = {0, S::kChunkTiles / 2};
#pragma unroll
      for (int j = 0; j < S::kChunkTiles / 2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int tile = half * (S::kChunkTiles / 2) + j;
          if (key[tile] > top[half]) {
            top[half] = key[tile];
            top_tile[half] = tile;
          }
        }
      }
      const bool is_second = top[1] > top[0];
      const uint32_t best_key = is_second ? top[1] : top[0];
      const int32_t best_tile = is_second ? top_tile[1] : top_tile[0];
      RankedBlock added;
      if (best_key > 0) {
        added = {best_key, ~static_cast<uint32_t>(first_block + best_tile * kTileBlocks)};
      }
      if (!best.Add(added, args_.num_free, scratch)) return;
#pragma unroll
      for (int j = 0; j < S::kChunkTiles; ++j) {
        if (j == best_tile) key[j] = 0;
      }
    }
  }

  const RankArgs& args_;
  const WorkRing& works_;
  const uint32_t shared_;
  char* const data_;
  int32_t selector_ = UniformWarp() - kConsumerWarps;
  const int32_t lane_ = threadIdx.x % 32;
  WorkRing::Place place_;
  RingPlace<kScoreSlots> scores_;
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
__device__ __forceinline__ void Produce(const RankArgs& args, const WorkRing& works,
                                        uint32_t shared) {
  using S = Shape<kDk>;
  const RingBarriers<S::kSlots> key_barriers(shared + S::kKeyBarriers);
  WorkRing::Place place;
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
      key_barriers.WaitEmpty(keys);
      key_barriers.Fill(keys, shared + S::kKeys + keys.slot * S::kKeyBytes, tile, S::kKeyBytes);
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
    Consumer<T, kDk, kPolynomials>(args, works, shared).Run();
  } else {
    LowerRegisters<kSelectorRegisters>();
    if (warp < kConsumerWarps + kSelectorWarps) {
      Selector<kDk>(args, works, shared, dynamic + padding).Run();
    } else {
      Produce<kDk>(args, works, shared);
    }
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
