// Single values of the storage types: bf16 and f16 are carried as their bits.
#ifndef KERNELS_CPU_FLOAT_TYPES_H_
#define KERNELS_CPU_FLOAT_TYPES_H_

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/types.h"

namespace nsa::kernels::cpu {

inline float FloatFromBF16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline float FloatFromF16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1f;
  const uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | (wide << 23) | (mantissa << 13));
}

// Nearest, ties to even; overflow becomes infinity. A NaN stays a NaN.
inline uint16_t F16FromFloat(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {
    // Below the smallest normal: adding 0.5 puts the bits to keep at the end of the mantissa.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000) >> 13);
}

// Element i of an array of `dtype`.
inline float LoadFloat(DType dtype, const void* values, int64_t i) {
  switch (dtype) {
    case DType::kBF16:
      return FloatFromBF16(static_cast<const uint16_t*>(values)[i]);
    case DType::kF16:
      return FloatFromF16(static_cast<const uint16_t*>(values)[i]);
    case DType::kF32:
      break;
  }
  return static_cast<const float*>(values)[i];
}

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_FLOAT_TYPES_H_
