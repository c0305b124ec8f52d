// The configuration, between nsa_config and NsaConfig.
#include "nsa/config.h"

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "nsa/c_api/arguments.h"

namespace nsa::c_api {
namespace {

nsa_config FromConfig(const NsaConfig& config) {
  return {
      .struct_size = sizeof(nsa_config),
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
      .softmax_scale = config.softmax_scale.value_or(0),
      .compressor = static_cast<int32_t>(config.compressor),
  };
}

}  // namespace

absl::StatusOr<NsaConfig> ToConfig(const nsa_config* config) {
  const absl::StatusOr<nsa_config> read = ReadStruct("config", config);
  if (!read.ok()) return read.status();
  const bool is_known =
      read->compressor >= NSA_COMPRESSOR_MEAN && read->compressor <= NSA_COMPRESSOR_MLP;
  return NsaConfig{
      .num_q_heads = read->num_q_heads,
      .num_kv_heads = read->num_kv_heads,
      .head_dim_qk = read->head_dim_qk,
      .head_dim_v = read->head_dim_v,
      .compress_block_tokens = read->compress_block_tokens,
      .compress_stride_tokens = read->compress_stride_tokens,
      .select_block_tokens = read->select_block_tokens,
      .num_selected_blocks = read->num_selected_blocks,
      .num_initial_blocks = read->num_initial_blocks,
      .num_local_blocks = read->num_local_blocks,
      .window_tokens = read->window_tokens,
      .softmax_scale =
          read->softmax_scale == 0 ? std::nullopt : std::optional<float>(read->softmax_scale),
      // An unknown number stays invalid instead of being cut to the enum's 8 bits.
      .compressor = is_known ? static_cast<Compressor>(read->compressor) : Compressor{-1},
  };
}

}  // namespace nsa::c_api

using nsa::NsaConfig;
using nsa::c_api::CheckSet;
using nsa::c_api::FromConfig;
using nsa::c_api::Run;
using nsa::c_api::WriteStruct;

nsa_status nsa_config_init(nsa_config* config) {
  return Run([&] { return WriteStruct("config", FromConfig(NsaConfig()), config); });
}

nsa_status nsa_config_from_text(const char* text, nsa_config* config) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("text", text, "config", config); !s.ok()) return s;
    const bool is_json = absl::StartsWith(absl::StripLeadingAsciiWhitespace(text), "{");
    const absl::StatusOr<NsaConfig> parsed =
        is_json ? nsa::ParseJson(text) : nsa::ParseTextProto(text);
    if (!parsed.ok()) return parsed.status();
    return WriteStruct("config", FromConfig(*parsed), config);
  });
}

nsa_status nsa_config_validate(const nsa_config* config) {
  return Run([&]() -> absl::Status {
    const absl::StatusOr<NsaConfig> read = nsa::c_api::ToConfig(config);
    return read.ok() ? nsa::Validate(*read) : read.status();
  });
}
