// A text with secret codes in it, and the questions for them.
#ifndef EXAMPLES_03_DECODE_QUIZ_H_
#define EXAMPLES_03_DECODE_QUIZ_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace nsa::examples {

struct Riddle {
  std::string question;
  std::string answer;  // what follows the question where it stands in the text
};

struct Quiz {
  std::string text;
  std::vector<Riddle> riddles;  // each of the same length
};

// Bytes of a question and its answer.
int64_t RiddleTokens();

// The license texts of this system, or the file at `path`, repeated or cut to `num_tokens` bytes,
// with as many riddles spread over it, at most 100. InvalidArgument when they have no room.
absl::StatusOr<Quiz> MakeQuiz(const std::string& path, int64_t num_tokens, int64_t num_riddles);

}  // namespace nsa::examples

#endif  // EXAMPLES_03_DECODE_QUIZ_H_
