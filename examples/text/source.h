// Text to try things on.
#ifndef EXAMPLES_TEXT_SOURCE_H_
#define EXAMPLES_TEXT_SOURCE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace nsa::examples {

// The license texts of this system, or the file at `path`, repeated or cut to `num_bytes`.
// InvalidArgument when they can't be read.
absl::StatusOr<std::string> ReadText(const std::string& path, int64_t num_bytes);

}  // namespace nsa::examples

#endif  // EXAMPLES_TEXT_SOURCE_H_
