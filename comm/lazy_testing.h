// Libraries for the test of lazy_library.
#ifndef COMM_LAZY_TESTING_H_
#define COMM_LAZY_TESTING_H_

#include "absl/status/status.h"

namespace nsa::comm {

absl::Status OpenTestMath();
absl::Status OpenMissing();
absl::Status OpenOldMath();

}  // namespace nsa::comm

#endif  // COMM_LAZY_TESTING_H_
