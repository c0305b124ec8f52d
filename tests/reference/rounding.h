// Rounding a double to the nearest value of a narrower type, by arithmetic on the value.
#ifndef TESTS_REFERENCE_ROUNDING_H_
#define TESTS_REFERENCE_ROUNDING_H_

namespace nsa::reference {

enum class Rounding { kNone, kF32, kBF16, kF16 };

// The value of the type nearest to `x`, ties to even; beyond the largest finite value, infinity.
double Round(Rounding rounding, double x);

}  // namespace nsa::reference

#endif  // TESTS_REFERENCE_ROUNDING_H_
