// Softmax attention of one warp: 16 rows over tiles of at most 64 keys that lie in shared memory in
// the layout of a record (record_layout.h).
//
// A row is a (query, head) pair; lane 4g + c works on rows g and g + 8. What a row becomes depends
// on its own keys only: a tile of which it sees nothing leaves it as it is, bit for bit.
#ifndef KERNELS_CUDA_WARP_ATTENTION_CUH_
#define KERNELS_CUDA_WARP_ATTENTION_CUH_

#include <cfloat>
#include <cstdint>

#include "kernels/cuda/ptx.cuh"

namespace nsa::kernels::cuda {

constexpr int kTileKeys = 64;
constexpr int kTileRows = 16;

// q of a warp's rows in registers.
template <int kDk>
class RegisterQ {
 public:
  // row_at(i): address of row i, null for one that is to be zero.
  template <class RowAt>
  __device__ void Load(const RowAt& row_at) {
    const int lane = LaneNow();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const char* const row = row_at(lane / 4 + 8 * r);
#pragma unroll
      for (int group = 0; group < kDk / 32; ++group) {
        rows_[group][r] = make_uint4(0, 0, 0, 0);
        if (row != nullptr) {
          rows_[group][r] = reinterpret_cast<const uint4*>(row)[group * 4 + lane % 4];
        }
      }
    }
  }

  // A matrix instruction wants its operand in four registers in a row, and here the values of two
  // rows take turns: they have to move. A shuffle moves them once; a plain copy the compiler would
  // do over before every use.
  __device__ void WaitUntilLoaded() {
    const int lane = threadIdx.x % 32;
    const auto move = [&](uint32_t value) { return __shfl_sync(kFullWarp, value, lane); };
#pragma unroll
    for (int group = 0; group < kDk / 32; ++group) {
      const uint4 &low = rows_[group][0], &high = rows_[group][1];
      operands_[2 * group] = {move(low.x), move(high.x), move(low.y), move(high.y)};
      operands_[2 * group + 1] = {move(low.z), move(high.z), move(low.w), move(high.w)};
    }
  }

  // Operands of dimensions [32 * group, 32 * group + 32), as the layout of records orders them.
  __device__ void Get(int group, uint4 (&operands)[2]) const {
    operands[0] = operands_[2 * group];
    operands[1] = operands_[2 * group + 1];
  }
  __device__ static constexpr int num_groups() { return kDk / 32; }

 private:
  uint4 rows_[kDk / 32][2];
  uint4 operands_[kDk / 16];
};

// The same in shared memory, for any Dk, loaded asynchronously; each lane reads what it loaded.
class SharedQ {
 public:
  // `memory` is of this warp, kTileRows * Dk * 2 bytes. `anywhere` may be read.
  __device__ SharedQ(uint4* memory, int head_dim, const void* anywhere)
      : memory_(memory + threadIdx.x % 32), num_groups_(head_dim / 32), anywhere_(anywhere) {}

  template <class RowAt>
  __device__ void Load(const RowAt& row_at) {
    const int lane = LaneNow();
    for (int r = 0; r < 2; ++r) {
      const char* const row = row_at(lane / 4 + 8 * r);
      const char* const from =
          row != nullptr ? row + lane % 4 * 16 : static_cast<const char*>(anywhere_);
      for (int group = 0; group < num_groups_; ++group) {
        CopyAsync16(SharedAddress(Place(group, r)), row != nullptr ? from + group * 64 : from,
                    row != nullptr);
      }
    }
    CopyAsyncCommit();
  }
  __device__ void WaitUntilLoaded() const { CopyAsyncWait<0>(); }

  __device__ void Get(int group, uint4 (&operands)[2]) const {
    const uint4 low = *Place(group, 0), high = *Place(group, 1);
    operands[0] = make_uint4(low.x, high.x, low.y, high.y);
    operands[1] = make_uint4(low.z, high.z, low.w, high.w);
  }
  __device__ int num_groups() const { return num_groups_; }

 private:
  __device__ uint4* Place(int group, int r) const { return memory_ + (group * 2 + r) * 32; }

  uint4* const memory_;
  const int num_groups_;
  const void* const anywhere_;
};

// Keys of a tile that each of a lane's two rows sees.
struct VisibleKeys {
  int begin[2];
  int end[2];
};

// What a lane adds to the address of values for MultiplyValues: lanes address two matrices of 8
// tokens each, for two matrices of dimensions.
template <int kDim>
__device__ inline uint32_t ValuesLane(uint32_t values, int lane) {
  return values + lane / 8 % 2 * (kDim * 16) + lane / 16 * 128 + lane % 8 * 16;
}

// sums [16,kDim] += a [16,16] * values [16 tokens,kDim] of a record.
template <class T, int kDim>
__device__ __forceinline__ void MultiplyValues(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                               uint32_t values_lane, float (&sums)[kDim / 8][4]) {
#pragma unroll
  for (int m = 0; m < kDim / 8; m += 2) {
    uint32_t b[4];
    LoadMatricesTransposed(b, values_lane + m * 128);
    MultiplyAdd<T>(sums[m], a0, a1, a2, a3, b[0], b[1]);
    MultiplyAdd<T>(sums[m + 1], a0, a1, a2, a3, b[2], b[3]);
  }
}

