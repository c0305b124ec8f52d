// The safetensors reader on arbitrary bytes, twice: as a file, and as a header text and data
// (parted by the first NUL) behind a true length, since a random length is nearly always refused at
// once.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "tools/safetensors.h"
#include "tools/safetensors_header.h"

namespace {

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

// What was accepted must be readable to its last byte, and be accepted again when written anew.
void Check(absl::string_view input) {
  // In memory of exactly its size, so that a read past the end is seen.
  const auto* bytes = reinterpret_cast<const std::byte*>(input.data());
  const std::vector<std::byte> contents(bytes, bytes + input.size());
  const auto file = nsa::tools::SafetensorsFile::Parse(contents, "fuzzed");
  if (!file.ok()) {
    Require(!file.status().message().empty(), "an error has a message");
    return;
  }
  std::vector<nsa::tools::TensorSpec> specs;
  int64_t num_bytes = 0;
  for (const nsa::tools::TensorView& tensor : file->tensors()) {
    const std::vector<std::byte> copy(tensor.bytes.begin(), tensor.bytes.end());
    Require(absl::MakeConstSpan(copy) == tensor.bytes, "every byte can be read");
    num_bytes += static_cast<int64_t>(tensor.bytes.size());
    Require(reinterpret_cast<uintptr_t>(tensor.bytes.data()) % SizeOf(tensor.spec.type) == 0,
            "tensors are aligned");
    Require(file->Find(tensor.spec.name) == &tensor, "a tensor is found by its name");
    specs.push_back(tensor.spec);
  }

  const auto header = nsa::tools::LayOut(specs, file->metadata());
  Require(header.ok(), "what was read can be written");
  const std::string encoded = nsa::tools::EncodeHeader(*header);
  const auto again = nsa::tools::ParseHeader(absl::string_view(encoded).substr(8), num_bytes);
  Require(again.ok(), "what was written can be read");
  Require(again->metadata == file->metadata(), "metadata survive");
  Require(again->tensors.size() == specs.size(), "tensors survive");
  for (const nsa::tools::HeaderTensor& tensor : again->tensors) {
    const nsa::tools::TensorView* original = file->Find(tensor.spec.name);
    Require(original != nullptr && original->spec == tensor.spec, "specs survive");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view input(reinterpret_cast<const char*>(data), size);
  Check(input);

  const absl::string_view text = input.substr(0, input.find('\0'));
  absl::string_view tensors = input.substr(text.size());
  if (!tensors.empty()) tensors.remove_prefix(1);
  std::string length;
  for (int i = 0; i < 8; ++i) length.push_back(static_cast<char>(text.size() >> (8 * i)));
  Check(absl::StrCat(length, text, tensors));
  return 0;
}
