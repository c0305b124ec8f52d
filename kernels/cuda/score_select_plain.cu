// Compressed attention, importance and top-n for any dims, in plain arithmetic.
//
// Grid: [T, Hkv]. A CTA of four warps owns one query of one kv head and walks the document's
// summaries twice in tiles of 32, a lane for each summary and heads one after another: once for the
// output and lse, once for the probabilities, from which a first warp makes scores and keeps the
// best blocks.
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/score_select_stages.h"

namespace nsa::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr int kTile = 32;
constexpr int kHeadsPerWarp = 2;
constexpr int kChunkHeads = kWarps * kHeadsPerWarp;
constexpr int kMaxDim = 256;
constexpr int kRowPadding = 2;  // so that 32 rows of a column are in 32 banks
// Probabilities that blocks still have to be scored from: a tile, a select block of up to 256
// strides, and a compression block's reach of up to 255.
constexpr int kRing = 1024;

struct Shared {
  uint16_t keys[kTile][kMaxDim + kRowPadding];
  uint16_t values[kTile][kMaxDim + kRowPadding];
  float q[kChunkHeads][kMaxDim];
  float warp_probability[kWarps][kTile];
  float probability[kRing];  // summed over the heads
};

template <class T>
class PlainQuery {
 public:
  __device__ PlainQuery(const ScoreAndSelectParams& params, Shared& shared, uint64_t* best,
                        float* lse, const QueryPlace& place)
      : params_(params),
        dims_(params.dims),
        shared_(shared),
        group_size_(params.dims.num_q_heads / params.dims.num_kv_heads),
        kv_head_(params.queries.kv_heads.begin + blockIdx.y),
        best_(best),
        lse_(lse),
        position_(place.position),
        first_summary_(params.queries.documents[place.document].cmp_block_begin) {
    const int64_t past_first = position_ + 1 - dims_.compress_block_tokens;
    num_visible_ = past_first < 0 ? 0 : past_first / dims_.compress_stride_tokens + 1;
  }

  __device__ void Run() {
    for (int32_t chunk = 0; chunk < group_size_; chunk += kChunkHeads) Attend(chunk);
    __syncthreads();
    const int64_t num_candidates = position_ / dims_.select_block_tokens + 1;
    if (num_candidates > dims_.num_selected_blocks && NumFree() > 0) Rank(num_candidates);
    if (warp_ == 0) Store(num_candidates);
  }

 private:
  __device__ int32_t NumFree() const {
    return dims_.num_selected_blocks - dims_.num_initial_blocks - dims_.num_local_blocks;
  }
  __device__ int32_t NumHeads(int32_t chunk) const {
    const int32_t left = group_size_ - chunk;
    return left < kChunkHeads ? left : kChunkHeads;
  }
  __device__ int64_t Head(int32_t head) const {
    return static_cast<int64_t>(kv_head_) * group_size_ + head;
  }

  __device__ void LoadQueries(int32_t chunk) {
    const T* const q = static_cast<const T*>(params_.queries.q.data);
    for (int32_t i = threadIdx.x; i < NumHeads(chunk) * dims_.head_dim_qk; i += kThreads) {
      const int32_t head = i / dims_.head_dim_qk, dim = i % dims_.head_dim_qk;
      shared_.q[head][dim] =
          static_cast<float>(q[blockIdx.x * params_.queries.q.row_stride +
                               Head(chunk + head) * params_.queries.q.head_stride + dim]);
    }
  }

  // Rows past the last visible one are zero.
  __device__ void LoadTile(const ConstTensor3& summaries, int32_t dim, int64_t tile,
                           uint16_t (&to)[kTile][kMaxDim + kRowPadding]) {
    const uint16_t* const from = static_cast<const uint16_t*>(summaries.data);
    for (int32_t i = threadIdx.x; i < kTile * dim; i += kThreads) {
      const int64_t summary = tile + i / dim;
      to[i / dim][i % dim] = summary < num_visible_
                                 ? from[(first_summary_ + summary) * summaries.row_stride +
                                        kv_head_ * summaries.head_stride + i % dim]
                                 : uint16_t{0};
    }
  }

  // Logits of this lane's summary and the warp's heads, -inf where it is not seen.
  __device__ void Logits(int64_t tile, float (&logit)[kHeadsPerWarp]) const {
    float sum[kHeadsPerWarp] = {};
    for (int32_t d = 0; d < dims_.head_dim_qk; d += 2) {
      const float2 k = Unpack2<T>(*reinterpret_cast<const uint32_t*>(&shared_.keys[lane_][d]));
#pragma unroll
      for (int h = 0; h < kHeadsPerWarp; ++h) {
        const float2 q = *reinterpret_cast<const float2*>(&shared_.q[warp_ + h * kWarps][d]);
        sum[h] = __fmaf_rn(q.x, k.x, sum[h]);
        sum[h] = __fmaf_rn(q.y, k.y, sum[h]);
      }
    }
#pragma unroll
    for (int h = 0; h < kHeadsPerWarp; ++h) {
      logit[h] = tile + lane_ < num_visible_ ? sum[h] * dims_.softmax_scale : -INFINITY;
    }
  }

