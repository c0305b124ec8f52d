// Importance of select blocks and top-n for any shape, on any GPU, from q, packed keys and lse.
//
// A CTA of four warps owns one, two or four queries in a row of one kv head. A warp takes 16 of a
// query's heads at a time, one or more warps a query, and the CTA walks the document's summaries 32
// a step. The probabilities of a step, summed over the heads, go to a ring, from which the query's
// first warp makes the scores of blocks as they become complete, and keeps the best of them.
//
// Shared memory: [2] of K [32,Dk], q of the warps [4][16,Dk], then of each query the best blocks
// [free places], and the ring; then sums of the warps [4][32]. 99 KiB, what all GPUs have, suffice.
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_tiles.cuh"
#include "kernels/cuda/warp_attention.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kStepSummaries = 32;
// Summaries whose blocks are scored together; it takes longer blocks one by one.
constexpr int kBatchSummaries = 128;
// Probabilities that blocks still have to be scored from: a step, a batch or a block of up to 256
// strides, and a compression block's reach of up to 255.
constexpr int kRing = 640;
constexpr int32_t kMaxSharedBytes = 99 << 10;
constexpr float kLog2E = 1.4426950408889634f;

struct RankGeometry {
  int32_t warps_per_query;  // 1, 2, 4
  int32_t sets_per_warp;    // of 16 heads
  int32_t num_free;         // places that are not forced
  int32_t shared_bytes;

  __host__ __device__ int32_t queries() const { return kWarps / warps_per_query; }
};

// The best blocks of one query so far. All lanes of its first warp.
class FreeBlocks {
 public:
  __device__ FreeBlocks(const AttentionDims& dims, int32_t num_free, uint64_t* best,
                        const float* ring)
      : dims_(dims), num_free_(num_free), best_(best), ring_(ring) {
    for (int32_t i = Lane(); i < num_free; i += 32) best_[i] = 0;
    __syncwarp();
  }

  // Takes blocks below `end`, whose probabilities are complete; `is_last`: there will be no more.
  __device__ void Add(int32_t end, bool is_last) {
    const int32_t strides = dims_.select_block_tokens / dims_.compress_stride_tokens;
    const int32_t batch = min(32, max(1, kBatchSummaries / strides));
    if (end - next_ < batch && !is_last) return;
    for (; next_ < end; next_ += 32) {
      const int32_t block = next_ + Lane();
      uint64_t key = 0;
      if (block < end && block >= dims_.num_initial_blocks) {
        const float score = fmaxf(Score(block, strides), 0.0f);
        key = (static_cast<uint64_t>(__float_as_uint(score)) + 1) << 32 |
              ~static_cast<uint32_t>(block);
      }
      for (uint32_t left = __ballot_sync(kFullWarp, key > worst_); left != 0; left &= left - 1) {
        const uint64_t added = __shfl_sync(kFullWarp, key, __ffs(left) - 1);
        if (added <= worst_) continue;
        __syncwarp();  // all lanes have read best_
        if (Lane() == 0) best_[worst_place_] = added;
        __syncwarp();
        FindWorst();
      }
    }
    next_ = end;
  }

  // Writes [n] the chosen blocks, the forced ones included, in ascending order.
  __device__ void Store(int32_t num_candidates, int32_t* to) const {
    const int32_t num_selected = dims_.num_selected_blocks;
    for (int32_t i = Lane(); i < num_selected; i += 32) {
      if (num_candidates <= num_selected) {
        to[i] = i < num_candidates ? i : -1;
      } else if (i < dims_.num_initial_blocks) {
        to[i] = i;
      } else if (i >= num_selected - dims_.num_local_blocks) {
        to[i] = num_candidates - num_selected + i;
      }
    }
    if (num_candidates <= num_selected) return;
    for (int32_t i = Lane(); i < num_free_; i += 32) {
      const uint32_t block = ~static_cast<uint32_t>(best_[i]);
      int32_t rank = 0;
      for (int32_t j = 0; j < num_free_; ++j) {
        rank += ~static_cast<uint32_t>(best_[j]) < block ? 1 : 0;
      }
      to[dims_.num_initial_blocks + rank] = static_cast<int32_t>(block);
    }
  }

 private:
  __device__ static int32_t Lane() { return threadIdx.x % 32; }

