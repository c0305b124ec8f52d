// What a warp does with 16 keys of a round, and the shared memory that it finds them in: the ring
// of decode_stream.cuh.
//
// Dk and Dv are template parameters, or 0 for any.
#ifndef KERNELS_CUDA_DECODE_WARP_CUH_
#define KERNELS_CUDA_DECODE_WARP_CUH_

#include <cstdint>

#include "kernels/cuda/decode_parts.cuh"
#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/ptx.cuh"

namespace nsa::kernels::cuda {

// Warps that compute; half as many copy. With o of any Dv there are registers for fewer.
template <int kDv>
constexpr int kStreamWarps = kDv != 0 ? 8 : 4;
template <int kDv>
constexpr int kStreamThreads = kStreamWarps<kDv> * 48;
constexpr int kMaxStages = 3;

// How 16 keys of a warp lie.
enum class KeyLayout {
  kRows,     // K and V in rows
  kRecords,  // as in a record
};

// Where they lie.
struct WarpKeys {
  const char* k;
  const char* v;
  int64_t row_bytes;  // kRows
};

// What a round is to the warps that compute.
struct alignas(16) StreamRound {
  int32_t key;         // the first
  int32_t begin, end;  // keys that are seen, of the part
  int32_t flags;
  float* maxima;  // of 16 heads, what Work::StoreKeys leaves of the branch's keys from 0 on
  float* reach;
  float2* stats;  // of 16 heads, what is left of the part
  float* o;

  static constexpr int32_t kIsFirst = 1, kIsLast = 2, kIsEnd = 4;
};

// Shared memory of a CTA: a ring of stages.
struct StreamShared {
  static constexpr int32_t kQPadding = 64;  // bytes: 8 lanes of a load meet every bank once
  static constexpr int32_t kPStride = 20;   // elements

  char* memory;
  int32_t num_warps, num_stages, slot_bytes, q_stride;

  __host__ __device__ StreamShared(const AttentionDims& dims, char* shared, int32_t warps,
                                   int32_t stages)
      : memory(shared),
        num_warps(warps),
        num_stages(stages),
        // 16 keys, or o of 16 heads.
        slot_bytes(32 * (dims.head_dim_v + (dims.head_dim_qk > dims.head_dim_v ? dims.head_dim_qk
                                                                               : dims.head_dim_v))),
        q_stride(dims.head_dim_qk * 2 + kQPadding) {}

  // Of a warp: K and V of 16 keys; at the end of a part its o.
  __device__ char* slot(int32_t stage, int32_t warp) const {
    return memory + (stage * num_warps + warp) * slot_bytes;
  }
  // Of a part's first round [16][q_stride].
  __device__ char* q(int32_t stage) const {
    return memory + num_stages * num_warps * slot_bytes + stage * kDecodeTileHeads * q_stride;
  }
  __device__ StreamRound* round(int32_t stage) const {
    return reinterpret_cast<StreamRound*>(q(num_stages)) + stage;
  }
  // (max, sum) of the warps [warps][16].
  __device__ float2* stats(int32_t stage) const {
    return reinterpret_cast<float2*>(round(num_stages)) + stage * num_warps * kDecodeTileHeads;
  }
  // That a stage is full, that it is free.
  __device__ uint32_t full(int32_t stage) const {
    return SharedAddress(stats(num_stages)) + stage * 16;
  }
  __device__ uint32_t free(int32_t stage) const { return full(stage) + 8; }
  // Probabilities of a warp [16][kPStride], where they are kept.
  __device__ float* p(int32_t warp) const {
    return reinterpret_cast<float*>(reinterpret_cast<char*>(stats(num_stages)) + num_stages * 16) +
           warp * kDecodeTileHeads * kPStride;
  }
  __host__ int32_t Bytes(bool keeps_p) const {
    return num_stages * (num_warps * (slot_bytes + kDecodeTileHeads * 8) +
                         kDecodeTileHeads * q_stride + static_cast<int>(sizeof(StreamRound)) + 16) +
           (keeps_p ? num_warps * kDecodeTileHeads * kPStride * 4 : 0);
  }
};

__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Slots. Of a record as there: K [2 octets][Dk/32][4 matrices][8 keys][16 bytes], then V likewise.
// Of rows: K [16][Dk], V [16][Dv], pieces of 16 bytes exchanged so that what is read together lies
// in different banks: piece i of key j of K at i ^ 4 * (j % 2), of V at i ^ (j % 8).
template <int kDk, int kDv, KeyLayout kLayout>
struct StreamHeads {
  int32_t qk_, v_;

