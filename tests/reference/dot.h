// The inner product of the reference's own files.
#ifndef TESTS_REFERENCE_DOT_H_
#define TESTS_REFERENCE_DOT_H_

#include <cstdint>

namespace nsa::reference {

// Eight partial sums, so that the compiler may use vector registers.
inline double Dot(const double* a, const double* b, int64_t count) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) lanes[j] += a[i + j] * b[i + j];
  }
  double sum = 0.0;
  for (; i < count; ++i) sum += a[i] * b[i];
  for (int j = 0; j < 8; ++j) sum += lanes[j];
  return sum;
}

}  // namespace nsa::reference

#endif  // TESTS_REFERENCE_DOT_H_
