#include "examples/02_demo/haystack.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "absl/strings/str_cat.h"

namespace nsa::demo {
namespace {

constexpr char kNeedle[] = " The secret code of the old lighthouse keeper is ";
constexpr char kAnswer[] = "pelican-7351";

absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return absl::InvalidArgumentError(
        absl::StrCat("text \"", path.string(), "\": can't be read or is empty"));
  }
  return text.str();
}

absl::StatusOr<std::string> LicenseTexts() {
  const std::filesystem::path folder = "/usr/share/common-licenses";
  std::vector<std::filesystem::path> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    if (entry.is_regular_file() && !entry.is_symlink()) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  std::string text;
  for (const auto& file : files) {
    absl::StatusOr<std::string> one = ReadFile(file);
    if (!one.ok()) return one.status();
    text += *one;
  }
  if (text.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("no texts in ", folder.string(), ": name a file with --text"));
  }
  return text;
}

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
  absl::StatusOr<std::string> source = path.empty() ? LicenseTexts() : ReadFile(path);
  if (!source.ok()) return source.status();
  Haystack haystack;
  while (static_cast<int64_t>(haystack.text.size()) < num_tokens) haystack.text += *source;
  haystack.text.resize(num_tokens);
  haystack.needle_begin = static_cast<int64_t>(static_cast<double>(room) * depth_percent / 100);
  haystack.answer_begin = haystack.needle_begin + static_cast<int64_t>(sizeof(kNeedle)) - 1;
  haystack.answer = kAnswer;
  haystack.text.replace(haystack.needle_begin, needle.size(), needle);
  haystack.text.replace(num_tokens - question.size(), question.size(), question);
  return haystack;
}

}  // namespace nsa::demo