  // NSA equations 9 and 10: a compression block counts as often as its strides lie in the block.
  __device__ float Score(int32_t block, int32_t strides) const {
    const int32_t reach = dims_.compress_block_tokens / dims_.compress_stride_tokens - 1;
    const int32_t begin = block * strides, end = begin + strides;
    const int32_t first = max(begin - reach, 0);
    int32_t place = first % kRing;
    float score = 0.0f;
    for (int32_t i = first; i < end; ++i) {
      const int32_t count = min(i + reach + 1, end) - max(i, begin);
      score = __fmaf_rn(static_cast<float>(count), ring_[place], score);
      if (++place == kRing) place = 0;
    }
    return score;
  }

  __device__ void FindWorst() {
    worst_ = ~uint64_t{0};
    worst_place_ = 0;
    for (int32_t i = Lane(); i < num_free_; i += 32) {
      if (best_[i] < worst_) {
        worst_ = best_[i];
        worst_place_ = i;
      }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const uint64_t other = __shfl_xor_sync(kFullWarp, worst_, mask);
      const int32_t other_place = __shfl_xor_sync(kFullWarp, worst_place_, mask);
      if (other < worst_ || (other == worst_ && other_place < worst_place_)) {
        worst_ = other;
        worst_place_ = other_place;
      }
    }
  }

  const AttentionDims& dims_;
  const int32_t num_free_;
  uint64_t* const best_;  // [num_free] score, ~block
  const float* const ring_;
  int32_t next_ = 0;  // the first block that is not scored
  uint64_t worst_ = 0;
  int32_t worst_place_ = 0;
};

// What a warp does of one query.
template <class T>
class Heads {
 public:
  __device__ Heads(const ScoreAndSelectParams& params, const float* lse, int64_t row,
                   int32_t kv_head, SharedQ& q)
      : params_(params),
        lse_(lse),
        row_(row),
        group_size_(params.dims.num_q_heads / params.dims.num_kv_heads),
        first_head_(kv_head * group_size_),
        q_(q) {}

  // 16 heads of the group from `first` on, as far as there are. To be waited for.
  __device__ void Load(int32_t first) {
    const ConstTensor3& tensor = params_.queries.q;
    q_.Load([&](int i) {
      return first + i < group_size_
                 ? static_cast<const char*>(tensor.data) +
                       (row_ * tensor.row_stride + (first_head_ + first + i) * tensor.head_stride) *
                           2
                 : nullptr;
    });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t head = first + threadIdx.x % 32 / 4 + 8 * r;
      // A row without a head has no probabilities.
      shift_[r] = head < group_size_
                      ? -lse_[row_ * params_.dims.num_q_heads + first_head_ + head] * kLog2E
                      : -INFINITY;
    }
  }

  // Adds the probabilities of the keys at a shared address to the sums of this lane's columns.
  __device__ void AddProbabilities(uint32_t keys, float (&sums)[kStepSummaries / 8][2]) const {
    const float scale_log2 = params_.dims.softmax_scale * kLog2E;
    float s[kStepSummaries / 8][4] = {};
    const uint32_t keys_lane = keys + threadIdx.x % 32 * 16;
    for (int group = 0; group < q_.num_groups(); ++group) {
      uint4 a[2];
      q_.Get(group, a);
#pragma unroll
      for (int j = 0; j < kStepSummaries / 8; ++j) {
        uint32_t b[4];
        LoadMatrices(b, keys_lane + (j * q_.num_groups() + group) * 512);
        MultiplyAdd<T>(s[j], a[0].x, a[0].y, a[0].z, a[0].w, b[0], b[1]);
        MultiplyAdd<T>(s[j], a[1].x, a[1].y, a[1].z, a[1].w, b[2], b[3]);
      }
    }
#pragma unroll
    for (int j = 0; j < kStepSummaries / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sums[j][e] += Exp2(__fmaf_rn(s[j][e], scale_log2, shift_[0])) +
                      Exp2(__fmaf_rn(s[j][2 + e], scale_log2, shift_[1]));
      }
    }
  }

 private:
  const ScoreAndSelectParams& params_;
  const float* const lse_;
  const int64_t row_;
  const int32_t group_size_;
  const int32_t first_head_;
  SharedQ& q_;
  float shift_[2];
};

