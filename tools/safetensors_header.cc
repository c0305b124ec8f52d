#include "tools/safetensors_header.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

namespace nsa::tools {
namespace {

using Json = nlohmann::json;

constexpr int64_t kHeaderAlignment = 64;
constexpr char kMetadata[] = "__metadata__";

struct TypeInfo {
  TensorType type;
  absl::string_view name;
  int64_t size_bytes;
};
constexpr TypeInfo kTypes[] = {
    {TensorType::kBool, "BOOL", 1},      {TensorType::kU8, "U8", 1},
    {TensorType::kI8, "I8", 1},          {TensorType::kF8E4M3, "F8_E4M3", 1},
    {TensorType::kF8E5M2, "F8_E5M2", 1}, {TensorType::kU16, "U16", 2},
    {TensorType::kI16, "I16", 2},        {TensorType::kF16, "F16", 2},
    {TensorType::kBF16, "BF16", 2},      {TensorType::kU32, "U32", 4},
    {TensorType::kI32, "I32", 4},        {TensorType::kF32, "F32", 4},
    {TensorType::kU64, "U64", 8},        {TensorType::kI64, "I64", 8},
    {TensorType::kF64, "F64", 8},
};

const TypeInfo& InfoOf(TensorType type) { return kTypes[static_cast<int>(type)]; }

std::optional<TensorType> TypeNamed(absl::string_view name) {
  for (const TypeInfo& info : kTypes) {
    if (info.name == name) return info.type;
  }
  return std::nullopt;
}

std::string ShapeString(const std::vector<int64_t>& shape) {
  constexpr size_t kMaxShown = 16;
  const auto shown = absl::MakeConstSpan(shape).subspan(0, std::min(kMaxShown, shape.size()));
  return absl::StrCat("[", absl::StrJoin(shown, ", "), shape.size() > kMaxShown ? ", ..." : "",
                      "]");
}

absl::Status TensorError(absl::string_view tensor, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("tensor ", Quoted(tensor), ": ", what));
}

// Reads the header as a stream of events: it is never held as a tree, nothing nests deeper than the
// format does, and a name that comes twice is seen.
class HeaderReader : public nlohmann::json_sax<Json> {
 public:
  absl::StatusOr<Header> Read(absl::string_view text) {
    const bool read = Json::sax_parse(text.begin(), text.end(), this);
    if (!status_.ok()) return status_;
    if (!read) return absl::InvalidArgumentError("header: not JSON");
    return std::move(header_);
  }

  bool null() override { return Scalar("null"); }
  bool boolean(bool value) override { return Scalar(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return Scalar(absl::StrCat(value)); }
  bool number_float(number_float_t, const string_t& text) override { return Scalar(text); }
  bool binary(binary_t&) override { return Scalar("binary"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != Place::kNumbers) return Scalar(absl::StrCat(value));
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Fail(FieldMessage(absl::StrCat(value), "must be at most 2^63 - 1"));
    }
    if (field_ == "shape") {
      header_.tensors.back().spec.shape.push_back(static_cast<int64_t>(value));
    } else {
      if (num_offsets_ == 0) header_.tensors.back().begin = static_cast<int64_t>(value);
      if (num_offsets_ == 1) header_.tensors.back().end = static_cast<int64_t>(value);
      ++num_offsets_;
    }
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::kMetadata) {
      header_.metadata[field_] = std::move(value);
      return true;
    }
    if (place_ != Place::kTensor || field_ != "dtype") return Scalar(Quoted(value));
    const std::optional<TensorType> type = TypeNamed(value);
    if (!type.has_value()) {
      return Fail(FieldMessage(
          Quoted(value),
          absl::StrCat("must be one of ",
                       absl::StrJoin(kTypes, ", ", [](std::string* out, const TypeInfo& info) {
                         absl::StrAppend(out, info.name);
                       }))));
    }
    header_.tensors.back().spec.type = *type;
    return true;
  }

  bool start_object(std::size_t) override {
    switch (place_) {
      case Place::kStart:
        place_ = Place::kRoot;
        return true;
      case Place::kRoot:
        fields_.clear();
        if (name_ == kMetadata) {
          place_ = Place::kMetadata;
        } else {
          place_ = Place::kTensor;
          header_.tensors.emplace_back().spec.name = name_;
        }
        return true;
      default:
        return Scalar("{");
    }
  }

