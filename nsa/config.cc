#include "nsa/config.h"

#include <cmath>
#include <fstream>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/json_util.h"

namespace nsa {
namespace {

// The integer fields, by name: the one list from which reading, writing and printing follow.
struct IntField {
  const char* name;
  int32_t NsaConfig::*member;
};
constexpr IntField kIntFields[] = {
    {"num_q_heads", &NsaConfig::num_q_heads},
    {"num_kv_heads", &NsaConfig::num_kv_heads},
    {"head_dim_qk", &NsaConfig::head_dim_qk},
    {"head_dim_v", &NsaConfig::head_dim_v},
    {"compress_block_tokens", &NsaConfig::compress_block_tokens},
    {"compress_stride_tokens", &NsaConfig::compress_stride_tokens},
    {"select_block_tokens", &NsaConfig::select_block_tokens},
    {"num_selected_blocks", &NsaConfig::num_selected_blocks},
    {"num_initial_blocks", &NsaConfig::num_initial_blocks},
    {"num_local_blocks", &NsaConfig::num_local_blocks},
    {"window_tokens", &NsaConfig::window_tokens},
};

constexpr int32_t kMaxHeads = 4096;
constexpr int32_t kMaxBlockTokens = 4096;
constexpr int32_t kMaxSelectedBlocks = 4096;
constexpr int32_t kMaxWindowTokens = 1 << 30;

const google::protobuf::FieldDescriptor* ProtoField(const char* name) {
  return NsaConfigProto::descriptor()->FindFieldByName(name);
}

// Collects "line:column: message" of every parse error.
class ErrorList : public google::protobuf::io::ErrorCollector {
 public:
  void AddError(int line, google::protobuf::io::ColumnNumber column,
                const std::string& message) override {
    errors_.push_back(absl::StrCat(line + 1, ":", column + 1, ": ", message));
  }
  std::string Join() const { return absl::StrJoin(errors_, "; "); }

 private:
  std::vector<std::string> errors_;
};

absl::StatusOr<NsaConfig> ValidatedFromProto(const NsaConfigProto& proto) {
  NsaConfig config = FromProto(proto);
  if (absl::Status status = Validate(config); !status.ok()) return status;
  return config;
}

}  // namespace

std::vector<std::string> BrokenRules(const NsaConfig& config) {
  std::vector<std::string> broken;
  auto require = [&broken](bool holds, const char* name, auto value, const std::string& rule) {
    if (!holds) broken.push_back(absl::StrCat(name, " = ", value, ": ", rule));
    return holds;
  };
  auto require_range = [&](const char* name, int32_t value, int32_t low, int32_t high) {
    return require(value >= low && value <= high, name, value,
                   absl::StrCat("must lie in [", low, ", ", high, "]"));
  };

  const bool q_ok = require_range("num_q_heads", config.num_q_heads, 1, kMaxHeads);
  const bool kv_ok = require_range("num_kv_heads", config.num_kv_heads, 1, kMaxHeads);
  if (q_ok && kv_ok) {
    require(config.num_q_heads % config.num_kv_heads == 0, "num_q_heads", config.num_q_heads,
            absl::StrCat("must be a multiple of num_kv_heads = ", config.num_kv_heads));
  }
  for (const auto& [name, dim] :
       {std::pair{"head_dim_qk", config.head_dim_qk}, std::pair{"head_dim_v", config.head_dim_v}}) {
    require(dim == 64 || dim == 128 || dim == 192 || dim == 256, name, dim,
            "must be one of 64, 128, 192, 256");
  }

  auto require_multiple = [&](const char* name, int32_t value, int32_t of) {
    return require_range(name, value, of, kMaxBlockTokens) &&
           require(value % of == 0, name, value, absl::StrCat("must be a multiple of ", of));
  };
  const bool d_ok = require_multiple("compress_stride_tokens", config.compress_stride_tokens, 16);
  auto require_divided_by_stride = [&](const char* name, int32_t value) {
    if (!d_ok || value < 1) return;
    require(value % config.compress_stride_tokens == 0, name, value,
            absl::StrCat("must be a multiple of compress_stride_tokens = ",
                         config.compress_stride_tokens));
  };
  if (require_multiple("compress_block_tokens", config.compress_block_tokens, 16)) {
    require_divided_by_stride("compress_block_tokens", config.compress_block_tokens);
  }
  if (require_range("select_block_tokens", config.select_block_tokens, 16, kMaxBlockTokens)) {
    require_divided_by_stride("select_block_tokens", config.select_block_tokens);
  }

  const bool n_ok =
      require_range("num_selected_blocks", config.num_selected_blocks, 1, kMaxSelectedBlocks);
  const bool init_ok =
      require_range("num_initial_blocks", config.num_initial_blocks, 0, kMaxSelectedBlocks);
  const bool local_ok =
      require_range("num_local_blocks", config.num_local_blocks, 1, kMaxSelectedBlocks);
  if (n_ok && init_ok && local_ok) {
    const int32_t forced = config.num_initial_blocks + config.num_local_blocks;
    require(config.num_selected_blocks >= forced, "num_selected_blocks", config.num_selected_blocks,
            absl::StrCat("must be at least num_initial_blocks + num_local_blocks = ", forced));
  }
  require_range("window_tokens", config.window_tokens, 1, kMaxWindowTokens);
  if (config.softmax_scale.has_value()) {
    require(std::isfinite(*config.softmax_scale) && *config.softmax_scale > 0, "softmax_scale",
            *config.softmax_scale, "must be finite and positive");
  }
  require(config.compressor >= Compressor::kMean && config.compressor <= Compressor::kMlp,
          "compressor", static_cast<int>(config.compressor),
          "must be MEAN, WEIGHTED, LINEAR or MLP");
  return broken;
}

absl::Status Validate(const NsaConfig& config) {
  const std::vector<std::string> broken = BrokenRules(config);
  if (broken.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("config: ", absl::StrJoin(broken, "; ")));
}

kernels::AttentionDims MakeDims(const NsaConfig& config, DType dtype) {
  return {
      .dtype = dtype,
      .num_q_heads = config.num_q_heads,
      .num_kv_heads = config.num_kv_heads,
      .head_dim_qk = config.head_dim_qk,
      .head_dim_v = config.head_dim_v,
      .compress_block_tokens = config.compress_block_tokens,
      .compress_stride_tokens = config.compress_stride_tokens,
      .select_block_tokens = config.select_block_tokens,
      .num_selected_blocks = config.num_selected_blocks,
      .num_initial_blocks = config.num_initial_blocks,
      .num_local_blocks = config.num_local_blocks,
      .window_tokens = config.window_tokens,
      .softmax_scale = config.softmax_scale.value_or(
          static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.head_dim_qk)))),
  };
}

