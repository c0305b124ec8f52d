// Storage types to f32 and back. Included once per instruction set: see tile_ops.cc.
#if defined(KERNELS_CPU_TILE_CONVERT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_TILE_CONVERT_INL_H_
#undef KERNELS_CPU_TILE_CONVERT_INL_H_
#else
#define KERNELS_CPU_TILE_CONVERT_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/float_types.h"
#include "kernels/cpu/tile_ops.h"

HWY_BEFORE_NAMESPACE();
namespace nsa::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Highway converts f16 by truncation where the instruction set has no conversion of its own.
#undef KERNELS_CPU_HAVE_F16C
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_AVX3
#define KERNELS_CPU_HAVE_F16C 1
#else
#define KERNELS_CPU_HAVE_F16C 0
#endif

// A storage type: Load and Store move Lanes(d) values between memory and a vector of float.
struct F32Storage {
  using Element = float;
  template <class D>
  static HWY_INLINE hn::Vec<D> Load(D d, const Element* src) {
    return hn::LoadU(d, src);
  }
  template <class D>
  static HWY_INLINE void Store(D d, hn::Vec<D> value, Element* dst) {
    hn::StoreU(value, d, dst);
  }
};

struct BF16Storage {
  using Element = uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> Load(D d, const Element* src) {
    const hn::Rebind<uint16_t, D> d16;
    const hn::RebindToUnsigned<D> d32;
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, src))));
  }
  template <class D>
  static HWY_INLINE void Store(D /*d*/, hn::Vec<D> value, Element* dst) {
    const hn::Rebind<uint16_t, D> d16;
    const hn::RebindToUnsigned<D> d32;
    const hn::RebindToSigned<D> di32;
    const auto bits = hn::BitCast(d32, value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
    const auto rounded = hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fff)));
    const auto quiet = hn::Or(bits, hn::Set(d32, 0x400000));
    const auto result = hn::IfThenElse(hn::RebindMask(d32, hn::IsNaN(value)), quiet, rounded);
    hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, hn::ShiftRight<16>(result))), d16, dst);
  }
};

struct F16Storage {
  using Element = uint16_t;
  template <class D>
  static HWY_INLINE hn::Vec<D> Load(D d, const Element* src) {
#if KERNELS_CPU_HAVE_F16C
    const hn::Rebind<hwy::float16_t, D> d16;
    return hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(src)));
#else
    HWY_ALIGN float values[hn::MaxLanes(d)];
    for (size_t i = 0; i < hn::Lanes(d); ++i) values[i] = FloatFromF16(src[i]);
    return hn::Load(d, values);
#endif
  }
  template <class D>
  static HWY_INLINE void Store(D d, hn::Vec<D> value, Element* dst) {
#if KERNELS_CPU_HAVE_F16C
    const hn::Rebind<hwy::float16_t, D> d16;
    hn::StoreU(hn::DemoteTo(d16, value), d16, reinterpret_cast<hwy::float16_t*>(dst));
#else
    HWY_ALIGN float values[hn::MaxLanes(d)];
    hn::Store(value, d, values);
    for (size_t i = 0; i < hn::Lanes(d); ++i) dst[i] = F16FromFloat(values[i]);
#endif
  }
};

template <class Storage>
void ToFloatOf(const void* src, int64_t count, float* HWY_RESTRICT dst) {
  const hn::CappedTag<float, kLanes> d;
  const auto* elements = static_cast<const typename Storage::Element*>(src);
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(d))) {
    hn::StoreU(Storage::Load(d, elements + i), d, dst + i);
  }
}

template <class Storage>
void FromFloatOf(const float* HWY_RESTRICT src, int64_t count, void* dst) {
  const hn::CappedTag<float, kLanes> d;
  auto* elements = static_cast<typename Storage::Element*>(dst);
  for (int64_t i = 0; i < count; i += static_cast<int64_t>(hn::Lanes(d))) {
    Storage::Store(d, hn::Add(hn::LoadU(d, src + i), hn::Zero(d)), elements + i);
  }
}

