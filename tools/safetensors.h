// Files of named tensors in the safetensors format: 8 bytes with the length of a JSON header, the
// header (name -> dtype, shape, data_offsets), then the tensors' bytes without holes.
#ifndef TOOLS_SAFETENSORS_H_
#define TOOLS_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace nsa::tools {

// The dtypes whose elements are whole bytes.
enum class TensorType : int8_t {
  kBool,
  kU8,
  kI8,
  kF8E4M3,
  kF8E5M2,
  kU16,
  kI16,
  kF16,
  kBF16,
  kU32,
  kI32,
  kF32,
  kU64,
  kI64,
  kF64,
};

int64_t SizeOf(TensorType type);
absl::string_view NameOf(TensorType type);  // as in files: "BF16", "F8_E4M3"

// What a file says of a tensor, apart from its bytes.
struct TensorSpec {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<int64_t> shape;  // empty: one element

  bool operator==(const TensorSpec&) const = default;
};

// InvalidArgument when an extent is negative or the size in bytes passes 2^63 - 1.
absl::StatusOr<int64_t> NumBytes(const TensorSpec& spec);

struct TensorView {
  TensorSpec spec;
  absl::Span<const std::byte> bytes;  // dense, aligned to the element size at least
};

// A file for reading. Open maps it: its pages are read when a tensor's bytes are first touched, so
// opening a large file costs only its header (tensors that lie misaligned in the file are copied).
// The file must not be cut while it is open.
class SafetensorsFile {
 public:
  // InvalidArgument, naming file, tensor, value and rule, for whatever a file may get wrong: a
  // header that is no such JSON, names twice, unknown dtypes, shapes that overflow, offsets that
  // leave the file, overlap, leave holes or do not fit the shape. System errors keep their code
  // (NotFound, ...).
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  // The same from memory, which must outlive the result. `name` stands for the file in messages.
  static absl::StatusOr<SafetensorsFile> Parse(absl::Span<const std::byte> contents,
                                               const std::string& name);

  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;
  SafetensorsFile& operator=(SafetensorsFile&&) noexcept;

  // In the order of their bytes.
  const std::vector<TensorView>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  // Null when there is no such tensor.
  const TensorView* Find(absl::string_view name) const;
  // NotFound, naming file and tensor, when there is no such tensor.
  absl::StatusOr<const TensorView*> Get(absl::string_view name) const;

 private:
  class Mapping;

  SafetensorsFile();

  std::string name_;
  std::unique_ptr<Mapping> mapping_;  // null after Parse
  std::vector<TensorView> tensors_;
  std::map<absl::string_view, size_t, std::less<>> index_;  // keys point into tensors_
  std::map<std::string, std::string> metadata_;
  // Aligned copies of tensors that lie at an odd place in the file.
  std::vector<std::unique_ptr<std::byte[]>> copies_;
};

// Writes a file piece by piece, so that it need not fit into memory. Bytes go to a temporary file
// in the same folder, which takes the name `path` when all is written: a reader sees the whole file
// or none, and a writer that gives up leaves nothing.
class SafetensorsWriter {
 public:
  // InvalidArgument for a name that comes twice, is reserved or is not UTF-8, a wrong shape, or a
  // path that is there and no regular file.
  static absl::StatusOr<SafetensorsWriter> Create(
      const std::string& path, absl::Span<const TensorSpec> specs,
      const std::map<std::string, std::string>& metadata = {});

  ~SafetensorsWriter();
  SafetensorsWriter(SafetensorsWriter&&) noexcept;
  SafetensorsWriter& operator=(SafetensorsWriter&&) noexcept;

  // Appends to the tensor `name`; tensors may be written in any order and in turns. InvalidArgument
  // when there is no such tensor or the bytes pass its end.
  absl::Status Append(absl::string_view name, absl::Span<const std::byte> bytes);

  // FailedPrecondition, naming a tensor, when bytes are missing. Nothing can be appended after.
  absl::Status Finish();

 private:
  class TemporaryFile;
  struct Place {
    int64_t begin;  // in the file
    int64_t end;
    int64_t next;  // where the next bytes go
  };

  SafetensorsWriter();

  std::string path_;
  std::unique_ptr<TemporaryFile> file_;  // null when finished
  std::map<std::string, Place, std::less<>> places_;
};

// Writes the whole file at once.
absl::Status WriteSafetensors(const std::string& path, absl::Span<const TensorView> tensors,
                              const std::map<std::string, std::string>& metadata = {});

}  // namespace nsa::tools

#endif  // TOOLS_SAFETENSORS_H_
