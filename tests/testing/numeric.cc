#include "tests/testing/numeric.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace nsa::test {
namespace {

// Drops the `count` low bits, to nearest, ties to even.
uint32_t ShiftRightRounded(uint32_t x, int count) {
  const uint32_t kept = x >> count;
  const uint32_t dropped = x & ((1u << count) - 1);
  const uint32_t half = 1u << (count - 1);
  return kept + (dropped > half || (dropped == half && (kept & 1)) ? 1 : 0);
}

}  // namespace

uint16_t BF16FromFloat(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  // A carry out of the mantissa raises the exponent, up to that of infinity: as it should be.
  return static_cast<uint16_t>(ShiftRightRounded(bits, 16));
}

uint16_t F16FromFloat(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (std::isnan(x)) return static_cast<uint16_t>(sign | 0x7e00);
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  uint32_t half = 0;
  if (exponent >= 16) {
    half = 0x7c00;
  } else if (exponent >= -14) {
    half = ShiftRightRounded(magnitude - (112u << 23), 13);
  } else if (exponent >= -25) {
    // Subnormal: the whole significand, in units of 2^-24.
    half = ShiftRightRounded((magnitude & 0x7fffff) | 0x800000, 13 + (-14 - exponent));
  }
  return static_cast<uint16_t>(sign | half);
}

float FloatFromBF16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

float FloatFromF16(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f;
  const int mantissa = bits & 0x3ff;
  float magnitude;
  if (exponent == 31) {
    magnitude = mantissa == 0 ? std::numeric_limits<float>::infinity()
                              : std::numeric_limits<float>::quiet_NaN();
  } else if (exponent == 0) {
    magnitude = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    magnitude = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return (bits & 0x8000) ? -magnitude : magnitude;
}

Bytes Encode(DType dtype, absl::Span<const double> values) {
  Bytes bytes(values.size() * SizeOf(dtype));
  std::byte* out = bytes.data();
  for (double value : values) {
    const float x = static_cast<float>(value);
    if (dtype == DType::kF32) {
      std::memcpy(out, &x, sizeof(x));
    } else {
      const uint16_t bits = dtype == DType::kBF16 ? BF16FromFloat(x) : F16FromFloat(x);
      std::memcpy(out, &bits, sizeof(bits));
    }
    out += SizeOf(dtype);
  }
  return bytes;
}

std::vector<double> Decode(DType dtype, const void* data, int64_t count) {
  std::vector<double> values(count);
  const std::byte* in = static_cast<const std::byte*>(data);
  for (double& value : values) {
    if (dtype == DType::kF32) {
      float x;
      std::memcpy(&x, in, sizeof(x));
      value = x;
    } else {
      uint16_t bits;
      std::memcpy(&bits, in, sizeof(bits));
      value = dtype == DType::kBF16 ? FloatFromBF16(bits) : FloatFromF16(bits);
    }
    in += SizeOf(dtype);
  }
  return values;
}

std::vector<double> Decode(DType dtype, const Bytes& bytes) {
  return Decode(dtype, bytes.data(), static_cast<int64_t>(bytes.size()) / SizeOf(dtype));
}

std::vector<double> Rounded(DType dtype, absl::Span<const double> values) {
  return Decode(dtype, Encode(dtype, values));
}

Bytes SliceRows(const Bytes& bytes, int64_t row_bytes, int64_t row_begin, int64_t num_rows) {
  const auto begin = bytes.begin() + row_begin * row_bytes;
  return Bytes(begin, begin + num_rows * row_bytes);
}

}  // namespace nsa::test