  bool key(string_t& value) override {
    if (place_ == Place::kRoot) {
      name_ = std::move(value);
      if (!names_.insert(name_).second) {
        return Fail(absl::StrCat("tensor ", Quoted(name_), ": must come once"));
      }
      return true;
    }
    field_ = std::move(value);
    if (!fields_.insert(field_).second) {
      return Fail(FieldMessage("again", "must come once"));
    }
    if (place_ == Place::kTensor && field_ != "dtype" && field_ != "shape" &&
        field_ != "data_offsets") {
      return Fail(absl::StrCat("tensor ", Quoted(name_), ": field ", Quoted(field_),
                               ": must be dtype, shape or data_offsets"));
    }
    return true;
  }

  bool end_object() override {
    if (place_ == Place::kTensor && fields_.size() != 3) {
      return Fail(
          absl::StrCat("tensor ", Quoted(name_), ": must have dtype, shape and data_offsets"));
    }
    place_ = Place::kRoot;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::kTensor || field_ == "dtype") return Scalar("[");
    place_ = Place::kNumbers;
    num_offsets_ = 0;
    return true;
  }

  bool end_array() override {
    place_ = Place::kTensor;
    if (field_ == "data_offsets" && num_offsets_ != 2) {
      return Fail(FieldMessage(absl::StrCat(num_offsets_, " numbers"), "must be two"));
    }
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return Fail(absl::StrCat("header: not JSON at byte ", position));
  }

 private:
  enum class Place {
    kStart,     // before the outermost object
    kRoot,      // in it
    kMetadata,  // in the object "__metadata__"
    kTensor,    // in the object of a tensor
    kNumbers,   // in the array of a tensor's shape or data_offsets
  };

  bool Fail(std::string message) {
    // The first error is the cause of the others.
    if (status_.ok()) status_ = absl::InvalidArgumentError(std::move(message));
    return false;
  }

  std::string FieldMessage(absl::string_view value, absl::string_view rule) const {
    return absl::StrCat(name_ == kMetadata ? "" : "tensor ", Quoted(name_), ": ", Quoted(field_),
                        " = ", value, ": ", rule);
  }

  // A value where the format has another one.
  bool Scalar(absl::string_view value) {
    switch (place_) {
      case Place::kStart:
        return Fail(absl::StrCat("header = ", value, ": must be an object"));
      case Place::kRoot:
        return Fail(absl::StrCat("tensor ", Quoted(name_), " = ", value, ": must be an object"));
      case Place::kMetadata:
        return Fail(FieldMessage(value, "must be a string"));
      case Place::kTensor:
        return Fail(FieldMessage(
            value, field_ == "dtype" ? "must be a string" : "must be an array of integers >= 0"));
      case Place::kNumbers:
        return Fail(FieldMessage(value, "must be an array of integers >= 0"));
    }
    return false;
  }

  Header header_;
  absl::Status status_;
  Place place_ = Place::kStart;
  std::string name_;   // of the tensor, or "__metadata__"
  std::string field_;  // of the object in the outermost one
  std::set<std::string> names_;
  std::set<std::string> fields_;
  int64_t num_offsets_ = 0;
};

// Tensors must fill [0, data_bytes) one after another.
absl::Status CheckPlaces(const Header& header, int64_t data_bytes) {
  int64_t end = 0;
  for (const HeaderTensor& tensor : header.tensors) {
    const absl::StatusOr<int64_t> num_bytes = NumBytes(tensor.spec);
    if (!num_bytes.ok()) return num_bytes.status();
    const std::string offsets =
        absl::StrCat("data_offsets = [", tensor.begin, ", ", tensor.end, "]: ");
    const absl::string_view name = tensor.spec.name;
    if (tensor.end < tensor.begin) return TensorError(name, absl::StrCat(offsets, "must ascend"));
    if (tensor.end > data_bytes) {
      return TensorError(name, absl::StrCat(offsets, "must lie within the ", data_bytes,
                                            " bytes after the header"));
    }
    if (tensor.end - tensor.begin != *num_bytes) {
      return TensorError(
          name, absl::StrCat(offsets, "must span ", *num_bytes, " bytes, for ",
                             NameOf(tensor.spec.type), " ", ShapeString(tensor.spec.shape)));
    }
    if (tensor.begin != end) {
      return TensorError(
          name, absl::StrCat(offsets, "must begin at ", end, ", where the tensor before it ends"));
    }
    end = tensor.end;
  }
  if (end != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat("tensors end at ", end, " of the ", data_bytes,
                                                   " bytes after the header: must fill them"));
  }
  return absl::OkStatus();
}

bool IsUtf8(const std::string& text) {
  // Serializing replaces what is not UTF-8 with U+FFFD; then it does not read back the same.
  const std::string json = Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
  const Json parsed = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  return parsed.is_string() && parsed.get_ref<const std::string&>() == text;
}

}  // namespace