#if HWY_TARGET == HWY_SCALAR
// Writes columns [column, column + 4) of four rows, transposed; a null row is zero.
template <class Storage>
HWY_INLINE void Transpose4x4(const typename Storage::Element* const* rows, int64_t column,
                             float* HWY_RESTRICT dst) {
  const hn::CappedTag<float, 1> d;
  for (int32_t r = 0; r < 4; ++r) {
    for (int32_t c = 0; c < 4; ++c) {
      dst[c * kTileKeys + r] =
          rows[r] == nullptr ? 0.0f : hn::GetLane(Storage::Load(d, rows[r] + column + c));
    }
  }
}
#else
template <class Storage>
HWY_INLINE void Transpose4x4(const typename Storage::Element* const* rows, int64_t column,
                             float* HWY_RESTRICT dst) {
  const hn::FixedTag<float, 4> d;
  const hn::Repartition<double, decltype(d)> d64;
  const auto load = [&](int32_t r) HWY_ATTR {
    return rows[r] == nullptr ? hn::Zero(d) : Storage::Load(d, rows[r] + column);
  };
  const auto r0 = load(0), r1 = load(1), r2 = load(2), r3 = load(3);
  const auto lo01 = hn::BitCast(d64, hn::InterleaveLower(d, r0, r1));
  const auto lo23 = hn::BitCast(d64, hn::InterleaveLower(d, r2, r3));
  const auto hi01 = hn::BitCast(d64, hn::InterleaveUpper(d, r0, r1));
  const auto hi23 = hn::BitCast(d64, hn::InterleaveUpper(d, r2, r3));
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, lo01, lo23)), d, dst);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, lo01, lo23)), d, dst + kTileKeys);
  hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, hi01, hi23)), d, dst + 2 * kTileKeys);
  hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, hi01, hi23)), d, dst + 3 * kTileKeys);
}
#endif

template <class Storage>
void TransposeToFloatOf(const void* const* rows, int32_t num_rows, int64_t count,
                        float* HWY_RESTRICT dst) {
  using Element = typename Storage::Element;
  const int32_t width = (num_rows + kLanes - 1) / kLanes * kLanes;
  for (int32_t r = 0; r < width; r += 4) {
    const Element* four_rows[4];
    for (int32_t i = 0; i < 4; ++i) {
      four_rows[i] = r + i < num_rows ? static_cast<const Element*>(rows[r + i]) : nullptr;
    }
    for (int64_t c = 0; c < count; c += 4) {
      Transpose4x4<Storage>(four_rows, c, dst + c * kTileKeys + r);
    }
  }
}

void ToFloat(DType dtype, const void* src, int64_t count, float* dst) {
  switch (dtype) {
    case DType::kF32:
      return ToFloatOf<F32Storage>(src, count, dst);
    case DType::kBF16:
      return ToFloatOf<BF16Storage>(src, count, dst);
    case DType::kF16:
      return ToFloatOf<F16Storage>(src, count, dst);
  }
}

void FromFloat(DType dtype, const float* src, int64_t count, void* dst) {
  switch (dtype) {
    case DType::kF32:
      return FromFloatOf<F32Storage>(src, count, dst);
    case DType::kBF16:
      return FromFloatOf<BF16Storage>(src, count, dst);
    case DType::kF16:
      return FromFloatOf<F16Storage>(src, count, dst);
  }
}

void TransposeToFloat(DType dtype, const void* const* rows, int32_t num_rows, int64_t count,
                      float* dst) {
  switch (dtype) {
    case DType::kF32:
      return TransposeToFloatOf<F32Storage>(rows, num_rows, count, dst);
    case DType::kBF16:
      return TransposeToFloatOf<BF16Storage>(rows, num_rows, count, dst);
    case DType::kF16:
      return TransposeToFloatOf<F16Storage>(rows, num_rows, count, dst);
  }
}

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace nsa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // KERNELS_CPU_TILE_CONVERT_INL_H_