  __device__ static float Max(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, mask));
    return x;
  }
  __device__ static float Sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kFullWarp, x, mask);
    return x;
  }

  __device__ void Attend(int32_t chunk) {
    constexpr int kPairs = kMaxDim / 64;  // of neighbouring dimensions, in a lane
    float max[kHeadsPerWarp], sum[kHeadsPerWarp] = {}, o[kHeadsPerWarp][kPairs][2] = {};
    for (int h = 0; h < kHeadsPerWarp; ++h) max[h] = -1e30f;
    __syncthreads();
    LoadQueries(chunk);
    for (int64_t tile = 0; tile < num_visible_; tile += kTile) {
      __syncthreads();
      LoadTile(params_.kc, dims_.head_dim_qk, tile, shared_.keys);
      LoadTile(params_.vc, dims_.head_dim_v, tile, shared_.values);
      __syncthreads();
      float p[kHeadsPerWarp];
      Logits(tile, p);
#pragma unroll
      for (int h = 0; h < kHeadsPerWarp; ++h) {
        const float new_max = fmaxf(max[h], Max(p[h]));
        const float rescale = expf(max[h] - new_max);
        p[h] = expf(p[h] - new_max);
        sum[h] = sum[h] * rescale + Sum(p[h]);
        max[h] = new_max;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          o[h][i][0] *= rescale;
          o[h][i][1] *= rescale;
        }
        for (int j = 0; j < kTile; ++j) {
          const float weight = __shfl_sync(kFullWarp, p[h], j);
#pragma unroll
          for (int i = 0; i < kPairs; ++i) {
            if (64 * i >= dims_.head_dim_v) break;
            const float2 v = Unpack2<T>(
                *reinterpret_cast<const uint32_t*>(&shared_.values[j][64 * i + 2 * lane_]));
            o[h][i][0] = __fmaf_rn(weight, v.x, o[h][i][0]);
            o[h][i][1] = __fmaf_rn(weight, v.y, o[h][i][1]);
          }
        }
      }
    }
