#include "tools/files/files.h"

#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace nsa::tools {
namespace {

absl::Status SystemError(absl::string_view what, const std::string& path, int error) {
  return absl::ErrnoToStatus(error, absl::StrCat(what, " \"", path, "\""));
}

}  // namespace

absl::Status MakeFolder(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  return error ? SystemError("can't create the folder", path, error.value()) : absl::OkStatus();
}

absl::Status CheckReplaceable(const std::string& path) {
  std::error_code unknown;
  const std::filesystem::file_status status = std::filesystem::status(path, unknown);
  if (!std::filesystem::exists(status) || std::filesystem::is_regular_file(status)) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("can't write \"", path, "\": must be a regular file, or new"));
}

absl::Status WriteFile(const std::string& path, absl::string_view contents) {
  if (absl::Status s = CheckReplaceable(path); !s.ok()) return s;
  // Unique to the process: ranks of one host may write beside each other.
  const std::string temporary = absl::StrCat(path, ".", getpid(), ".tmp");
  std::FILE* file = std::fopen(temporary.c_str(), "wb");
  if (file == nullptr) return SystemError("can't create", path, errno);
  const bool written = std::fwrite(contents.data(), 1, contents.size(), file) == contents.size();
  const int write_error = errno;
  // Closing flushes, so it can fail for want of space too.
  const bool closed = std::fclose(file) == 0;
  const int close_error = errno;
  if (written && closed && std::rename(temporary.c_str(), path.c_str()) == 0) {
    return absl::OkStatus();
  }
  const int error = !written ? write_error : !closed ? close_error : errno;
  std::remove(temporary.c_str());
  return SystemError("can't write", path, error);
}

}  // namespace nsa::tools
