// Attention of a CTA: 16 heads of one query over tiles of 128 keys.
//
// A warp owns 16 keys of a tile. It reads K from global memory straight into registers, as
// mma.sync wants it, and has V copied to shared memory beside that; so all of a tile is on its way
// at once. Between the products the warps meet twice: for the maxima of rows, and because each then
// multiplies the probabilities of all 128 keys with its own columns of V. Dk and Dv are no
// template parameters: fragments of q lie in shared memory, and a warp has Dv/64 tiles of 8
// columns.
#ifndef KERNELS_CUDA_DECODE_TILES_CUH_
#define KERNELS_CUDA_DECODE_TILES_CUH_

#include <cstdint>

#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/grid_order.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {

constexpr int kDecodeWarps = 8;
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The scratch of a (row, kv head).
struct ScratchPlace {
  char* base;
  const DecodeScratch& layout;

  __device__ ScratchPlace(void* scratch, const DecodeScratch& scratch_layout, int64_t index)
      : base(static_cast<char*>(scratch) + index * scratch_layout.bytes), layout(scratch_layout) {}

  __device__ int32_t* counters() const { return reinterpret_cast<int32_t*>(base); }
  __device__ float* floats(int64_t offset) const { return reinterpret_cast<float*>(base + offset); }
  __device__ float2* stats(const DecodePartsLayout& parts) const {
    return reinterpret_cast<float2*>(base + parts.stats);
  }
  __device__ float* o(const DecodePartsLayout& parts) const { return floats(parts.o); }
};

// Shared memory of a CTA.
struct DecodeShared {
  static constexpr int32_t kQPadding = 64;     // bytes: 8 lanes of a load meet every bank once
  static constexpr int32_t kPStride = 136;     // elements, for ldmatrix
  static constexpr int32_t kSumsStride = 129;  // elements

  char* memory;
  int32_t head_dim_qk, head_dim_v;
  int32_t values_bytes;

  __device__ DecodeShared(const AttentionDims& dims, char* shared, int32_t values_size)
      : memory(shared),
        head_dim_qk(dims.head_dim_qk),
        head_dim_v(dims.head_dim_v),
        values_bytes(values_size) {}

  static constexpr int32_t TileBytes(const AttentionDims& dims) {
    return kDecodeTileKeys * dims.head_dim_v * 2;
  }
  // Of all but values.
  static constexpr int32_t OtherBytes(const AttentionDims& dims) {
    return kDecodeTileHeads * (dims.head_dim_qk * 2 + kQPadding) + kFixedBytes;
  }

  // V of a tile, [16][Dv/8][8 keys][8 values]; between tiles, for what else there is: values_bytes,
  // which are TileBytes at least and a multiple of 16.
  __device__ char* values() const { return memory; }
  // Probabilities [16][kPStride] in 16 bits.
  __device__ char* p() const { return memory + values_bytes; }
  // The same in f32 [16][kSumsStride].
  __device__ float* p32() const {
    return reinterpret_cast<float*>(p() + kDecodeTileHeads * kPStride * 2);
  }
  __device__ float* of_warps() const {  // [16][8]
    return p32() + kDecodeTileHeads * kSumsStride;
  }
  __device__ float* of_heads() const { return of_warps() + kDecodeWarps * 16; }  // [16]
  // For scans [8], an item [4], what the search has found [2], whether the CTA is the last [1].
  __device__ int32_t* words() const {  // [16]
    return reinterpret_cast<int32_t*>(of_heads() + 16);
  }
  __device__ char* q() const { return reinterpret_cast<char*>(words() + 16); }
  __device__ int32_t q_stride() const { return head_dim_qk * 2 + kQPadding; }

 private:
  static constexpr int32_t kFixedBytes =
      kDecodeTileHeads * kPStride * 2 +
      (kDecodeTileHeads * kSumsStride + kDecodeWarps * 16 + 16 + 16) * 4;
};

// How 16 keys of a warp lie.
enum class KeyLayout {
  kRows,     // K and V in rows
  kRecords,  // as in a record
};

// Where they lie; the first is a multiple of 16 of what they are counted in.
struct WarpKeys {
  const char* k = nullptr;
  const char* v = nullptr;
  int64_t row_bytes = 0;  // kRows
};

// Tokens [token, token + 16) of a record.
__device__ inline WarpKeys RecordKeys(const AttentionDims& dims, const void* page, int32_t kv_head,
                                      int32_t token) {
  const char* const record = static_cast<const char*>(page) + kv_head * RecordBytes(dims);
  return {record + token * dims.head_dim_qk * 2,
          record + (dims.select_block_tokens * dims.head_dim_qk + token * dims.head_dim_v) * 2, 0};
}