// Queries [first, first + count) of the CTA, which are of one segment; the first one is at `place`.
template <class T>
__device__ void RankRun(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                        const RankGeometry& geometry, int32_t kv_head, int64_t cta_row,
                        int32_t first, int32_t count, const QueryPlace& place, char* memory) {
  const AttentionDims& dims = params.dims;
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t query = warp / geometry.warps_per_query;
  const int32_t part = warp % geometry.warps_per_query;  // of the query
  const bool is_mine = query >= first && query < first + count;
  const int64_t row = cta_row + query;
  const int64_t position = place.position + query - first;

  const int32_t key_bytes = kStepSummaries * dims.head_dim_qk * 2;
  char* const q_memory = memory + 2 * key_bytes;
  auto* const best =
      reinterpret_cast<uint64_t*>(q_memory + kWarps * kTileRows * dims.head_dim_qk * 2);
  auto* const rings = reinterpret_cast<float*>(best + geometry.queries() * geometry.num_free);
  float* const parts = rings + geometry.queries() * kRing;
  float* const ring = rings + query * kRing;
  const uint32_t keys = SharedAddress(memory);

  const auto num_candidates = [&](int64_t at) {
    return static_cast<int32_t>(at / dims.select_block_tokens) + 1;
  };
  // Blocks that may be chosen, and have to be scored.
  const auto end_block = [&](int64_t at) {
    const bool ranks = geometry.num_free > 0 && num_candidates(at) > dims.num_selected_blocks;
    return ranks ? num_candidates(at) - dims.num_local_blocks : 0;
  };
  const int32_t strides = dims.select_block_tokens / dims.compress_stride_tokens;
  const int32_t my_end = is_mine ? end_block(position) : 0;
  const int32_t my_visible = is_mine ? NumVisible(dims, static_cast<uint32_t>(position)) : 0;
  const int64_t last = place.position + count - 1;
  const int32_t num_steps = (end_block(last) * strides + kStepSummaries - 1) / kStepSummaries;
  const int32_t num_copied =
      min(num_steps,
          (NumVisible(dims, static_cast<uint32_t>(last)) + kStepSummaries - 1) / kStepSummaries);
  const int64_t first_summary =
      (kv_head * scratch.num_tiles +
       TileBegin(params.queries.documents[place.document].cmp_block_begin, place.document)) *
      kTileSummaries;
  const char* const from =
      static_cast<const char*>(scratch.keys) + first_summary * dims.head_dim_qk * 2;
  const auto start = [&](int32_t step) {
    if (step < num_copied) {
      for (int32_t i = threadIdx.x * 16; i < key_bytes; i += kThreads * 16) {
        CopyAsync16(keys + step % 2 * key_bytes + i, from + int64_t{step} * key_bytes + i, true);
      }
    }
    CopyAsyncCommit();
  };

  SharedQ q(reinterpret_cast<uint4*>(q_memory) + warp * dims.head_dim_qk * 2, dims.head_dim_qk,
            params.queries.q.data);
  Heads<T> heads(params, scratch.lse, row, kv_head, q);
  __syncthreads();  // the run before is done with the memory
  FreeBlocks free_blocks(dims, part == 0 ? geometry.num_free : 0, best + query * geometry.num_free,
                         ring);
  if (my_end > 0) heads.Load(part * kTileRows);
  start(0);
  for (int32_t step = 0; step < num_steps; ++step) {
    CopyAsyncWait<0>();
    __syncthreads();  // the step is there, and the one before has been read
    start(step + 1);
    const int32_t num_left = my_visible - step * kStepSummaries;
    float sums[kStepSummaries / 8][2] = {};
    if (num_left > 0 && step * kStepSummaries < my_end * strides) {
      for (int32_t i = 0; i < geometry.sets_per_warp; ++i) {
        if (geometry.sets_per_warp > 1) {
          heads.Load((i * geometry.warps_per_query + part) * kTileRows);
          q.WaitUntilLoaded();
        }
        heads.AddProbabilities(keys + step % 2 * key_bytes, sums);
      }
    }
#pragma unroll
    for (int j = 0; j < kStepSummaries / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t column = j * 8 + lane % 4 * 2 + e;
        float sum = sums[j][e];
        for (int mask = 4; mask <= 16; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
        if (lane < 4) parts[warp * kStepSummaries + column] = column < num_left ? sum : 0.0f;
      }
    }
    if (geometry.warps_per_query > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    if (part != 0 || my_end == 0) continue;
    float total = 0.0f;
    for (int32_t w = 0; w < geometry.warps_per_query; ++w) {
      total += parts[(warp + w) * kStepSummaries + lane];
    }
    ring[(step * kStepSummaries + lane) % kRing] = total;
    __syncwarp();
    const int32_t complete = (step + 1) * kStepSummaries / strides;
    free_blocks.Add(min(complete, my_end), complete >= my_end);
  }
  if (is_mine && part == 0) {
    free_blocks.Store(
        num_candidates(position),
        params.block_indices + (row * dims.num_kv_heads + kv_head) * dims.num_selected_blocks);
  }
}

// Grid: [queries / queries of a CTA * kv heads]; the last queries, which see most, first.
template <class T>
__global__ void __launch_bounds__(kThreads)
    RankBlocksAnyKernel(const __grid_constant__ ScoreAndSelectParams params,
                        const __grid_constant__ ScoreSelectScratch scratch,
                        const __grid_constant__ RankGeometry geometry) {
  extern __shared__ __align__(16) char memory[];
  const int64_t num_queries = params.queries.num_tokens;
  const int64_t num_groups = (num_queries + geometry.queries() - 1) / geometry.queries();
  const int64_t index = gridDim.x - 1 - blockIdx.x;
  const int32_t kv_head = params.queries.kv_heads.begin + static_cast<int32_t>(index / num_groups);
  const int64_t row = index % num_groups * geometry.queries();
  const int32_t num_rows =
      static_cast<int32_t>(min(int64_t{geometry.queries()}, num_queries - row));
  for (int32_t first = 0, count; first < num_rows; first += count) {
    const QueryPlace place = FindQuery(params.queries, row + first);
    count = place.document < 0
                ? 1
                : static_cast<int32_t>(min(place.num_queries, int64_t{num_rows - first}));
    if (place.document >= 0) {
      RankRun<T>(params, scratch, geometry, kv_head, row, first, count, place, memory);
    }
  }
}

// As few warps a query as take a step of its heads at once, so that none idles; more where the
// memory for the best blocks of so many queries is missing. By the dims alone.
RankGeometry MakeGeometry(const AttentionDims& dims) {
  const int32_t num_sets = (dims.group_size() + kTileRows - 1) / kTileRows;
  RankGeometry g{};
  g.num_free = dims.num_selected_blocks - dims.num_initial_blocks - dims.num_local_blocks;
  for (g.warps_per_query = 1; g.warps_per_query <= kWarps; g.warps_per_query *= 2) {
    g.sets_per_warp = (num_sets + g.warps_per_query - 1) / g.warps_per_query;
    const int32_t of_query = g.num_free * static_cast<int32_t>(sizeof(uint64_t)) +
                             kRing * static_cast<int32_t>(sizeof(float));
    g.shared_bytes = (2 * kStepSummaries + kWarps * kTileRows) * dims.head_dim_qk * 2 +
                     g.queries() * of_query +
                     kWarps * kStepSummaries * static_cast<int32_t>(sizeof(float));
    const bool fits = g.shared_bytes <= kMaxSharedBytes;
    if (g.warps_per_query == kWarps || (g.sets_per_warp == 1 && fits)) break;
  }
  return g;
}

template <class T>
cudaError_t Launch(const ScoreAndSelectParams& params, const ScoreSelectScratch& scratch,
                   cudaStream_t stream) {
  const RankGeometry geometry = MakeGeometry(params.dims);
  const auto kernel = RankBlocksAnyKernel<T>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, geometry.shared_bytes);
  if (error != cudaSuccess) return error;
  const int64_t num_groups =
      (params.queries.num_tokens + geometry.queries() - 1) / geometry.queries();
  kernel<<<static_cast<unsigned>(num_groups * params.queries.kv_heads.size()), kThreads,
           geometry.shared_bytes, stream>>>(params, scratch, geometry);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchRankBlocksAny(const ScoreAndSelectParams& params,
                                const ScoreSelectScratch& scratch, cudaStream_t stream) {
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, scratch, stream)
                                           : Launch<__half>(params, scratch, stream);
}

}  // namespace nsa::kernels::cuda
