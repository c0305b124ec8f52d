#include "tools/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "tools/safetensors_header.h"

namespace nsa::tools {
namespace {

static_assert(std::endian::native == std::endian::little, "files are little-endian");

constexpr int64_t kLengthBytes = sizeof(uint64_t);

absl::Status InFile(const std::string& name, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("file ", Quoted(name), ": ", what));
}

absl::Status SystemError(int error, absl::string_view call, const std::string& path) {
  return absl::ErrnoToStatus(error, absl::StrCat(call, " ", Quoted(path)));
}

}  // namespace

class SafetensorsFile::Mapping {
 public:
  Mapping(void* data, size_t num_bytes) : data_(data), num_bytes_(num_bytes) {}
  ~Mapping() { munmap(data_, num_bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  absl::Span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(data_), num_bytes_};
  }

 private:
  void* const data_;
  const size_t num_bytes_;
};

SafetensorsFile::SafetensorsFile() = default;
SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;
SafetensorsFile& SafetensorsFile::operator=(SafetensorsFile&&) noexcept = default;

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  // Without O_NONBLOCK, opening a named pipe would wait for its writer.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return SystemError(errno, "open", path);
  const absl::Cleanup close_fd = [fd] { close(fd); };
  struct stat status;
  if (fstat(fd, &status) != 0) return SystemError(errno, "fstat", path);
  if (!S_ISREG(status.st_mode)) return InFile(path, "must be a regular file");
  if (status.st_size == 0) return InFile(path, "0 bytes: must have at least 8");
  void* data = mmap(nullptr, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) return SystemError(errno, "mmap", path);
  auto mapping = std::make_unique<Mapping>(data, status.st_size);
  absl::StatusOr<SafetensorsFile> file = Parse(mapping->bytes(), path);
  if (file.ok()) file->mapping_ = std::move(mapping);
  return file;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Parse(absl::Span<const std::byte> contents,
                                                       const std::string& name) {
  const int64_t num_bytes = static_cast<int64_t>(contents.size());
  if (num_bytes < kLengthBytes) {
    return InFile(name, absl::StrCat(num_bytes, " bytes: must have at least 8"));
  }
  uint64_t length;
  std::memcpy(&length, contents.data(), kLengthBytes);
  if (length > static_cast<uint64_t>(kMaxHeaderBytes)) {
    return InFile(name,
                  absl::StrCat("header length = ", length, ": must be at most ", kMaxHeaderBytes));
  }
  const int64_t data_begin = kLengthBytes + static_cast<int64_t>(length);
  if (data_begin > num_bytes) {
    return InFile(name, absl::StrCat("header length = ", length, ": must be at most the ",
                                     num_bytes - kLengthBytes, " bytes that follow"));
  }
  const absl::string_view text(reinterpret_cast<const char*>(contents.data()) + kLengthBytes,
                               length);
  absl::StatusOr<Header> header = ParseHeader(text, num_bytes - data_begin);
  if (!header.ok()) return InFile(name, header.status().message());

  SafetensorsFile file;
  file.name_ = name;
  file.metadata_ = std::move(header->metadata);
  file.tensors_.reserve(header->tensors.size());
  for (HeaderTensor& tensor : header->tensors) {
    absl::Span<const std::byte> bytes =
        contents.subspan(data_begin + tensor.begin, tensor.end - tensor.begin);
    if (reinterpret_cast<uintptr_t>(bytes.data()) % SizeOf(tensor.spec.type) != 0) {
      auto copy = std::make_unique<std::byte[]>(bytes.size());
      std::memcpy(copy.get(), bytes.data(), bytes.size());
      bytes = {copy.get(), bytes.size()};
      file.copies_.push_back(std::move(copy));
    }
    file.tensors_.push_back({std::move(tensor.spec), bytes});
  }
  for (size_t i = 0; i < file.tensors_.size(); ++i) file.index_[file.tensors_[i].spec.name] = i;
  return file;
}

const TensorView* SafetensorsFile::Find(absl::string_view name) const {
  const auto it = index_.find(name);
  return it == index_.end() ? nullptr : &tensors_[it->second];
}

absl::StatusOr<const TensorView*> SafetensorsFile::Get(absl::string_view name) const {
  const TensorView* tensor = Find(name);
  if (tensor == nullptr) {
    return absl::NotFoundError(
        absl::StrCat("file ", Quoted(name_), ": has no tensor ", Quoted(name)));
  }
  return tensor;
}

}  // namespace nsa::tools
