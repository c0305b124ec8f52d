// Comparisons that say where two tensors differ, for use in EXPECT_TRUE.
#ifndef TESTS_TESTING_COMPARE_H_
#define TESTS_TESTING_COMPARE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "kernels/types.h"
#include "tests/reference/reference.h"
#include "tests/testing/numeric.h"

namespace nsa::test {

// ||actual - expected|| / ||expected||; 0 when both are zero, infinity when sizes differ or a value
// is not finite in one of them only.
double RelativeL2(absl::Span<const double> expected, absl::Span<const double> actual);

// What a relative L2 error of whole tensors may be when only the rounding of `dtype` and the order
// of f32 sums differ from the reference.
double DefaultTolerance(DType dtype);

// Compares rows of `row_size` values, so that one wrong row of a long tensor is not averaged away:
// the relative L2 error of the whole must be within `tolerance`, and the error of each row within
// 8 * tolerance of the row's norm (or, for small rows, of a tenth of the usual norm). NaN fails;
// infinities must be equal. Failure names `name`, the row, and its worst element.
::testing::AssertionResult Close(const std::string& name, absl::Span<const double> expected,
                                 absl::Span<const double> actual, int64_t row_size,
                                 double tolerance);

// The same values to a fixed distance, for LSEs: |a - e| <= absolute + relative * |e|.
::testing::AssertionResult CloseElements(const std::string& name, absl::Span<const double> expected,
                                         absl::Span<const double> actual, double absolute,
                                         double relative);

// Compares bytes; failure names the number of differences and the first one, as an index into
// `shape` with both values and bit patterns. A NaN equals itself.
::testing::AssertionResult SameBits(const std::string& name, DType dtype,
                                    absl::Span<const int64_t> shape, const void* expected,
                                    const void* actual);
::testing::AssertionResult SameIndices(const std::string& name, absl::Span<const int64_t> shape,
                                       absl::Span<const int32_t> expected,
                                       absl::Span<const int32_t> actual);

struct SelectionOptions {
  // A block may take another's place when its score is at most this much lower.
  double absolute = 1e-6;
  double relative = 1e-4;  // of the score left out
  // Tokens to compare, in the packed sequence; null: all.
  const std::vector<int64_t>* query_tokens = nullptr;
};

// Whether `actual` [S,Hkv,n] is a right choice under the reference's scores: ascending, padded with
// -1, as many blocks as there must be, every forced block in, none past the query's own, and no
// block left out for another whose score is lower by more than rounding explains. Adds the number
// of rows that differ from the reference's own choice to *num_flipped (nullable).
::testing::AssertionResult SelectionAgrees(const reference::ReferenceConfig& config,
                                           const std::vector<int64_t>& cu_seqlens,
                                           const reference::ReferenceOutputs& expected,
                                           absl::Span<const int32_t> actual,
                                           const SelectionOptions& options = {},
                                           int64_t* num_flipped = nullptr);

}  // namespace nsa::test

#endif  // TESTS_TESTING_COMPARE_H_