// kDk, kDv: 0 for any.
template <class T, int kDk, int kDv>
class TileAttention {
 public:
  __device__ TileAttention(const AttentionDims& dims, const DecodeShared& shared)
      : shared_(shared), scale_log2_(dims.softmax_scale * kLog2E) {}

  // Starts over with `num_heads` heads of a row of q, from `first_head` on. All threads.
  __device__ void Start(const ConstTensor3& q, int64_t row, int32_t first_head, int32_t num_heads) {
    q_ = static_cast<const char*>(q.data) + (row * q.row_stride + first_head * q.head_stride) * 2;
    const int32_t pieces = head_dim_qk() / 8;
    __syncthreads();  // the q before, and whatever else, has been read
    for (int32_t i = threadIdx.x; i < kDecodeTileHeads * pieces; i += kDecodeThreads) {
      const int32_t head = i / pieces, piece = i % pieces;
      const bool exists = head < num_heads;
      CopyAsync16(SharedAddress(shared_.q() + head * q_stride() + piece * 16),
                  exists ? q_ + head * q.head_stride * 2 + piece * 16 : q_, exists);
    }
    CopyAsyncCommit();
    q_is_there_ = false;
#pragma unroll
    for (int i = 0; i < kMatrices; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) o_[i][e] = 0.0f;
    }
    max_[0] = max_[1] = -INFINITY;
    sum_[0] = sum_[1] = 0.0f;
  }

  // Keys [begin, end) of the tile's 128 are seen, at least one; keys.k is null for a warp that has
  // none of them. kKeepsP: leaves probabilities relative to the maximum in p32. All threads; to be
  // followed by __syncthreads before the next.
  template <KeyLayout kLayout, bool kKeepsP>
  __device__ __forceinline__ void Attend(const WarpKeys& keys, int32_t begin, int32_t end) {
    if (begin == 0 && end >= kDecodeTileKeys) {
      AttendTile<kLayout, kKeepsP, false>(keys, begin, end);
    } else {
      AttendTile<kLayout, kKeepsP, true>(keys, begin, end);
    }
  }

  // The maximum of rows g and g + 8 so far, of lane 4g + c.
  __device__ float max(int r) const { return max_[r]; }

  // Writes a part: stats [16], o [16,Dv]. All threads.
  __device__ void Store(KeyLayout layout, float2* stats, float* o) {
    const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int32_t g = lane / 4, c = lane % 4;
    float* const of_warps = shared_.of_warps();
    __syncthreads();  // the maxima have been read
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      if (c == 0) of_warps[(g + 8 * r) * kDecodeWarps + warp] = sum;
#pragma unroll
      for (int i = 0; i < kMatrices; ++i) {
        if (i * 64 >= head_dim_v()) break;
        const int32_t matrix = warp + 8 * i;
        const int32_t dim = layout == KeyLayout::kRows ? matrix * 8 + c * 2
                                                       : matrix / 4 * 32 + c * 8 + matrix % 4 * 2;
        *reinterpret_cast<float2*>(o + (g + 8 * r) * head_dim_v() + dim) =
            make_float2(o_[i][2 * r], o_[i][2 * r + 1]);
      }
    }
    __syncthreads();
    if (warp != 0 || c != 0) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) sum += of_warps[(g + 8 * r) * kDecodeWarps + w];
      stats[g + 8 * r] = make_float2(max_[r], sum);
    }
  }

 private:
  static constexpr int kMatrices = kDv != 0 ? kDv / 64 : 4;  // of 8 columns, of a warp

  __device__ __forceinline__ int32_t head_dim_qk() const {
    return kDk != 0 ? kDk : shared_.head_dim_qk;
  }
  __device__ __forceinline__ int32_t head_dim_v() const {
    return kDv != 0 ? kDv : shared_.head_dim_v;
  }
  __device__ __forceinline__ int32_t q_stride() const {
    return head_dim_qk() * 2 + DecodeShared::kQPadding;
  }

  template <KeyLayout kLayout, bool kKeepsP, bool kMasked>
  __device__ __forceinline__ void AttendTile(const WarpKeys& keys, int32_t begin, int32_t end) {
    const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int32_t g = lane / 4, c = lane % 4;

    // A copy of a hidden key leaves zeros: what is in memory may be NaN.
    const uint32_t values = SharedAddress(shared_.values());
    const uint32_t my_values = values + (warp * 2 * head_dim_v() + lane) * 16;
#pragma unroll
    for (int32_t octet = 0; octet < 2; ++octet) {
      const int32_t token = octet * 8 + lane % 8;
      const bool visible = !kMasked || (warp * 16 + token >= begin && warp * 16 + token < end);
      const char* const from = kLayout == KeyLayout::kRows
                                   ? keys.v + token * keys.row_bytes + lane / 8 * 16
                                   : keys.v + (octet * head_dim_v() + lane) * 16;
#pragma unroll
      for (int32_t i = 0; i < 2 * kMatrices; ++i) {
        if (i * 32 >= head_dim_v()) break;
        CopyAsync16(my_values + (octet * head_dim_v() + i * 32) * 16,
                    visible ? from + i * (kLayout == KeyLayout::kRows ? 64 : 512) : q_, visible);
      }
    }
    CopyAsyncCommit();

    float s[2][4] = {};
    MultiplyKeys<kLayout, kMasked>(keys, s);
    if constexpr (kMasked) {
#pragma unroll
      for (int o = 0; o < 2; ++o) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int32_t key = warp * 16 + o * 8 + c * 2 + e % 2;
          if (key < begin || key >= end) s[o][e] = -INFINITY;
        }
      }
    }

    float* const of_warps = shared_.of_warps();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float row_max =
          fmaxf(fmaxf(s[0][2 * r], s[0][2 * r + 1]), fmaxf(s[1][2 * r], s[1][2 * r + 1]));
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 2));
      if (c == 0) of_warps[(g + 8 * r) * kDecodeWarps + warp] = row_max;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int32_t row = g + 8 * r;
      const auto* const maxima = reinterpret_cast<const float4*>(of_warps + row * kDecodeWarps);
      const float4 a = maxima[0], b = maxima[1];
      const float tile_max =
          fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
      const float row_max = fmaxf(max_[r], tile_max * scale_log2_);
      const float factor = Exp2(max_[r] - row_max);
      max_[r] = row_max;
      sum_[r] *= factor;
