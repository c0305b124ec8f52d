// The 16-bit types in software, and tensors of doubles to and from the bytes of a storage type.
#ifndef TESTS_TESTING_NUMERIC_H_
#define TESTS_TESTING_NUMERIC_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/types.h"

namespace nsa::test {

// Nearest, ties to even; past the largest finite value infinity; a NaN stays a NaN.
uint16_t BF16FromFloat(float x);
uint16_t F16FromFloat(float x);
float FloatFromBF16(uint16_t bits);
float FloatFromF16(uint16_t bits);

using Bytes = std::vector<std::byte>;

// By way of float; exact when the values are representable in `dtype`.
Bytes Encode(DType dtype, absl::Span<const double> values);
std::vector<double> Decode(DType dtype, const void* data, int64_t count);
std::vector<double> Decode(DType dtype, const Bytes& bytes);

inline std::vector<double> ToDoubles(absl::Span<const float> values) {
  return {values.begin(), values.end()};
}

// The values as `dtype` would keep them.
std::vector<double> Rounded(DType dtype, absl::Span<const double> values);

// Bytes of rows [row_begin, row_begin + num_rows) of a dense tensor.
Bytes SliceRows(const Bytes& bytes, int64_t row_bytes, int64_t row_begin, int64_t num_rows);

}  // namespace nsa::test

#endif  // TESTS_TESTING_NUMERIC_H_