  __device__ explicit StreamHeads(const AttentionDims& dims)
      : qk_(dims.head_dim_qk), v_(dims.head_dim_v) {}
  __device__ __forceinline__ int32_t qk() const { return kDk != 0 ? kDk : qk_; }
  __device__ __forceinline__ int32_t v() const { return kDv != 0 ? kDv : v_; }

  // Begins to copy 16 keys, of which [begin, end) are seen: of others V is zero, since what is in
  // memory may be NaN. All lanes of a warp.
  __device__ __forceinline__ void Copy(uint32_t slot, const WarpKeys& keys, int32_t begin,
                                       int32_t end) const {
    if constexpr (kLayout == KeyLayout::kRows) {
      CopyRows<4, 1>(slot, keys.k, keys.row_bytes, qk(), 0, kDecodeWarpKeys);
      CopyRows<1, 7>(slot + 32 * qk(), keys.v, keys.row_bytes, v(), begin, end);
    } else {
      CopyOctets(slot, keys.k, qk(), 0, kDecodeWarpKeys);
      CopyOctets(slot + 32 * qk(), keys.v, v(), begin, end);
    }
  }

 private:
  static constexpr int kMaxPieces = kDk != 0 ? (kDk > kDv ? kDk : kDv) / 32 : 8;  // of 32 values

  // 8 lanes take 128 bytes of a row.
  template <int kFactor, int kMask>
  __device__ __forceinline__ static void CopyRows(uint32_t slot, const char* from,
                                                  int64_t row_bytes, int32_t head_dim,
                                                  int32_t begin, int32_t end) {
    const int32_t lane = threadIdx.x % 32, segments = head_dim / 64;
#pragma unroll
    for (int32_t i = 0; i < 2 * kMaxPieces; ++i) {
      if (i >= head_dim / 16) break;
      const int32_t unit = i * 4 + lane / 8, key = unit / segments;
      const int32_t piece = unit % segments * 8 + lane % 8;
      CopyAsync16(slot + key * head_dim * 2 + (piece ^ kFactor * (key & kMask)) * 16,
                  from + key * row_bytes + piece * 16, key >= begin && key < end);
    }
  }
  __device__ __forceinline__ static void CopyOctets(uint32_t slot, const char* from,
                                                    int32_t head_dim, int32_t begin, int32_t end) {
    const int32_t lane = threadIdx.x % 32, pieces = head_dim / 32;
#pragma unroll
    for (int32_t octet = 0; octet < 2; ++octet) {
      const int32_t key = octet * 8 + lane % 8;
      const bool is_seen = key >= begin && key < end;
#pragma unroll
      for (int32_t i = 0; i < kMaxPieces; ++i) {
        if (i >= pieces) break;
        const int32_t offset = (octet * pieces + i) * 512 + lane * 16;
        CopyAsync16(slot + offset, from + offset, is_seen);
      }
    }
  }
};

// What a warp that computes does: lane 4g + c has rows g and g + 8 of q, which are heads.
template <class T, int kDk, int kDv, KeyLayout kLayout>
class WarpAttention {
 public:
  __device__ explicit WarpAttention(const AttentionDims& dims)
      : heads_(dims), scale_log2_(dims.softmax_scale * kLog2E) {}

