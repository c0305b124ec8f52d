// The config loaders on arbitrary text: whatever is accepted keeps every rule and survives a round
// trip through the proto and both texts; whatever is refused is refused with a reason.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/json_util.h"
#include "nsa/config.h"

namespace {

void Require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

void Check(const absl::StatusOr<nsa::NsaConfig>& config) {
  if (!config.ok()) {
    Require(config.status().code() == absl::StatusCode::kInvalidArgument, "the caller's error");
    Require(!config.status().message().empty(), "an error has a message");
    return;
  }
  Require(nsa::Validate(*config).ok(), "what was accepted is valid");
  const nsa::NsaConfigProto proto = nsa::ToProto(*config);
  Require(nsa::FromProto(proto) == *config, "the proto keeps every field");
  std::string text;
  Require(google::protobuf::TextFormat::PrintToString(proto, &text), "prints as text");
  const auto from_text = nsa::ParseTextProto(text);
  Require(from_text.ok() && *from_text == *config, "text-proto keeps every field");
  std::string json;
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  Require(google::protobuf::util::MessageToJsonString(proto, &json, options).ok(),
          "prints as JSON");
  const auto from_json = nsa::ParseJson(json);
  Require(from_json.ok() && *from_json == *config, "JSON keeps every field");

  const nsa::kernels::AttentionDims dims = nsa::MakeDims(*config, nsa::DType::kBF16);
  Require(dims.group_size() >= 1 && dims.softmax_scale > 0, "dims are usable");
  for (int64_t num_tokens : {int64_t{0}, int64_t{1}, int64_t{1} << 40}) {
    Require(nsa::NumCompressionBlocks(*config, num_tokens) >= 0, "blocks are counted");
    Require(nsa::NumSelectBlocks(*config, num_tokens) >= 0, "blocks are counted");
  }
  Require(!nsa::Fields(*config).empty(), "fields are listed");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  Check(nsa::ParseTextProto(text));
  Check(nsa::ParseJson(text));
  return 0;
}
