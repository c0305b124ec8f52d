#include "tests/testing/compare.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace nsa::test {
namespace {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kRowFactor = 8.0;
constexpr double kSmallRow = 0.1;

// Equal infinities differ by nothing; anything else that is not finite differs by infinity.
double Difference(double expected, double actual) {
  if (expected == actual) return 0.0;
  const double difference = std::fabs(actual - expected);
  return std::isfinite(difference) ? difference : kInfinity;
}

double Norm(absl::Span<const double> values) {
  double sum = 0.0;
  for (double x : values) sum += std::isfinite(x) ? x * x : 0.0;
  return std::sqrt(sum);
}

double NormOfDifference(absl::Span<const double> expected, absl::Span<const double> actual) {
  double sum = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = Difference(expected[i], actual[i]);
    sum += difference * difference;
  }
  return std::sqrt(sum);
}

std::string SizesDiffer(const std::string& name, size_t expected, size_t actual) {
  return absl::StrCat(name, " has ", actual, " values, expected ", expected);
}

// "[t, h, c]" of a flat index.
std::string Position(absl::Span<const int64_t> shape, int64_t index) {
  std::vector<int64_t> position(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    position[i] = index % shape[i];
    index /= shape[i];
  }
  return absl::StrCat("[", absl::StrJoin(position, ", "), "]");
}

int64_t NumElements(absl::Span<const int64_t> shape) {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return count;
}

uint32_t BitsAt(const void* data, int64_t index, int64_t size_bytes) {
  uint32_t bits = 0;
  std::memcpy(&bits, static_cast<const char*>(data) + index * size_bytes, size_bytes);
  return bits;
}

}  // namespace

double RelativeL2(absl::Span<const double> expected, absl::Span<const double> actual) {
  if (expected.size() != actual.size()) return kInfinity;
  const double difference = NormOfDifference(expected, actual);
  return difference == 0.0 ? 0.0 : difference / Norm(expected);
}

double DefaultTolerance(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return 2e-6;
    case DType::kBF16:
      return 8e-3;
    case DType::kF16:
      return 1e-3;
  }
  return 0.0;
}

AssertionResult Close(const std::string& name, absl::Span<const double> expected,
                      absl::Span<const double> actual, int64_t row_size, double tolerance) {
  if (expected.size() != actual.size()) {
    return AssertionFailure() << SizesDiffer(name, expected.size(), actual.size());
  }
  const int64_t num_rows = static_cast<int64_t>(expected.size()) / row_size;
  const double usual_norm = Norm(expected) / std::sqrt(std::max<double>(1.0, num_rows));
  double worst_error = -1.0;
  int64_t worst_row = 0, num_bad_rows = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    const auto e = expected.subspan(row * row_size, row_size);
    const auto a = actual.subspan(row * row_size, row_size);
    const double difference = NormOfDifference(e, a);
    const double error =
        difference == 0.0 ? 0.0 : difference / std::max(Norm(e), kSmallRow * usual_norm);
    if (!(error <= kRowFactor * tolerance)) ++num_bad_rows;
    if (!(error <= worst_error)) {
      worst_error = error;
      worst_row = row;
    }
  }
  const double whole = RelativeL2(expected, actual);
  if (whole <= tolerance && num_bad_rows == 0) return AssertionSuccess();
  int64_t worst = worst_row * row_size;
  for (int64_t i = worst; i < (worst_row + 1) * row_size; ++i) {
    if (Difference(expected[i], actual[i]) > Difference(expected[worst], actual[worst])) worst = i;
  }
  return AssertionFailure() << absl::StrFormat(
             "%s: relative L2 error %.3g (allowed %.3g), %d of %d rows off by more than %.3g; "
             "worst "
             "row %d by %.3g, at element %d: expected %.9g, actual %.9g",
             name, whole, tolerance, num_bad_rows, num_rows, kRowFactor * tolerance, worst_row,
             worst_error, worst - worst_row * row_size, expected[worst], actual[worst]);
}

AssertionResult CloseElements(const std::string& name, absl::Span<const double> expected,
                              absl::Span<const double> actual, double absolute, double relative) {
  if (expected.size() != actual.size()) {
    return AssertionFailure() << SizesDiffer(name, expected.size(), actual.size());
  }
  int64_t num_bad = 0, first = -1;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = Difference(expected[i], actual[i]);
    if (difference == 0.0 || difference <= absolute + relative * std::fabs(expected[i])) {
      // An infinite expected value would allow any difference.
      if (difference == 0.0 || std::isfinite(expected[i])) continue;
    }
    if (num_bad++ == 0) first = static_cast<int64_t>(i);
  }
  if (num_bad == 0) return AssertionSuccess();
  return AssertionFailure() << absl::StrFormat(
             "%s: %d of %d values differ by more than %.3g + %.3g * |expected|; first at %d: "
             "expected "
             "%.9g, actual %.9g",
             name, num_bad, expected.size(), absolute, relative, first, expected[first],
             actual[first]);
}

AssertionResult SameBits(const std::string& name, DType dtype, absl::Span<const int64_t> shape,
                         const void* expected, const void* actual) {
  const int64_t count = NumElements(shape), size_bytes = SizeOf(dtype);
  if (count == 0 || std::memcmp(expected, actual, count * size_bytes) == 0) {
    return AssertionSuccess();
  }
  int64_t num_different = 0, first = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (BitsAt(expected, i, size_bytes) == BitsAt(actual, i, size_bytes)) continue;
    if (num_different++ == 0) first = i;
  }
  const auto value = [&](const void* data) {
    return Decode(dtype, static_cast<const char*>(data) + first * size_bytes, 1)[0];
  };
  return AssertionFailure() << absl::StrFormat(
             "%s: %d of %d %s values differ in bits; first at %s: expected %.9g (%#x), actual %.9g "
             "(%#x)",
             name, num_different, count, NameOf(dtype), Position(shape, first), value(expected),
             BitsAt(expected, first, size_bytes), value(actual), BitsAt(actual, first, size_bytes));
}

AssertionResult SameIndices(const std::string& name, absl::Span<const int64_t> shape,
                            absl::Span<const int32_t> expected, absl::Span<const int32_t> actual) {
  const int64_t count = NumElements(shape);
  for (const auto& values : {expected, actual}) {
    if (static_cast<int64_t>(values.size()) != count) {
      return AssertionFailure() << SizesDiffer(name, count, values.size());
    }
  }
  int64_t num_different = 0, first = -1;
  for (int64_t i = 0; i < count; ++i) {
    if (expected[i] == actual[i]) continue;
    if (num_different++ == 0) first = i;
  }
  if (num_different == 0) return AssertionSuccess();
  return AssertionFailure() << name << ": " << num_different << " of " << count
                            << " indices differ; first at " << Position(shape, first)
                            << ": expected " << expected[first] << ", actual " << actual[first];
}

}  // namespace nsa::test
