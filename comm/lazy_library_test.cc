#include "comm/lazy_library.h"

#include "absl/strings/match.h"
#include "comm/lazy_testing.h"
#include "gtest/gtest.h"

// Of the math library, by the header that a caller would include.
extern "C" double y0(double x);

namespace nsa::comm {
namespace {

// `y0` is not the math library's here, but a jump that leads there once it is open.
TEST(LazyLibraryTest, CallsWhatItHasOpened) {
  volatile double one = 1;  // or the compiler knows the result
  EXPECT_DEATH(y0(one), "before the library was opened");
  ASSERT_TRUE(OpenTestMath().ok()) << OpenTestMath();
  EXPECT_NEAR(y0(one), 0.08825696, 1e-8);
  ASSERT_TRUE(OpenTestMath().ok());
  EXPECT_NEAR(y0(one), 0.08825696, 1e-8);
}

TEST(LazyLibraryTest, NamesTheLibraryThatIsMissing) {
  const absl::Status status = OpenMissing();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StartsWith(status.message(), "Missing: libnot-there.so.1: ")) << status;
}

TEST(LazyLibraryTest, NamesTheFunctionThatIsMissing) {
  const absl::Status status = OpenOldMath();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(status.message(), "libm.so.6 has no nsa_of_tomorrow")) << status;
}

}  // namespace
}  // namespace nsa::comm