#pragma unroll
      for (int i = 0; i < kMatrices; ++i) {
        o_[i][2 * r] *= factor;
        o_[i][2 * r + 1] *= factor;
      }
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const float p0 = Exp2(fmaf(s[o][2 * r], scale_log2_, -row_max));
        const float p1 = Exp2(fmaf(s[o][2 * r + 1], scale_log2_, -row_max));
        sum_[r] += p0 + p1;
        const int32_t key = warp * 16 + o * 8 + c * 2;
        *reinterpret_cast<uint32_t*>(shared_.p() + (row * DecodeShared::kPStride + key) * 2) =
            Pack2<T>(p0, p1);
        if constexpr (kKeepsP) {
          float* const p32 = shared_.p32() + row * DecodeShared::kSumsStride + key;
          p32[0] = p0;
          p32[1] = p1;
        }
      }
    }
    CopyAsyncWait<0>();
    __syncthreads();

    // o += p v, columns [8 * (warp + 8 i), + 8)
    const uint32_t p_lane =
        SharedAddress(shared_.p()) +
        ((lane / 8 % 2 * 8 + lane % 8) * DecodeShared::kPStride + lane / 16 * 8) * 2;
    const uint32_t v_lane = values + lane / 8 * head_dim_v() * 16 + warp * 128 + lane % 8 * 16;
#pragma unroll
    for (int step = 0; step < kDecodeTileKeys / 32; ++step) {
      uint32_t a[2][4];
      LoadMatrices(a[0], p_lane + step * 64);
      LoadMatrices(a[1], p_lane + step * 64 + 32);
#pragma unroll
      for (int i = 0; i < kMatrices; ++i) {
        if (i * 64 >= head_dim_v()) break;
        uint32_t b[4];
        LoadMatricesTransposed(b, v_lane + step * 4 * head_dim_v() * 16 + i * 1024);
        MultiplyAdd<T>(o_[i], a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
        MultiplyAdd<T>(o_[i], a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
      }
    }
  }

  // s [16 heads, 16 keys] += q k^T. Four matrices of a record are 32 dimensions in the order in
  // which a lane that reads 16 bytes of a row finds them.
  template <KeyLayout kLayout, bool kMasked>
  __device__ __forceinline__ void MultiplyKeys(const WarpKeys& keys, float (&s)[2][4]) {
    constexpr int kGroups = kDk == 0 ? 4 : kDk / 32;  // at a time
    const int32_t lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    const int32_t groups = head_dim_qk() / 32;
    for (int32_t first = 0; first < groups; first += kGroups) {
      uint4 b[kGroups][2];
#pragma unroll
      for (int o = 0; o < 2; ++o) {
        const char* const from = kLayout == KeyLayout::kRows
                                     ? keys.k + (o * 8 + g) * keys.row_bytes + first * 64 + c * 16
                                     : keys.k + (o * groups + first) * 512 + lane * 4;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          if (kDk == 0 && first + i >= groups) continue;
          if (kMasked && keys.k == nullptr) continue;
          if constexpr (kLayout == KeyLayout::kRows) {
            b[i][o] = __ldcg(reinterpret_cast<const uint4*>(from + i * 64));
          } else {
            const auto* const words = reinterpret_cast<const uint32_t*>(from + i * 512);
            b[i][o] = make_uint4(__ldcg(words), __ldcg(words + 32), __ldcg(words + 64),
                                 __ldcg(words + 96));
          }
        }
      }
      if (!q_is_there_) {  // but all that is copied before the tile is
        CopyAsyncWait<1>();
        __syncthreads();
        q_is_there_ = true;
      }
      if (kMasked && keys.k == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        if (kDk == 0 && first + i >= groups) continue;
        const char* const q = shared_.q() + g * q_stride() + (first + i) * 64 + c * 16;
        const uint4 low = *reinterpret_cast<const uint4*>(q);
        const uint4 high = *reinterpret_cast<const uint4*>(q + 8 * q_stride());
#pragma unroll
        for (int o = 0; o < 2; ++o) {
          MultiplyAdd<T>(s[o], low.x, high.x, low.y, high.y, b[i][o].x, b[i][o].y);
          MultiplyAdd<T>(s[o], low.z, high.z, low.w, high.w, b[i][o].z, b[i][o].w);
        }
      }
    }
  }

  const DecodeShared shared_;
  const float scale_log2_;
  const char* q_ = nullptr;
  bool q_is_there_ = false;
  float o_[kMatrices][4];
  float max_[2];  // in units of log2
  float sum_[2];  // of this lane's keys
};

