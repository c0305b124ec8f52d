#include "tests/testing/numeric.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gtest/gtest.h"
#include "tests/reference/rounding.h"

namespace nsa::test {
namespace {

// Floats of every exponent and sign, with mantissas at, just below and just above ties.
std::vector<float> Probes() {
  std::vector<float> probes;
  for (uint32_t exponent = 0; exponent < 255; ++exponent) {
    for (uint32_t mantissa : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0x18000u, 0xfffu, 0x1000u, 0x1001u,
                              0x3000u, 0x2aaaaau, 0x7fffffu, 0x7fe000u, 0x7fefffu, 0x7ff000u}) {
      for (uint32_t sign : {0u, 1u}) {
        probes.push_back(std::bit_cast<float>(sign << 31 | exponent << 23 | mantissa));
      }
    }
  }
  return probes;
}

// The reference rounds by arithmetic and this file by bits: they check one another.
TEST(NumericTest, RoundsAsTheReference) {
  for (float x : Probes()) {
    ASSERT_EQ(FloatFromBF16(BF16FromFloat(x)), reference::Round(reference::Rounding::kBF16, x))
        << x;
    ASSERT_EQ(FloatFromF16(F16FromFloat(x)), reference::Round(reference::Rounding::kF16, x)) << x;
  }
}

TEST(NumericTest, EveryBitPatternSurvives) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float bf16 = FloatFromBF16(static_cast<uint16_t>(bits));
    const float f16 = FloatFromF16(static_cast<uint16_t>(bits));
    if (std::isnan(bf16)) {
      ASSERT_TRUE(std::isnan(FloatFromBF16(BF16FromFloat(bf16))));
    } else {
      ASSERT_EQ(BF16FromFloat(bf16), bits);
    }
    if (std::isnan(f16)) {
      ASSERT_TRUE(std::isnan(FloatFromF16(F16FromFloat(f16))));
    } else {
      ASSERT_EQ(F16FromFloat(f16), bits);
    }
  }
}

TEST(NumericTest, EncodesKnownBits) {
  EXPECT_EQ(BF16FromFloat(1.0f), 0x3f80);
  EXPECT_EQ(BF16FromFloat(-2.5f), 0xc020);
  EXPECT_EQ(F16FromFloat(1.0f), 0x3c00);
  EXPECT_EQ(F16FromFloat(-65504.0f), 0xfbff);
  const Bytes bytes = Encode(DType::kBF16, {1.0, -2.5});
  EXPECT_EQ(bytes, (Bytes{std::byte{0x80}, std::byte{0x3f}, std::byte{0x20}, std::byte{0xc0}}));
  EXPECT_EQ(Decode(DType::kBF16, bytes), (std::vector<double>{1.0, -2.5}));
  EXPECT_EQ(Decode(DType::kF32, Encode(DType::kF32, {0.1})), std::vector<double>{0.1f});
  EXPECT_EQ(SliceRows(bytes, 2, 1, 1), (Bytes{std::byte{0x20}, std::byte{0xc0}}));
}

}  // namespace
}  // namespace nsa::test
