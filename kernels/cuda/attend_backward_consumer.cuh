// The warpgroups of attend_backward_fast.cu that multiply.
#ifndef KERNELS_CUDA_ATTEND_BACKWARD_CONSUMER_CUH_
#define KERNELS_CUDA_ATTEND_BACKWARD_CONSUMER_CUH_

#include <cstdint>

#include "kernels/cuda/attend_backward.cuh"
#include "kernels/cuda/attend_backward_shared.cuh"
#include "kernels/cuda/attend_backward_work.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_values.cuh"

namespace nsa::kernels::cuda::attend_backward {

// d [64,kDim] += a * b, the four k of b 16 rows apart.
template <class T, int kDim>
__device__ __forceinline__ void AddProducts(float (&d)[kDim / 2], const uint32_t (&a)[16],
                                            uint32_t b) {
  constexpr int kWide = kDim == 192 ? 128 : kDim;
  const uint64_t rows = WgmmaValuesDescriptor(b, kRowPanelBytes);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    WgmmaValues<T>(*reinterpret_cast<float(*)[kWide / 2]>(&d), a[4 * k], a[4 * k + 1], a[4 * k + 2],
                   a[4 * k + 3], rows + k * (16 * 128 >> 4));
    if constexpr (kDim > kWide) {
      WgmmaValues<T>(*reinterpret_cast<float(*)[(kDim - kWide) / 2]>(&d[kWide / 2]), a[4 * k],
                     a[4 * k + 1], a[4 * k + 2], a[4 * k + 3],
                     rows + (kWide / 64 * kRowPanelBytes >> 4) + k * (16 * 128 >> 4));
    }
  }
}

// 64 keys of a warpgroup; lane 4g + c of warp w works on keys 16w + g and 16w + g + 8, and of each
// eight columns, which are rows of q, on 2c and 2c + 1.
template <class T, int kDk, int kDv>
class Consumer {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Consumer(const AttendBackwardArgs& args, const WorkLists& lists,
                      const Shared<Sizes>& shared)
      : args_(args),
        lists_(lists),
        shared_(shared),
        scale_log2_(args.dims.softmax_scale * 1.4426950408889634f) {}

  __device__ void Run(const Item& item) {
    LoadKeys(item);
#pragma unroll
    for (float& value : dk_) value = 0.0f;
#pragma unroll
    for (float& value : dv_) value = 0.0f;
    // Nothing is in flight between the steps.
    for (int32_t i = item.end - 1; i >= item.begin; --i) {
      if (i >= item.begin_whole && i < item.end_whole) {
        Step<false>();
      } else {
        Step<true>();
      }
    }
    AddKeys(item);
  }

 private:
  __device__ static int Lane() { return threadIdx.x % 32; }
  __device__ static int Warpgroup() { return threadIdx.x / 128; }
  // Of the tile, the first of the lane's two keys.
  __device__ static int KeyRow() { return threadIdx.x / 32 * 16 + Lane() / 4; }

  __device__ void LoadKeys(const Item& item) {
    LoadRows<kDk>(args_.k, item, shared_.Keys());
    LoadRows<kDv>(args_.v, item, shared_.Values());
    CopyAsyncWait<0>();
    FenceProxyAsync();
    SyncConsumers();
  }

