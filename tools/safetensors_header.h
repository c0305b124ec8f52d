// The header of a safetensors file: text to checked list of tensors, and back.
#ifndef TOOLS_SAFETENSORS_HEADER_H_
#define TOOLS_SAFETENSORS_HEADER_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "tools/safetensors.h"

namespace nsa::tools {

// The longest header that is read, as in other implementations of the format.
constexpr int64_t kMaxHeaderBytes = 100'000'000;

struct HeaderTensor {
  TensorSpec spec;
  // In bytes, from the first byte after the header.
  int64_t begin = 0;
  int64_t end = 0;
};

struct Header {
  std::vector<HeaderTensor> tensors;  // ascending by (begin, end, name)
  std::map<std::string, std::string> metadata;
};

// Reads the JSON text of a file with `data_bytes` bytes after it. InvalidArgument names the tensor,
// the value and the rule, not the file.
absl::StatusOr<Header> ParseHeader(absl::string_view text, int64_t data_bytes);

// Gives every tensor its place, those with larger elements first, so that each is aligned to its
// elements. InvalidArgument as SafetensorsWriter::Create.
absl::StatusOr<Header> LayOut(absl::Span<const TensorSpec> specs,
                              const std::map<std::string, std::string>& metadata);

// The bytes before the data: length and text, padded with spaces to a multiple of 64.
std::string EncodeHeader(const Header& header);

// `name` in quotes, for a message: escaped, and cut when very long.
std::string Quoted(absl::string_view name);

}  // namespace nsa::tools

#endif  // TOOLS_SAFETENSORS_HEADER_H_
