#include "tests/reference/rounding.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace nsa::reference {
namespace {

// A binary type: `significand_bits` counts the implicit one; `min_exponent` is that of the smallest
// normal value, `max_exponent` that of the largest, both as in 2^e.
double RoundToBinary(double x, int significand_bits, int min_exponent, int max_exponent) {
  if (x == 0.0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  // One unit in the last place; scaling by a power of two is exact, nearbyint rounds ties to even.
  const int ulp_log2 = exponent - (significand_bits - 1);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -ulp_log2)), ulp_log2);
  if (std::fabs(rounded) >= std::ldexp(1.0, max_exponent + 1)) {
    return std::copysign(std::numeric_limits<double>::infinity(), x);
  }
  return rounded;
}

}  // namespace

double Round(Rounding rounding, double x) {
  switch (rounding) {
    case Rounding::kNone:
      return x;
    case Rounding::kF32:
      return RoundToBinary(x, 24, -126, 127);
    case Rounding::kBF16:
      return RoundToBinary(x, 8, -126, 127);
    case Rounding::kF16:
      return RoundToBinary(x, 11, -14, 15);
  }
  return x;
}

}  // namespace nsa::reference