// Counts the CTA's arrival. The last of `num_arrivals` is told so, sees what the others wrote
// before, and has set the counter to 0. All threads; `flag` is shared.
__device__ inline bool ArrivesLast(int32_t* counter, int32_t num_arrivals, int32_t* flag) {
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool is_last = AddInOrder(counter, 1) == num_arrivals - 1;
    if (is_last) *counter = 0;
    *flag = is_last ? 1 : 0;
  }
  __syncthreads();
  return *flag != 0;
}

// What the parts of a branch count for 16 heads: o is the sum of weight * o of the parts. stats
// [num_parts,stride] from the first of the heads on; weights [num_parts,16] and lse [16], in units
// of log2, are shared. All threads; to be followed by __syncthreads.
__device__ inline void WeighParts(const float2* stats, int32_t num_parts, int32_t stride,
                                  float* weights, float* lse) {
  constexpr int kPerThread = kMaxDecodeParts / 16;
  const int32_t head = threadIdx.x / 16, first = threadIdx.x % 16;
  float2 part[kPerThread];
  float max = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int32_t index = first + 16 * i;
    part[i] =
        index < num_parts ? __ldcg(stats + index * stride + head) : make_float2(-INFINITY, 0.0f);
    max = fmaxf(max, part[i].x);
  }
  for (int mask = 1; mask < 16; mask *= 2) max = fmaxf(max, __shfl_xor_sync(kFullWarp, max, mask));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    part[i].x = first + 16 * i < num_parts ? Exp2(part[i].x - max) : 0.0f;
    sum += part[i].x * part[i].y;
  }
  for (int mask = 1; mask < 16; mask *= 2) sum += __shfl_xor_sync(kFullWarp, sum, mask);
  const float inverse = __fdividef(1.0f, sum);
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (first + 16 * i < num_parts) weights[(first + 16 * i) * 16 + head] = part[i].x * inverse;
  }
  if (first == 0) lse[head] = num_parts > 0 ? max + Log2(sum) : -INFINITY;
}

// sum += weight * eight values.
__device__ __forceinline__ void AddPart(const float* from, float weight, float (&sum)[8]) {
  const float4 low = __ldcg(reinterpret_cast<const float4*>(from));
  const float4 high = __ldcg(reinterpret_cast<const float4*>(from) + 1);
  const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int e = 0; e < 8; ++e) sum[e] = fmaf(weight, values[e], sum[e]);
}

// Adds up eight values of a head of 16 from the parts: o [num_parts] at a distance of part_stride;
// weights as of WeighParts.
__device__ __forceinline__ void MergeParts(const float* o, int32_t num_parts, int64_t part_stride,
                                           const float* weights, int32_t head, float (&sum)[8]) {
  constexpr int kBatch = 8;  // loads that are on their way together
  for (int32_t first = 0; first < num_parts; first += kBatch) {
#pragma unroll
    for (int32_t i = 0; i < kBatch; ++i) {
      // What is not there counts nothing, without a branch.
      const int32_t part = min(first + i, num_parts - 1);
      AddPart(o + part * part_stride, first + i < num_parts ? weights[part * 16 + head] : 0.0f,
              sum);
    }
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_TILES_CUH_