  // Starts over with a q in shared memory.
  __device__ __forceinline__ void Start(uint32_t q, int32_t q_stride) {
    const int32_t lane = threadIdx.x % 32;
    q += lane / 4 * q_stride + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (i >= heads_.qk() / 32) break;
      q_[i][0] = LoadShared16(q + i * 64);
      q_[i][1] = LoadShared16(q + 8 * q_stride + i * 64);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o_[i][e] = 0.0f;
    }
    max_[0] = max_[1] = -INFINITY;
    sum_[0] = sum_[1] = 0.0f;
    is_new_ = true;
  }

  // Keys [begin, end) of the 16 in a slot are seen, at least one. p: probabilities relative to the
  // maximum so far, of keys 8o + 2c + e of row g + 8r at [o][2r + e].
  __device__ __forceinline__ void Attend(uint32_t slot, int32_t begin, int32_t end,
                                         float (&p)[2][4]) {
    const int32_t lane = threadIdx.x % 32, c = lane % 4;
    MultiplyKeys(slot, p);
    if (begin > 0 || end < kDecodeWarpKeys) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t key = o * 8 + c * 2 + e % 2;
          if (key < begin || key >= end) p[o][e] = -INFINITY;
        }
      }
    }
    float row_max[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      row_max[r] = fmaxf(fmaxf(p[0][2 * r], p[0][2 * r + 1]), fmaxf(p[1][2 * r], p[1][2 * r + 1]));
      row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(kFullWarp, row_max[r], 1));
      row_max[r] = fmaxf(row_max[r], __shfl_xor_sync(kFullWarp, row_max[r], 2));
      row_max[r] = fmaxf(max_[r], row_max[r] * scale_log2_);
    }
    if (is_new_) {
      is_new_ = false;
      max_[0] = row_max[0], max_[1] = row_max[1];
    } else if (__any_sync(kFullWarp, row_max[0] > max_[0] || row_max[1] > max_[1])) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float factor = Exp2(max_[r] - row_max[r]);
        max_[r] = row_max[r];
        sum_[r] *= factor;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          o_[i][2 * r] *= factor;
          o_[i][2 * r + 1] *= factor;
        }
      }
    }
    uint32_t a[4];
#pragma unroll
    for (int o = 0; o < 2; ++o) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& p0 = p[o][2 * r];
        float& p1 = p[o][2 * r + 1];
        p0 = Exp2(fmaf(p0, scale_log2_, -max_[r]));
        p1 = Exp2(fmaf(p1, scale_log2_, -max_[r]));
        sum_[r] += p0 + p1;
        a[o * 2 + r] = Pack2<T>(p0, p1);
      }
    }
    // o += p v, 16 columns at a time.
    const int32_t key = lane % 16;
    const uint32_t v =
        slot + 32 * heads_.qk() +
        (kLayout == KeyLayout::kRows ? key * heads_.v() * 2
                                     : (key / 8 * heads_.v() + lane / 16 * 8 + key % 8) * 16);
    const uint32_t first_piece = (lane / 16) ^ (key % 8);
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      if (i * 8 >= heads_.v()) break;
      uint32_t b[4];
      LoadMatricesTransposed(b,
                             v + (kLayout == KeyLayout::kRows ? (first_piece ^ i) * 16 : i * 128));
      MultiplyAdd<T>(o_[i], a[0], a[1], a[2], a[3], b[0], b[1]);
      MultiplyAdd<T>(o_[i + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
    }
  }

  // The maximum of rows g and g + 8 so far.
  __device__ float max(int r) const { return max_[r]; }

  // Merges the warps' results, through their slots of a stage, and writes the part: stats [16], o
  // [16,Dv]. All warps that compute.
  __device__ __forceinline__ void Store(const StreamShared& shared, int32_t stage, float2* stats,
                                        float* o) const {
    constexpr int kWarps = kStreamWarps<kDv>;
    const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    auto* const mine = reinterpret_cast<float4*>(shared.slot(stage, warp)) + lane;
    float2* const of_warps = shared.stats(stage) + g;  // [warps][16]
    __syncwarp();                                      // all lanes have read the slot
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (i * 8 >= heads_.v()) break;
      mine[i * 32] = make_float4(o_[i][0], o_[i][1], o_[i][2], o_[i][3]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      if (c == 0) of_warps[warp * 16 + 8 * r] = make_float2(max_[r], sum);
    }
    SyncThreads(1, kWarps * 32);
    float weights[kWarps][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sums[kWarps], max = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float2 of_warp = of_warps[w * 16 + 8 * r];
        weights[w][r] = of_warp.x;
        sums[w] = of_warp.y;
        max = fmaxf(max, of_warp.x);
      }
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        weights[w][r] = Exp2(weights[w][r] - max);
        sum = fmaf(weights[w][r], sums[w], sum);
      }
      if (warp == 0 && c == 0) stats[g + 8 * r] = make_float2(max, sum);
    }
