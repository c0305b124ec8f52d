// Elementwise work and reductions on rows of f32. Included once per instruction set: see
// tile_ops.cc.
#if defined(KERNELS_CPU_TILE_ROWS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_TILE_ROWS_INL_H_
#undef KERNELS_CPU_TILE_ROWS_INL_H_
#else
#define KERNELS_CPU_TILE_ROWS_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/tile_ops.h"

HWY_BEFORE_NAMESPACE();
namespace nsa::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// e^x for x <= 0 (also -inf), within about 1e-7 of it; 0 where the result would be subnormal, and
// exactly 1 at 0.
template <class D>
HWY_INLINE hn::Vec<D> ExpOfNonPositive(D d, hn::Vec<D> x) {
  const hn::RebindToSigned<D> di;
  // Just above the logarithm of the smallest normal number, 2^-126.
  const auto lowest = hn::Set(d, -87.3f);
  const auto clamped = hn::Max(x, lowest);
  // e^x = 2^n e^r with |r| <= ln(2) / 2. ln(2) in two parts, of which the first times n is exact.
  const auto n = hn::Round(hn::Mul(clamped, hn::Set(d, 1.44269504088896341f)));
  auto r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), clamped);
  r = hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r);
  auto p = hn::Set(d, 1.9875691500e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1f));
  p = hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127)));
  return hn::IfThenZeroElse(hn::Lt(x, lowest), hn::Mul(p, hn::BitCast(d, exponent)));
}

HWY_INLINE float ExpOfNonPositive(float x) {
  const hn::CappedTag<float, 4> d;
  return hn::GetLane(ExpOfNonPositive(d, hn::Set(d, x)));
}

void AddScaled(const float* HWY_RESTRICT src, int64_t count, float factor,
               float* HWY_RESTRICT dst) {
  const hn::CappedTag<float, kLanes> d;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  const auto f = hn::Set(d, factor);
  for (int64_t i = 0; i < count; i += step) {
    hn::StoreU(hn::MulAdd(hn::LoadU(d, src + i), f, hn::LoadU(d, dst + i)), d, dst + i);
  }
}

void Scale(float factor, int64_t count, float* dst) {
  const hn::CappedTag<float, kLanes> d;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  const auto f = hn::Set(d, factor);
  for (int64_t i = 0; i < count; i += step) {
    hn::StoreU(hn::Mul(hn::LoadU(d, dst + i), f), d, dst + i);
  }
}

float MaxOf(const float* x, int64_t count) {
  const hn::CappedTag<float, kLanes> d;
  const int64_t step = static_cast<int64_t>(hn::Lanes(d));
  auto max = hn::Set(d, x[0]);
  int64_t i = 0;
  for (; i + step <= count; i += step) max = hn::Max(max, hn::LoadU(d, x + i));
  float result = hn::GetLane(hn::MaxOfLanes(d, max));
  for (; i < count; ++i) result = std::max(result, x[i]);
  return result;
}

void ExpAndSum(float* x, int32_t width, int32_t count, float max, float* sums) {
  const hn::CappedTag<float, kLanes> d;
  const int32_t step = static_cast<int32_t>(hn::Lanes(d));
  const auto m = hn::Set(d, max);
  for (int32_t lane = 0; lane < kLanes; lane += step) {
    auto sum = hn::LoadU(d, sums + lane);
    auto tile_sum = hn::Zero(d);
    for (int32_t i = lane; i < width; i += kLanes) {
      auto p = ExpOfNonPositive(d, hn::Sub(hn::LoadU(d, x + i), m));
      if (i + step > count) {
        const auto seen = hn::FirstN(d, static_cast<size_t>(std::max(count - i, 0)));
        p = hn::IfThenElseZero(seen, p);
      }
      hn::StoreU(p, d, x + i);
      tile_sum = hn::Add(tile_sum, p);
    }
    hn::StoreU(hn::Add(sum, tile_sum), d, sums + lane);
  }
}

void AddProducts(const float* a, const float* b, int64_t count, float* lanes) {
  const hn::CappedTag<float, kLanes> d;
  const int32_t step = static_cast<int32_t>(hn::Lanes(d));
  for (int32_t lane = 0; lane < kLanes; lane += step) {
    auto sum = hn::LoadU(d, lanes + lane);
    for (int64_t i = lane; i < count; i += kLanes) {
      sum = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum);
    }
    hn::StoreU(sum, d, lanes + lane);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace nsa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // KERNELS_CPU_TILE_ROWS_INL_H_