#pragma unroll
    for (int h = 0; h < kHeadsPerWarp; ++h) {
      const int32_t head = warp_ + h * kWarps;
      if (head >= NumHeads(chunk)) continue;
      const bool sees = num_visible_ > 0;
      const float inverse = sees ? 1.0f / sum[h] : 0.0f;
      T* const to = static_cast<T*>(params_.o_cmp.data) + blockIdx.x * params_.o_cmp.row_stride +
                    Head(chunk + head) * params_.o_cmp.head_stride;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (64 * i >= dims_.head_dim_v) break;
        *reinterpret_cast<uint32_t*>(to + 64 * i + 2 * lane_) =
            Pack2<T>(o[h][i][0] * inverse, o[h][i][1] * inverse);
      }
      if (lane_ == 0) {
        const float lse = sees ? max[h] + logf(sum[h]) : -INFINITY;
        lse_[chunk + head] = lse;
        if (params_.lse_cmp != nullptr) {
          params_
              .lse_cmp[static_cast<int64_t>(blockIdx.x) * dims_.num_q_heads + Head(chunk + head)] =
              lse;
        }
      }
    }
  }

  // Probabilities of a tile's summaries, summed over the heads: each warp over its own, then warps.
  __device__ void Probabilities(int64_t tile) {
    float sum = 0.0f;
    __syncthreads();
    if (tile < num_visible_) {
      LoadTile(params_.kc, dims_.head_dim_qk, tile, shared_.keys);
      for (int32_t chunk = 0; chunk < group_size_; chunk += kChunkHeads) {
        if (chunk > 0) __syncthreads();
        LoadQueries(chunk);
        __syncthreads();
        float logit[kHeadsPerWarp];
        Logits(tile, logit);
#pragma unroll
        for (int h = 0; h < kHeadsPerWarp; ++h) {
          const int32_t head = warp_ + h * kWarps;
          if (head < NumHeads(chunk)) sum += expf(logit[h] - lse_[chunk + head]);
        }
      }
    }
    shared_.warp_probability[warp_][lane_] = sum;
    __syncthreads();
    if (warp_ == 0) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += shared_.warp_probability[w][lane_];
      shared_.probability[(tile + lane_) % kRing] = total;
      __syncwarp();
    }
  }

  // NSA equations 9 and 10: a compression block counts as often as its strides lie in the block.
  __device__ float Score(int64_t block, int32_t strides, int32_t reach) const {
    const int64_t begin = block * strides, end = begin + strides;
    float score = 0.0f;
    for (int64_t i = begin - reach < 0 ? 0 : begin - reach; i < end; ++i) {
      const int64_t first = i > begin ? i : begin;
      const int64_t past = i + reach + 1 < end ? i + reach + 1 : end;
      score = __fmaf_rn(static_cast<float>(past - first), shared_.probability[i % kRing], score);
    }
    return score;
  }

  // The least of best_ and its place. First warp.
  __device__ void FindWorst(uint64_t& worst, int32_t& worst_place) const {
    worst = ~uint64_t{0};
    worst_place = 0;
    for (int32_t i = lane_; i < NumFree(); i += 32) {
      if (best_[i] < worst) {
        worst = best_[i];
        worst_place = i;
      }
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      const uint64_t other = __shfl_xor_sync(kFullWarp, worst, mask);
      const int32_t other_place = __shfl_xor_sync(kFullWarp, worst_place, mask);
      if (other < worst || (other == worst && other_place < worst_place)) {
        worst = other;
        worst_place = other_place;
      }
    }
  }

  // Leaves the free blocks in best_, as score and ~block.
  __device__ void Rank(int64_t num_candidates) {
    const int32_t strides = dims_.select_block_tokens / dims_.compress_stride_tokens;
    const int32_t reach = dims_.compress_block_tokens / dims_.compress_stride_tokens - 1;
    const int64_t end_block = num_candidates - dims_.num_local_blocks;
    uint64_t worst = 0;
    int32_t worst_place = 0;
    if (warp_ == 0) {
      for (int32_t i = lane_; i < NumFree(); i += 32) best_[i] = 0;
      __syncwarp();
    }
    int64_t block = 0;  // the next to be scored
    for (int64_t tile = 0; block < end_block; tile += kTile) {
      Probabilities(tile);
      const int64_t complete = (tile + kTile) / strides;
      const int64_t end = complete < end_block ? complete : end_block;
      for (; block < end; block += 32) {
        if (warp_ != 0) continue;
        const int64_t mine = block + lane_;
        uint64_t key = 0;
        if (mine < end && mine >= dims_.num_initial_blocks) {
          const float score = fmaxf(Score(mine, strides, reach), 0.0f);
          key = (static_cast<uint64_t>(__float_as_uint(score)) + 1) << 32 |
                ~static_cast<uint32_t>(mine);
        }
        for (int32_t source = 0; source < 32; ++source) {
          const uint64_t added = __shfl_sync(kFullWarp, key, source);
          if (added <= worst) continue;
          __syncwarp();  // all lanes have read best_
          if (lane_ == 0) best_[worst_place] = added;
          __syncwarp();
          FindWorst(worst, worst_place);
        }
      }
      if (block > end) block = end;
    }
  }

  // First warp.
  __device__ void Store(int64_t num_candidates) const {
    const int32_t num_selected = dims_.num_selected_blocks;
    int32_t* const to =
        params_.block_indices +
        (static_cast<int64_t>(blockIdx.x) * dims_.num_kv_heads + kv_head_) * num_selected;
    for (int32_t i = lane_; i < num_selected; i += 32) {
      if (num_candidates <= num_selected) {
        to[i] = i < num_candidates ? i : -1;
      } else if (i < dims_.num_initial_blocks) {
        to[i] = i;
      } else if (i >= num_selected - dims_.num_local_blocks) {
        to[i] = static_cast<int32_t>(num_candidates) - num_selected + i;
      }
    }
    if (num_candidates <= num_selected) return;
    for (int32_t i = lane_; i < NumFree(); i += 32) {
      const uint32_t block = ~static_cast<uint32_t>(best_[i]);
      int32_t rank = 0;
      for (int32_t j = 0; j < NumFree(); ++j) {
        rank += ~static_cast<uint32_t>(best_[j]) < block ? 1 : 0;
      }
      to[dims_.num_initial_blocks + rank] = static_cast<int32_t>(block);
    }
  }

  const ScoreAndSelectParams& params_;
  const AttentionDims& dims_;
  Shared& shared_;
  const int32_t group_size_;
  const int32_t kv_head_;
  uint64_t* const best_;  // [free places]
  float* const lse_;      // [G]
  const int64_t position_;
  const int64_t first_summary_;
  int64_t num_visible_;
  const int32_t warp_ = threadIdx.x / 32;
  const int32_t lane_ = threadIdx.x % 32;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    ScoreSelectPlainKernel(const __grid_constant__ ScoreAndSelectParams params) {
  extern __shared__ __align__(16) char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  auto* const best = reinterpret_cast<uint64_t*>(dynamic + sizeof(Shared));
  auto* const lse = reinterpret_cast<float*>(best + params.dims.num_selected_blocks);
  const QueryPlace place = FindQuery(params.queries, blockIdx.x);
  if (place.document < 0) return;
  PlainQuery<T>(params, shared, best, lse, place).Run();
}

template <class T>
cudaError_t Launch(const ScoreAndSelectParams& params, cudaStream_t stream) {
  static_assert(sizeof(Shared) % 8 == 0);
  const AttentionDims& dims = params.dims;
  const size_t num_bytes = sizeof(Shared) + sizeof(uint64_t) * dims.num_selected_blocks +
                           sizeof(float) * dims.group_size();
  const auto kernel = ScoreSelectPlainKernel<T>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(num_bytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(params.queries.num_tokens),
                  static_cast<unsigned>(params.queries.kv_heads.size()));
  kernel<<<grid, kThreads, num_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchScoreSelectPlain(const ScoreAndSelectParams& params, cudaStream_t stream) {
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, stream)
                                           : Launch<__half>(params, stream);
}

}  // namespace nsa::kernels::cuda