#pragma unroll
    for (int j = 0; j < kColumns / kWarps; ++j) {
      const int32_t i = warp + kWarps * j;
      if (i * 8 >= heads_.v()) break;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float4 of_warp =
            reinterpret_cast<const float4*>(shared.slot(stage, w))[i * 32 + lane];
        sum.x = fmaf(weights[w][0], of_warp.x, sum.x);
        sum.y = fmaf(weights[w][0], of_warp.y, sum.y);
        sum.z = fmaf(weights[w][1], of_warp.z, sum.z);
        sum.w = fmaf(weights[w][1], of_warp.w, sum.w);
      }
      // Columns of a record are in its order (record_layout.h).
      const int32_t dim =
          kLayout == KeyLayout::kRows ? i * 8 + c * 2 : i / 4 * 32 + c * 8 + i % 4 * 2;
      float* const to = o + g * heads_.v() + dim;
      *reinterpret_cast<float2*>(to) = make_float2(sum.x, sum.y);
      *reinterpret_cast<float2*>(to + 8 * heads_.v()) = make_float2(sum.z, sum.w);
    }
  }

 private:
  static constexpr int kPieces = kDk != 0 ? kDk / 32 : 8;
  static constexpr int kColumns = kDv != 0 ? kDv / 8 : 32;  // eights

  // s [16 heads, 16 keys] = q k^T. The lane that works on words c of four matrices of a record
  // works on 8 neighbouring dimensions; of rows it reads them as they are.
  __device__ __forceinline__ void MultiplyKeys(uint32_t slot, float (&s)[2][4]) const {
    const int32_t lane = threadIdx.x % 32, g = lane / 4, pieces = heads_.qk() / 32;
    float odd[2][4] = {};  // two sums, for shorter chains
#pragma unroll
    for (int o = 0; o < 2; ++o) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[o][e] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (i >= pieces) break;
      const uint4 low = q_[i][0], high = q_[i][1];
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        uint32_t b[4];
        if constexpr (kLayout == KeyLayout::kRows) {
          const uint4 words = LoadShared16(slot + (o * 8 + g) * heads_.qk() * 2 +
                                           (i ^ (g & 1)) * 64 + lane % 4 * 16);
          b[0] = words.x, b[1] = words.y, b[2] = words.z, b[3] = words.w;
        } else {
          LoadMatrices(b, slot + (o * pieces + i) * 512 + lane * 16);
        }
        MultiplyAdd<T>(s[o], low.x, high.x, low.y, high.y, b[0], b[1]);
        MultiplyAdd<T>(odd[o], low.z, high.z, low.w, high.w, b[2], b[3]);
      }
    }
#pragma unroll
    for (int o = 0; o < 2; ++o) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[o][e] += odd[o][e];
    }
  }

  const StreamHeads<kDk, kDv, kLayout> heads_;
  const float scale_log2_;
  uint4 q_[kPieces][2];
  float o_[kColumns][4];
  float max_[2];  // in units of log2
  float sum_[2];  // of this lane's keys
  bool is_new_;   // no keys have been seen
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_WARP_CUH_