int64_t NumCompressionBlocks(const NsaConfig& config, int64_t num_tokens) {
  if (num_tokens < config.compress_block_tokens) return 0;
  return (num_tokens - config.compress_block_tokens) / config.compress_stride_tokens + 1;
}

int64_t NumSelectBlocks(const NsaConfig& config, int64_t num_tokens) {
  return (num_tokens + config.select_block_tokens - 1) / config.select_block_tokens;
}

NsaConfigProto ToProto(const NsaConfig& config) {
  NsaConfigProto proto;
  for (const IntField& field : kIntFields) {
    proto.GetReflection()->SetInt32(&proto, ProtoField(field.name), config.*field.member);
  }
  if (config.softmax_scale.has_value()) proto.set_softmax_scale(*config.softmax_scale);
  proto.set_compressor(static_cast<NsaConfigProto::Compressor>(config.compressor));
  return proto;
}

NsaConfig FromProto(const NsaConfigProto& proto) {
  NsaConfig config;
  for (const IntField& field : kIntFields) {
    const auto* descriptor = ProtoField(field.name);
    if (proto.GetReflection()->HasField(proto, descriptor)) {
      config.*field.member = proto.GetReflection()->GetInt32(proto, descriptor);
    }
  }
  if (proto.has_softmax_scale()) config.softmax_scale = proto.softmax_scale();
  if (proto.has_compressor()) {
    // An unknown number stays invalid instead of being cut to the enum's 8 bits.
    config.compressor = NsaConfigProto::Compressor_IsValid(proto.compressor())
                            ? static_cast<Compressor>(proto.compressor())
                            : static_cast<Compressor>(-1);
  }
  return config;
}

absl::StatusOr<NsaConfig> ParseTextProto(absl::string_view text) {
  NsaConfigProto proto;
  ErrorList errors;
  google::protobuf::TextFormat::Parser parser;
  parser.RecordErrorsTo(&errors);
  if (!parser.ParseFromString(std::string(text), &proto)) {
    return absl::InvalidArgumentError(absl::StrCat("config text-proto: ", errors.Join()));
  }
  return ValidatedFromProto(proto);
}

absl::StatusOr<NsaConfig> ParseJson(absl::string_view text) {
  NsaConfigProto proto;
  const auto status = google::protobuf::util::JsonStringToMessage(std::string(text), &proto);
  if (!status.ok()) {
    return absl::InvalidArgumentError(absl::StrCat("config JSON: ", status.ToString()));
  }
  return ValidatedFromProto(proto);
}

absl::StatusOr<NsaConfig> LoadConfig(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return absl::NotFoundError(
        absl::StrCat("config file \"", path, "\" can't be read or is empty"));
  }
  absl::StatusOr<NsaConfig> config =
      absl::EndsWith(path, ".json") ? ParseJson(text.str()) : ParseTextProto(text.str());
  if (config.ok()) return config;
  return absl::Status(config.status().code(), absl::StrCat(path, ": ", config.status().message()));
}

std::vector<std::pair<std::string, std::string>> Fields(const NsaConfig& config) {
  std::vector<std::pair<std::string, std::string>> fields;
  for (const IntField& field : kIntFields) {
    fields.emplace_back(field.name, absl::StrCat(config.*field.member));
  }
  fields.emplace_back("softmax_scale",
                      config.softmax_scale ? absl::StrCat(*config.softmax_scale) : "default");
  fields.emplace_back(
      "compressor",
      NsaConfigProto::Compressor_Name(static_cast<NsaConfigProto::Compressor>(config.compressor)));
  return fields;
}

}  // namespace nsa
