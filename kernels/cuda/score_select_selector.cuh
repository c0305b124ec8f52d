// The warps of the ranking kernel that choose blocks from scores.
#ifndef KERNELS_CUDA_SCORE_SELECT_SELECTOR_CUH_
#define KERNELS_CUDA_SCORE_SELECT_SELECTOR_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_select_best.cuh"
#include "kernels/cuda/score_select_rank.cuh"
#include "kernels/cuda/score_select_work.cuh"

namespace nsa::kernels::cuda::rank {

// Ranks every seventh query.
template <int kDk, int kStrides>
class Selector {
 public:
  using S = Shape<kDk, kStrides>;
  using Order = typename S::Order;

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
          float* const scores = slot + (query - first_query) * sets_per_query * S::kChunkBlocks;
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
    float score[S::kChunkRows];
#pragma unroll
    for (int j = 0; j < S::kChunkRows; ++j) score[j] = scores[j * 32 + lane_];
#pragma unroll 1
    for (int32_t set = 1; set < sets_per_query; ++set) {
#pragma unroll
      for (int j = 0; j < S::kChunkRows; ++j) {
        score[j] = __fadd_rn(score[j], scores[(set * S::kChunkRows + j) * 32 + lane_]);
      }
    }
    __syncwarp();
    auto* const scratch = reinterpret_cast<uint64_t*>(scores);
    // Of free blocks only. What lies past the last tile was left by others, and is past the last
    // free block as well.
    const int32_t first_block = chunk * Order::kTileBlocks + Order::FirstBlock(lane_);
    const int32_t begin = args_.dims.num_initial_blocks - first_block;
    const int32_t end = num_candidates - args_.dims.num_local_blocks - first_block;
    uint32_t key[S::kChunkRows];
#pragma unroll
    for (int j = 0; j < S::kChunkRows; ++j) {
      key[j] = Order::RowBlock(j) >= begin && Order::RowBlock(j) < end ? ScoreKey(score[j]) : 0;
    }
    // Each lane's best, then each lane's second best, until none is better than what there is.
    for (;;) {
      uint32_t top[2] = {0, 0};  // of either half, for a shorter chain
      int32_t top_row[2] = {0, S::kChunkRows / 2};
#pragma unroll
      for (int j = 0; j < S::kChunkRows / 2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = half * (S::kChunkRows / 2) + j;
          if (key[row] > top[half]) {
            top[half] = key[row];
            top_row[half] = row;
          }
        }
      }
      const bool is_second = top[1] > top[0];
      const uint32_t best_key = is_second ? top[1] : top[0];
      const int32_t best_row = is_second ? top_row[1] : top_row[0];
      RankedBlock added;
      if (best_key > 0) {
        added = {best_key, ~static_cast<uint32_t>(first_block + Order::RowBlock(best_row))};
      }
      if (!best.Add(added, args_.num_free, scratch)) return;
#pragma unroll
      for (int j = 0; j < S::kChunkRows; ++j) {
        if (j == best_row) key[j] = 0;
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

}  // namespace nsa::kernels::cuda::rank

#endif  // KERNELS_CUDA_SCORE_SELECT_SELECTOR_CUH_
