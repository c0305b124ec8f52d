#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "absl/strings/str_cat.h"
#include "tools/files/files.h"
#include "tools/safetensors.h"
#include "tools/safetensors_header.h"

namespace nsa::tools {
namespace {

// How many names are tried for the temporary file: others may be left by writers that were killed.
constexpr int kMaxNames = 1000;

absl::Status SystemError(int error, absl::string_view call, const std::string& path) {
  return absl::ErrnoToStatus(error, absl::StrCat(call, " ", Quoted(path)));
}

}  // namespace

// A new file beside its final place; removed with the object unless it was renamed.
class SafetensorsWriter::TemporaryFile {
 public:
  static absl::StatusOr<std::unique_ptr<TemporaryFile>> Create(const std::string& path) {
    if (absl::Status s = CheckReplaceable(path); !s.ok()) return s;
    for (int i = 0; i < kMaxNames; ++i) {
      std::string name = absl::StrCat(path, ".tmp.", getpid(), ".", i);
      const int fd = open(name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (fd >= 0) return std::unique_ptr<TemporaryFile>(new TemporaryFile(std::move(name), fd));
      if (errno != EEXIST) return SystemError(errno, "open", name);
    }
    return SystemError(EEXIST, "open", absl::StrCat(path, ".tmp.*"));
  }

  ~TemporaryFile() {
    if (fd_ >= 0) close(fd_);
    if (!is_renamed_) unlink(name_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  absl::Status WriteAt(int64_t offset, const void* data, int64_t num_bytes) {
    const char* next = static_cast<const char*>(data);
    while (num_bytes > 0) {
      const ssize_t written = pwrite(fd_, next, num_bytes, offset);
      if (written < 0) {
        if (errno == EINTR) continue;
        return SystemError(errno, "pwrite", name_);
      }
      next += written;
      offset += written;
      num_bytes -= written;
    }
    return absl::OkStatus();
  }

  // The bytes reach the disk before the name does: a crash leaves the old file or the new one.
  absl::Status RenameTo(const std::string& path) {
    if (fsync(fd_) != 0) return SystemError(errno, "fsync", name_);
    const int closed = close(fd_);
    fd_ = -1;
    if (closed != 0) return SystemError(errno, "close", name_);
    if (rename(name_.c_str(), path.c_str()) != 0) return SystemError(errno, "rename", path);
    is_renamed_ = true;
    return absl::OkStatus();
  }

 private:
  TemporaryFile(std::string name, int fd) : name_(std::move(name)), fd_(fd) {}

  const std::string name_;
  int fd_;
  bool is_renamed_ = false;
};

SafetensorsWriter::SafetensorsWriter() = default;
SafetensorsWriter::~SafetensorsWriter() = default;
SafetensorsWriter::SafetensorsWriter(SafetensorsWriter&&) noexcept = default;
SafetensorsWriter& SafetensorsWriter::operator=(SafetensorsWriter&&) noexcept = default;

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::Create(
    const std::string& path, absl::Span<const TensorSpec> specs,
    const std::map<std::string, std::string>& metadata) {
  const absl::StatusOr<Header> header = LayOut(specs, metadata);
  if (!header.ok()) return header.status();
  const std::string encoded = EncodeHeader(*header);
  if (static_cast<int64_t>(encoded.size()) > kMaxHeaderBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("header of ", encoded.size(), " bytes: must have at most ", kMaxHeaderBytes));
  }
  SafetensorsWriter writer;
  writer.path_ = path;
  const int64_t data_begin = static_cast<int64_t>(encoded.size());
  for (const HeaderTensor& tensor : header->tensors) {
    writer.places_[tensor.spec.name] = {.begin = data_begin + tensor.begin,
                                        .end = data_begin + tensor.end,
                                        .next = data_begin + tensor.begin};
  }
  absl::StatusOr<std::unique_ptr<TemporaryFile>> file = TemporaryFile::Create(path);
  if (!file.ok()) return file.status();
  writer.file_ = *std::move(file);
  const absl::Status written = writer.file_->WriteAt(0, encoded.data(), data_begin);
  if (!written.ok()) return written;
  return writer;
}

absl::Status SafetensorsWriter::Append(absl::string_view name, absl::Span<const std::byte> bytes) {
  if (file_ == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("file ", Quoted(path_), ": is finished, nothing can be appended"));
  }
  const auto it = places_.find(name);
  if (it == places_.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("file ", Quoted(path_), ": has no tensor ", Quoted(name)));
  }
  Place& place = it->second;
  const int64_t num_bytes = static_cast<int64_t>(bytes.size());
  if (num_bytes > place.end - place.next) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(name), ": ", num_bytes,
                                                   " bytes appended: must be at most ",
                                                   place.end - place.next, ", which are missing"));
  }
  if (absl::Status status = file_->WriteAt(place.next, bytes.data(), num_bytes); !status.ok()) {
    return status;
  }
  place.next += num_bytes;
  return absl::OkStatus();
}

absl::Status SafetensorsWriter::Finish() {
  if (file_ == nullptr) {
    return absl::FailedPreconditionError(absl::StrCat("file ", Quoted(path_), ": is finished"));
  }
  for (const auto& [name, place] : places_) {
    if (place.next != place.end) {
      return absl::FailedPreconditionError(
          absl::StrCat("tensor ", Quoted(name), ": ", place.next - place.begin, " of ",
                       place.end - place.begin, " bytes were written"));
    }
  }
  const absl::Status status = file_->RenameTo(path_);
  file_.reset();
  return status;
}

absl::Status WriteSafetensors(const std::string& path, absl::Span<const TensorView> tensors,
                              const std::map<std::string, std::string>& metadata) {
  std::vector<TensorSpec> specs;
  for (const TensorView& tensor : tensors) specs.push_back(tensor.spec);
  absl::StatusOr<SafetensorsWriter> writer = SafetensorsWriter::Create(path, specs, metadata);
  if (!writer.ok()) return writer.status();
  for (const TensorView& tensor : tensors) {
    if (absl::Status status = writer->Append(tensor.spec.name, tensor.bytes); !status.ok()) {
      return status;
    }
  }
  return writer->Finish();
}

}  // namespace nsa::tools
