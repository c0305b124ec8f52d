#include "examples/text/source.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <vector>

#include "absl/strings/str_cat.h"

namespace nsa::examples {
namespace {

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

absl::StatusOr<std::string> ReadText(const std::string& path, int64_t num_bytes) {
  absl::StatusOr<std::string> source = path.empty() ? LicenseTexts() : ReadFile(path);
  if (!source.ok()) return source.status();
  std::string text;
  while (static_cast<int64_t>(text.size()) < num_bytes) text += *source;
  text.resize(num_bytes);
  return text;
}

}  // namespace nsa::examples