  // Two threads a row; zeros where there is no key.
  template <int kDim>
  __device__ void LoadRows(const TokenRows& tokens, const Item& item, uint32_t to) {
    const int row = threadIdx.x / 2;
    const TokenRun run =
        FindTokens(tokens, 2, item.document, int64_t{item.tile} * kTileKeys + row, item.kv_head);
    const bool exists = run.rows != nullptr;
    const char* const from = exists ? run.rows : static_cast<const char*>(args_.queries.q.data);
#pragma unroll
    for (int panel = 0; panel < kDim / 64; ++panel) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int chunk = 2 * i + static_cast<int>(threadIdx.x % 2);
        CopyAsync16(to + panel * kKeyPanelBytes + InPanel(row, chunk),
                    exists ? from + panel * 128 + chunk * 16 : from, exists);
      }
    }
  }

  // s = K q^T, dp = V dO^T, of 64 keys and 64 rows.
  template <int kDim>
  __device__ static void StartProducts(float (&d)[32], uint32_t keys, uint32_t rows) {
    const uint64_t a = WgmmaDescriptor(keys), b = WgmmaDescriptor(rows);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      WgmmaShared<T>(d, a + (k / 4 * kKeyPanelBytes + k % 4 * 32) / 16,
                     b + (k / 4 * kRowPanelBytes + k % 4 * 32) / 16, k > 0);
    }
    WgmmaCommit();
  }

  template <bool kMasked>
  __device__ void Step() {
    const int stage = turn_.slot();
    const uint32_t q = Uniform(shared_.Q(stage));
    const uint32_t d_o = Uniform(shared_.OutputGradient(stage));
    const uint32_t of_warpgroup = Uniform(Warpgroup() * 64 * 128);
    const uint32_t statistics = shared_.Statistics(stage);
    BarrierWait(shared_.RowsFull(stage), turn_.parity());

    float s[32], dp[32];
    WgmmaFence();
    StartProducts<kDk>(s, shared_.Keys() + of_warpgroup, q);
    StartProducts<kDv>(dp, shared_.Values() + of_warpgroup, d_o);
    WgmmaWait<1>();
    WgmmaTouch(s);

    uint32_t p[16], ds[16];
    uint32_t all_ones = ~0u;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float4 row = LoadShared4(statistics + j * 64 + Lane() % 4 * 16);
      float4 bounds;
      if constexpr (kMasked) {
        bounds = LoadShared4(statistics + kBounds + j * 64 + Lane() % 4 * 16);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& p0 = s[4 * j + 2 * r];
        float& p1 = s[4 * j + 2 * r + 1];
        p0 = GatedProbability(p0, scale_log2_, row.x, row.z);
        p1 = GatedProbability(p1, scale_log2_, row.y, row.w);
        if constexpr (kMasked) {
          const int key = KeyRow() + 8 * r;
          if (key < __float_as_int(bounds.x) || key >= __float_as_int(bounds.z)) p0 = 0.0f;
          if (key < __float_as_int(bounds.y) || key >= __float_as_int(bounds.w)) p1 = 0.0f;
        }
        p[2 * j + r] = Pack2<T>(p0, p1);
        all_ones &= p[2 * j + r];
      }
    }
    // A condition that always holds, since no NaN is packed as ones alone: the assembler keeps
    // barriers and waits in order, and so does not move the exponentials behind the wait.
    if (Lane() == 0 && all_ones != ~0u) BarrierArrive(shared_.RowsEmpty(stage));
    WgmmaWait<0>();
    WgmmaTouch(dp);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 mean = LoadShared2(statistics + kMeans + j * 32 + Lane() % 4 * 8);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 4 * j + 2 * r;
        ds[2 * j + r] = Pack2<T>(LogitGradient(s[i], dp[i], mean.x),
                                 LogitGradient(s[i + 1], dp[i + 1], mean.y));
      }
    }
    // Both warpgroups have multiplied with the dS before.
    BarrierWait(shared_.DsRead(), ds_parity_ ^ 1);
    ds_parity_ ^= 1;
    StoreDs(ds);
    FenceProxyAsync();
    SyncConsumers();

    WgmmaFence();
    AddProducts<T, kDv>(dv_, p, d_o);
    WgmmaCommit();
    float dq[32], half_dq[16];  // one of them, or both
    StartDq(dq, half_dq);
    WgmmaCommit();
    AddProducts<T, kDk>(dk_, ds, q);
    WgmmaCommit();
    WgmmaWait<1>();
    if constexpr (kWholePanels > 0) WgmmaTouch(dq);
    if constexpr (kHalfPanel) WgmmaTouch(half_dq);
    if (Lane() == 0) BarrierArrive(shared_.DsRead());
    StoreDq(dq, half_dq);
    WgmmaWait<0>();
    WgmmaTouch(dk_);
    WgmmaTouch(dv_);
    if (Lane() == 0) BarrierArrive(shared_.RowsEmpty(stage));
    ++turn_.n;
  }

  // dS^T of this warpgroup's keys becomes its panel of dS [64 rows][128 keys].
  __device__ void StoreDs(const uint32_t (&ds)[16]) {
    const int lane = Lane(), warp = threadIdx.x / 32 % 4;
    const uint32_t to = shared_.Ds() + Warpgroup() * kRowPanelBytes +
                        InPanel(lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      StoreMatricesTransposed(to + j * 8 * 128, ds[2 * j], ds[2 * j + 1], ds[2 * j + 2],
                              ds[2 * j + 3]);
    }
  }

  // Of the panels of Dk, each warpgroup has whole ones and half of an odd one.
  static constexpr int kWholePanels = kDk / 128;
  static constexpr bool kHalfPanel = kDk / 64 % 2 != 0;

  // The warpgroup's dimensions of dS K.
  __device__ void StartDq(float (&dq)[32], float (&half_dq)[16]) {
    const uint64_t ds = WgmmaDescriptor(Uniform(shared_.Ds()));
    const uint32_t warpgroup = Uniform(Warpgroup());
    const auto multiply = [&](auto& d, uint32_t first) {
      const uint64_t keys = WgmmaValuesDescriptor(shared_.Keys() + first, kKeyPanelBytes);
#pragma unroll
      for (int k = 0; k < kTileKeys / 16; ++k) {
        WgmmaSharedValues<T>(d, ds + (k / 4 * kRowPanelBytes + k % 4 * 32) / 16,
                             keys + k * (16 * 128 >> 4), k > 0);
      }
    };
    if constexpr (kWholePanels > 0) multiply(dq, warpgroup * kKeyPanelBytes);
    if constexpr (kHalfPanel) multiply(half_dq, (kDk / 64 - 1) * kKeyPanelBytes + warpgroup * 64);
  }

  __device__ void StoreDq(const float (&dq)[32], const float (&half_dq)[16]) {
    const int buffer = dq_turn_.slot();
    BarrierWait(shared_.DqEmpty(buffer), dq_turn_.parity() ^ 1);
    const uint32_t to = shared_.Dq(buffer);
    if constexpr (kWholePanels > 0) StoreDims(dq, to + 2 * Warpgroup() * kRowPanelBytes);
    if constexpr (kHalfPanel) {
      StoreDims(half_dq, to + (2 * (kDk / 64 - 1) + Warpgroup()) * kRowPanelBytes);
    }
    FenceProxyAsync();
    __syncwarp();
    if (Lane() == 0) BarrierArrive(shared_.DqFull(buffer));
    ++dq_turn_.n;
  }

  // Dimensions from that of box `to` on; a box has 32. Lanes of odd rows take the columns in
  // another order, so that a warp meets no bank twice. Zeros are positive, as sums that begin at
  // zero are: rows have the same bits whether overwritten or added.
  template <int kCount>
  __device__ void StoreDims(const float (&dq)[kCount], uint32_t to) {
    const float scale = args_.dims.softmax_scale;
    const int c = Lane() % 4, row = threadIdx.x / 32 % 4 * 16 + Lane() / 4;
    const bool is_odd = row % 2 != 0;
    const uint32_t lane = to + c % 2 * 8;
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int even = 4 * j + 2 * r, odd = 4 * (j ^ 2) + 2 * r;
        const int chunk = (j % 4 * 2 + c / 2) ^ (is_odd ? 4 : 0);
        StoreShared(lane + j / 4 * kRowPanelBytes + InPanel(row + 8 * r, chunk),
                    make_float2(__fmaf_rn(scale, is_odd ? dq[odd] : dq[even], 0.0f),
                                __fmaf_rn(scale, is_odd ? dq[odd + 1] : dq[even + 1], 0.0f)));
      }
    }
  }

  // Adds dK and dV to what earlier items have made of them.
  __device__ void AddKeys(const Item& item) {
    if (item.begin < item.end) {
      if (item.before >= 0) {
        while (LoadAcquire(lists_.keys_done + item.before) == 0) {
        }
      }
      AddRows<kDk>(args_.k, args_.dk, item, args_.dims.softmax_scale, dk_);
      AddRows<kDv>(args_.v, args_.dv, item, 1.0f, dv_);
    }
    __threadfence();
    SyncConsumers();
    if (threadIdx.x == 0) StoreRelease(lists_.keys_done + item.index, 1);
  }

  template <int kDim>
  __device__ void AddRows(const TokenRows& tokens, const GradientRows& gradients, const Item& item,
                          float scale, const float (&sums)[kDim / 2]) {
    const int64_t key = int64_t{item.tile} * kTileKeys + KeyRow();
    TokenPlace place = FindPlace(tokens, item.document, key);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (r == 1) {
        if (place.row >= 0 && place.num_tokens > 8) {
          place.row += 8;
        } else {
          place = FindPlace(tokens, item.document, key + 8);
        }
      }
      if (place.row < 0) continue;
      float* const row = (place.is_halo ? gradients.halo : gradients.own) +
                         place.row * gradients.row_stride + item.kv_head * gradients.head_stride +
                         Lane() % 4 * 2;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        // Not by way of the L1, which does not see what other SMs write.
        float2* const to = reinterpret_cast<float2*>(row + 8 * j);
        float2 value = __ldcg(to);
        value.x = __fmaf_rn(scale, sums[4 * j + 2 * r], value.x);
        value.y = __fmaf_rn(scale, sums[4 * j + 2 * r + 1], value.y);
        __stcg(to, value);
      }
    }
  }

  const AttendBackwardArgs& args_;
  const WorkLists& lists_;
  const Shared<Sizes> shared_;
  const float scale_log2_;
  Turn<kStages> turn_;
  Turn<Sizes::kDqBuffers> dq_turn_;
  uint32_t ds_parity_ = 0;
  float dk_[kDk / 2], dv_[kDv / 2];
};

}  // namespace nsa::kernels::cuda::attend_backward

#endif  // KERNELS_CUDA_ATTEND_BACKWARD_CONSUMER_CUH_
