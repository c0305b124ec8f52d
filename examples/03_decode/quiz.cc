#include "examples/03_decode/quiz.h"

#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "examples/text/source.h"

namespace nsa::examples {
namespace {

constexpr int64_t kMaxRiddles = 100;
constexpr int kAnswerBytes = 12;

// Names are long and made at random, so that no two questions have much in common.
Riddle MakeRiddle(std::mt19937& random) {
  const auto pick = [&](absl::string_view letters) { return letters[random() % letters.size()]; };
  Riddle riddle = {" The code of", ""};
  for (int word = 0; word < 4; ++word) {
    riddle.question += ' ';
    for (int i = 0; i < 4; ++i) {
      riddle.question += pick("bdfgklmnprstvz");
      riddle.question += pick("aeiou");
    }
  }
  riddle.question += " is ";
  while (riddle.answer.size() < kAnswerBytes) riddle.answer += pick("bcdfghjkmnpqrstvwxz2345679");
  return riddle;
}

}  // namespace

int64_t RiddleTokens() {
  std::mt19937 random;
  return static_cast<int64_t>(MakeRiddle(random).question.size()) + kAnswerBytes;
}

absl::StatusOr<Quiz> MakeQuiz(const std::string& path, int64_t num_tokens, int64_t num_riddles) {
  const int64_t room = num_riddles == 0 ? 0 : num_tokens / num_riddles;
  if (num_riddles < 1 || num_riddles > kMaxRiddles || room < RiddleTokens() + 2) {
    return absl::InvalidArgumentError(absl::StrCat("riddles = ", num_riddles, ": must lie in [1, ",
                                                   kMaxRiddles, "] and have ", RiddleTokens() + 2,
                                                   " tokens each of the ", num_tokens));
  }
  absl::StatusOr<std::string> text = ReadText(path, num_tokens);
  if (!text.ok()) return text.status();
  Quiz quiz = {*std::move(text), {}};
  std::mt19937 random(42);
  for (int i = 0; i < num_riddles; ++i) {
    const Riddle& riddle = quiz.riddles.emplace_back(MakeRiddle(random));
    const std::string sentence = absl::StrCat(riddle.question, riddle.answer, ". ");
    const int64_t begin = i * room + static_cast<int64_t>(random() % (room - sentence.size() + 1));
    quiz.text.replace(begin, sentence.size(), sentence);
  }
  return quiz;
}

}  // namespace nsa::examples
