#include "tests/reference/rounding.h"

#include <cmath>
#include <limits>

#include "gtest/gtest.h"

namespace nsa::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(RoundingTest, NoneKeepsTheValue) { EXPECT_EQ(Round(Rounding::kNone, 0.1), 0.1); }

TEST(RoundingTest, F32IsTheCastOfTheMachine) {
  for (double x : {0.1, -1.0 / 3.0, 1e-40, 1e-46, 3.0e38, 16777217.0, 7e-46, -0.0}) {
    EXPECT_EQ(Round(Rounding::kF32, x), static_cast<double>(static_cast<float>(x))) << x;
  }
}

TEST(RoundingTest, Bf16) {
  EXPECT_EQ(Round(Rounding::kBF16, 1.0 + 1.0 / 128), 1.0 + 1.0 / 128);
  EXPECT_EQ(Round(Rounding::kBF16, 1.0 + 1.0 / 256), 1.0);             // tie to even
  EXPECT_EQ(Round(Rounding::kBF16, 1.0 + 3.0 / 256), 1.0 + 1.0 / 64);  // tie to even
  EXPECT_EQ(Round(Rounding::kBF16, 1.0 + 1.01 / 256), 1.0 + 1.0 / 128);
  EXPECT_EQ(Round(Rounding::kBF16, 3.4e38), kInfinity);
  EXPECT_EQ(Round(Rounding::kBF16, std::ldexp(1.0, -133)), std::ldexp(1.0, -133));  // subnormal
  EXPECT_EQ(Round(Rounding::kBF16, std::ldexp(1.0, -134)), 0.0);
}

TEST(RoundingTest, F16) {
  EXPECT_EQ(Round(Rounding::kF16, 65504.0), 65504.0);
  EXPECT_EQ(Round(Rounding::kF16, 65519.0), 65504.0);
  EXPECT_EQ(Round(Rounding::kF16, -65520.0), -kInfinity);
  EXPECT_EQ(Round(Rounding::kF16, 2049.0), 2048.0);
  EXPECT_EQ(Round(Rounding::kF16, 2051.0), 2052.0);
  EXPECT_EQ(Round(Rounding::kF16, std::ldexp(1.0, -24)), std::ldexp(1.0, -24));
  EXPECT_EQ(Round(Rounding::kF16, std::ldexp(3.0, -25)), std::ldexp(1.0, -23));
}

TEST(RoundingTest, SpecialValuesPass) {
  EXPECT_EQ(Round(Rounding::kBF16, -kInfinity), -kInfinity);
  EXPECT_TRUE(std::isnan(Round(Rounding::kF16, std::nan(""))));
  EXPECT_TRUE(std::signbit(Round(Rounding::kF16, -0.0)));
}

}  // namespace
}  // namespace nsa::reference
