// Writing small files whole.
#ifndef TOOLS_FILES_FILES_H_
#define TOOLS_FILES_FILES_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace nsa::tools {

// Creates the folder `path` and those above it; OK when it is there already.
absl::Status MakeFolder(const std::string& path);

// InvalidArgument when `path` is there and is no regular file: writing beside it and renaming would
// put a file in its place, of a device for one.
absl::Status CheckReplaceable(const std::string& path);

// Writes beside `path` and renames, so that a reader sees the whole file or the one before. The
// error names the path and the system's reason. CheckReplaceable comes first.
absl::Status WriteFile(const std::string& path, absl::string_view contents);

}  // namespace nsa::tools

#endif  // TOOLS_FILES_FILES_H_