int64_t SizeOf(TensorType type) { return InfoOf(type).size_bytes; }

absl::string_view NameOf(TensorType type) { return InfoOf(type).name; }

std::string Quoted(absl::string_view name) {
  constexpr size_t kMaxShown = 80;
  const std::string escaped = absl::CHexEscape(name.substr(0, kMaxShown));
  return absl::StrCat("\"", escaped, "\"", name.size() > kMaxShown ? "..." : "");
}

absl::StatusOr<int64_t> NumBytes(const TensorSpec& spec) {
  int64_t num_bytes = SizeOf(spec.type);
  bool is_empty = false;
  for (int64_t extent : spec.shape) {
    if (extent < 0) {
      return TensorError(
          spec.name, absl::StrCat("shape = ", ShapeString(spec.shape), ": extents must be >= 0"));
    }
    // An empty tensor's other extents must not overflow either: a reader may multiply them first.
    is_empty |= extent == 0;
    if (extent != 0 && __builtin_mul_overflow(num_bytes, extent, &num_bytes)) {
      return TensorError(
          spec.name, absl::StrCat("shape = ", ShapeString(spec.shape), " of ", NameOf(spec.type),
                                  ": must have at most 2^63 - 1 bytes"));
    }
  }
  return is_empty ? 0 : num_bytes;
}

absl::StatusOr<Header> ParseHeader(absl::string_view text, int64_t data_bytes) {
  if (text.empty() || text[0] != '{') {
    return absl::InvalidArgumentError("header: must begin with {");
  }
  absl::StatusOr<Header> header = HeaderReader().Read(text);
  if (!header.ok()) return header;
  std::sort(header->tensors.begin(), header->tensors.end(),
            [](const HeaderTensor& a, const HeaderTensor& b) {
              return std::tie(a.begin, a.end, a.spec.name) < std::tie(b.begin, b.end, b.spec.name);
            });
  if (absl::Status status = CheckPlaces(*header, data_bytes); !status.ok()) return status;
  return header;
}

absl::StatusOr<Header> LayOut(absl::Span<const TensorSpec> specs,
                              const std::map<std::string, std::string>& metadata) {
  Header header;
  header.metadata = metadata;
  for (const auto& [key, value] : metadata) {
    if (!IsUtf8(key) || !IsUtf8(value)) {
      return absl::InvalidArgumentError(
          absl::StrCat("metadata ", Quoted(key), " = ", Quoted(value), ": must be UTF-8"));
    }
  }
  std::set<absl::string_view> names;
  for (const TensorSpec& spec : specs) {
    if (spec.name == kMetadata) return TensorError(spec.name, "this name is reserved");
    if (!IsUtf8(spec.name)) return TensorError(spec.name, "the name must be UTF-8");
    if (!names.insert(spec.name).second) return TensorError(spec.name, "must come once");
    header.tensors.push_back({.spec = spec});
  }
  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const HeaderTensor& a, const HeaderTensor& b) {
                     return SizeOf(a.spec.type) > SizeOf(b.spec.type);
                   });
  int64_t end = 0;
  for (HeaderTensor& tensor : header.tensors) {
    const absl::StatusOr<int64_t> num_bytes = NumBytes(tensor.spec);
    if (!num_bytes.ok()) return num_bytes.status();
    tensor.begin = end;
    if (__builtin_add_overflow(end, *num_bytes, &end)) {
      return TensorError(tensor.spec.name, "all tensors must have at most 2^63 - 1 bytes together");
    }
    tensor.end = end;
  }
  return header;
}

std::string EncodeHeader(const Header& header) {
  Json json = Json::object();
  if (!header.metadata.empty()) json[kMetadata] = header.metadata;
  for (const HeaderTensor& tensor : header.tensors) {
    json[tensor.spec.name] = {
        {"dtype", std::string(NameOf(tensor.spec.type))},
        {"shape", tensor.spec.shape},
        {"data_offsets", {tensor.begin, tensor.end}},
    };
  }
  const std::string text = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  const int64_t end = static_cast<int64_t>(sizeof(uint64_t) + text.size());
  const int64_t padding = (kHeaderAlignment - end % kHeaderAlignment) % kHeaderAlignment;
  const uint64_t length = text.size() + padding;
  std::string encoded;
  for (int i = 0; i < 8; ++i) encoded.push_back(static_cast<char>(length >> (8 * i)));
  return absl::StrCat(encoded, text, std::string(padding, ' '));
}

}  // namespace nsa::tools