template <class T, int kDv>
class WarpAttention {
 public:
  // scale_log2 = softmax scale * log2(e)
  __device__ explicit WarpAttention(float scale_log2) : scale_log2_(scale_log2) { Reset(); }

  __device__ void Reset() {
#pragma unroll
    for (int i = 0; i < kDv / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o_[i][e] = 0.0f;
    }
    // Finite, so that a tile without a visible key makes no inf - inf.
    max_[0] = max_[1] = -FLT_MAX;
    sum_[0] = sum_[1] = 0.0f;
  }

  // The tile's keys and values at shared addresses `k` and `v`. kWidth: the number of keys, or 0
  // when it is `width`, a multiple of 16. `visible` bounds what rows see if kMasked.
  template <int kWidth, bool kMasked, class Q>
  __device__ void Attend(const Q& q, uint32_t k, uint32_t v, int width,
                         const VisibleKeys& visible) {
    const int lane = LaneNow();
    constexpr int kKeys = kWidth != 0 ? kWidth : kTileKeys;  // at most
    const int num_keys = kWidth != 0 ? kWidth : width;

    // s = q k^T
    float s[kKeys / 8][4];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = 0.0f;
    }
    const uint32_t k_lane = k + lane * 16;
#pragma unroll
    for (int group = 0; group < q.num_groups(); ++group) {
      uint4 a[2];
      q.Get(group, a);
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        if (kWidth == 0 && j * 8 >= num_keys) break;
        uint32_t b[4];
        LoadMatrices(b, k_lane + (j * q.num_groups() + group) * 512);
        MultiplyAdd<T>(s[j], a[0].x, a[0].y, a[0].z, a[0].w, b[0], b[1]);
        MultiplyAdd<T>(s[j], a[1].x, a[1].y, a[1].z, a[1].w, b[2], b[3]);
      }
    }

    if constexpr (kMasked || kWidth == 0) {
      const int first_key = lane % 4 * 2;  // of this lane: what is left to compare are constants
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int key = j * 8 + e % 2;
          bool hidden = kWidth == 0 && key >= num_keys - first_key;
          if (kMasked) {
            hidden |= key < visible.begin[e / 2] - first_key;
            hidden |= key >= visible.end[e / 2] - first_key;
          }
          if (hidden) s[j][e] = -INFINITY;
        }
      }
    }

    // p = exp(s - max), and what is there already follows the maximum.
    float max_log2[2];
    float factor[2];
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float row_max = max_[r];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        row_max = fmaxf(row_max, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
      }
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 2));
      max_log2[r] = MaxLog2(row_max);
      factor[r] = Exp2(MaxLog2(max_[r]) - max_log2[r]);
      changed |= row_max != max_[r];
      max_[r] = row_max;
    }
    // Mostly no maximum moves, and to multiply by one changes nothing.
    if (__any_sync(kFullWarp, changed)) {
#pragma unroll
      for (int i = 0; i < kDv / 8; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) o_[i][e] *= factor[e / 2];
      }
      sum_[0] *= factor[0];
      sum_[1] *= factor[1];
    }
    uint32_t p[kKeys / 8][2];
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float p0 = Exp2(fmaf(s[j][2 * r], scale_log2_, -max_log2[r]));
        const float p1 = Exp2(fmaf(s[j][2 * r + 1], scale_log2_, -max_log2[r]));
        sum_[r] += p0 + p1;
        p[j][r] = Pack2<T>(p0, p1);
      }
    }

    // o += p v
    const uint32_t v_lane = ValuesLane<kDv>(v, lane);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) {
      if (kWidth == 0 && i * 16 >= num_keys) break;
      MultiplyValues<T, kDv>(p[2 * i][0], p[2 * i][1], p[2 * i + 1][0], p[2 * i + 1][1],
                             v_lane + i * (kDv * 32), o_);
    }
  }

  // Divides by the sums; 0 for a row that saw no key. Returns the natural log of the sum of
  // exponentials of row g + 8 * r in lse[r]; -inf for such a row.
  __device__ void Finish(float (&lse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const float inverse = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
      lse[r] = sum > 0.0f ? (MaxLog2(max_[r]) + Log2(sum)) * 0.6931471805599453f : -INFINITY;
#pragma unroll
      for (int i = 0; i < kDv / 8; ++i) {
        // + 0 makes a zero positive, whatever tiles of zeros were added to it.
        o_[i][2 * r] = fmaf(o_[i][2 * r], inverse, 0.0f);
        o_[i][2 * r + 1] = fmaf(o_[i][2 * r + 1], inverse, 0.0f);
      }
    }
  }

  // Dimensions 32 * group + 8 * c + [0, 8) of row g + 8 * r.
  __device__ void Get(int group, int r, float (&values)[8]) const {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      values[2 * m] = o_[group * 4 + m][2 * r];
      values[2 * m + 1] = o_[group * 4 + m][2 * r + 1];
    }
  }

 private:
  __device__ float MaxLog2(float max) const { return fmaxf(max * scale_log2_, -FLT_MAX); }

  float o_[kDv / 8][4];
  float max_[2];
  float sum_[2];
  const float scale_log2_;
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_WARP_ATTENTION_CUH_
