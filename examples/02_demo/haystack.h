// A text with a needle in it, and the question for the needle at its end.
#ifndef EXAMPLES_02_DEMO_HAYSTACK_H_
#define EXAMPLES_02_DEMO_HAYSTACK_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace nsa::examples {

struct Haystack {
  std::string text;      // num_tokens bytes
  int64_t needle_begin;  // of the needle's sentence
  int64_t answer_begin;  // of the answer inside it
  std::string answer;    // the last answer.size() queries must retrieve it, byte by byte
};

// The license texts of this system, or the file at `path`, repeated or cut to `num_tokens` bytes,
// with a needle at `depth_percent`. InvalidArgument when they can't be read or are too short.
absl::StatusOr<Haystack> MakeHaystack(const std::string& path, int64_t num_tokens,
                                      double depth_percent);

}  // namespace nsa::examples

#endif  // EXAMPLES_02_DEMO_HAYSTACK_H_
