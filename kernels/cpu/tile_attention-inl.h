// Softmax over tiles of keys, a tile at a time: the part that selected and window attention share,
// and the backward of a row.
// Included once per instruction set: see tile_ops.cc.
#if defined(KERNELS_CPU_TILE_ATTENTION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_TILE_ATTENTION_INL_H_
#undef KERNELS_CPU_TILE_ATTENTION_INL_H_
#else
#define KERNELS_CPU_TILE_ATTENTION_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "hwy/highway.h"
#include "kernels/cpu/tile_matmul-inl.h"
#include "kernels/cpu/tile_ops.h"
#include "kernels/cpu/tile_rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace nsa::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Logits of one row and tile become exp(logit - max); returns what earlier sums are multiplied by.
HWY_INLINE float SoftmaxOfTile(float* HWY_RESTRICT x, int32_t width, VisibleKeys visible,
                               float* max, float* HWY_RESTRICT sums) {
  const hn::CappedTag<float, kLanes> d;
  const int32_t step = static_cast<int32_t>(hn::Lanes(d));
  const float hidden = -std::numeric_limits<float>::infinity();
  std::fill(x, x + visible.begin, hidden);
  std::fill(x + visible.end, x + width, hidden);

  auto tile_max = hn::LoadU(d, x);
  for (int32_t i = step; i < width; i += step) tile_max = hn::Max(tile_max, hn::LoadU(d, x + i));
  const float new_max = std::max(*max, hn::GetLane(hn::MaxOfLanes(d, tile_max)));
  const float factor = ExpOfNonPositive(*max - new_max);
  *max = new_max;

  const auto m = hn::Set(d, new_max);
  const auto f = hn::Set(d, factor);
  for (int32_t lane = 0; lane < kLanes; lane += step) {
    auto tile_sum = hn::Zero(d);
    for (int32_t i = lane; i < width; i += kLanes) {
      const auto p = ExpOfNonPositive(d, hn::Sub(hn::LoadU(d, x + i), m));
      hn::StoreU(p, d, x + i);
      tile_sum = hn::Add(tile_sum, p);
    }
    hn::StoreU(hn::MulAdd(hn::LoadU(d, sums + lane), f, tile_sum), d, sums + lane);
  }
  return factor;
}

void AttendTile(const SoftmaxRows& rows, int64_t row_begin, int64_t num_rows, const KeyTile& tile,
                const VisibleKeys* visible) {
  HWY_ALIGN float logits[kBlockRows * kTileKeys];
  float factors[kBlockRows];
  int64_t block_rows = 0;
  for (int64_t i = 0; i < num_rows; i += block_rows) {
    block_rows = RowsOfNextBlock(num_rows - i);
    const int64_t row = row_begin + i;
    MatMulRows(MatMulArgs{.a = rows.q + row * rows.head_dim_qk,
                          .a_stride = rows.head_dim_qk,
                          .b = tile.keys,
                          .b_stride = tile.key_stride,
                          .c = logits,
                          .c_stride = kTileKeys,
                          .rows = block_rows,
                          .depth = rows.head_dim_qk,
                          .cols = tile.width},
               StoreScaled{rows.scale});
    for (int64_t r = 0; r < block_rows; ++r) {
      factors[r] = SoftmaxOfTile(logits + r * kTileKeys, tile.width, visible[i + r],
                                 rows.max + row + r, rows.sums + (row + r) * kLanes);
    }
    MatMulRows(MatMulArgs{.a = logits,
                          .a_stride = kTileKeys,
                          .b = tile.values,
                          .b_stride = rows.head_dim_v,
                          .c = rows.o + row * rows.head_dim_v,
                          .c_stride = rows.head_dim_v,
                          .rows = block_rows,
                          .depth = tile.width,
                          .cols = rows.head_dim_v},
               StoreRescaled{factors});
  }
}

void SoftmaxBackward(float* HWY_RESTRICT p, float* HWY_RESTRICT ds, int32_t width,
                     VisibleKeys visible, const RowOutputs& row, float scale) {
  const hn::CappedTag<float, kLanes> d;
  const float hidden = -std::numeric_limits<float>::infinity();
  std::fill(p, p + visible.begin, hidden);
  std::fill(p + visible.end, p + width, hidden);

  const auto lse = hn::Set(d, row.lse);
  const auto gate = hn::Set(d, row.gate);
  const auto delta = hn::Set(d, row.delta);
  const auto factor = hn::Set(d, scale);
  for (int32_t i = 0; i < width; i += static_cast<int32_t>(hn::Lanes(d))) {
    // A key with all the weight may come out a rounding error above the sum.
    const auto x = hn::Min(hn::Sub(hn::LoadU(d, p + i), lse), hn::Zero(d));
    const auto probability = ExpOfNonPositive(d, x);
    const auto slope = hn::MulSub(gate, hn::LoadU(d, ds + i), delta);
    hn::StoreU(hn::Mul(hn::Mul(factor, probability), slope), d, ds + i);
    hn::StoreU(hn::Mul(gate, probability), d, p + i);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace nsa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // KERNELS_CPU_TILE_ATTENTION_INL_H_
