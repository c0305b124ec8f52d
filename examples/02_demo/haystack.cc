#include "examples/02_demo/haystack.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "examples/text/source.h"

namespace nsa::examples {
namespace {

constexpr char kNeedle[] = " The secret code of the old lighthouse keeper is ";
constexpr char kAnswer[] = "pelican-7351";

}  // namespace

absl::StatusOr<Haystack> MakeHaystack(const std::string& path, int64_t num_tokens,
                                      double depth_percent) {
  const std::string needle = absl::StrCat(kNeedle, kAnswer, ". ");
  // All of the answer but its last byte: each of the last queries sees the bytes before "its" one.
  const std::string question =
      absl::StrCat(kNeedle, absl::string_view(kAnswer).substr(0, sizeof(kAnswer) - 2));
  const int64_t room = num_tokens - static_cast<int64_t>(needle.size() + question.size());
  if (room < 0) {
    return absl::InvalidArgumentError(absl::StrCat("tokens = ", num_tokens, ": must be at least ",
                                                   needle.size() + question.size(),
                                                   ", the needle and the question"));
  }
  if (!(depth_percent >= 0 && depth_percent <= 100)) {
    return absl::InvalidArgumentError(
        absl::StrCat("depth = ", depth_percent, ": must lie in [0, 100]"));
  }
  absl::StatusOr<std::string> text = ReadText(path, num_tokens);
  if (!text.ok()) return text.status();
  Haystack haystack;
  haystack.text = *std::move(text);
  haystack.needle_begin = static_cast<int64_t>(static_cast<double>(room) * depth_percent / 100);
  haystack.answer_begin = haystack.needle_begin + static_cast<int64_t>(sizeof(kNeedle)) - 1;
  haystack.answer = kAnswer;
  haystack.text.replace(haystack.needle_begin, needle.size(), needle);
  haystack.text.replace(num_tokens - question.size(), question.size(), question);
  return haystack;
}

}  // namespace nsa::examples
