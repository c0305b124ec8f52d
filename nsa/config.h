// The configuration of one NSA layer: fields, their rules, and the counts that follow from them.
// Symbols and defaults: "Native Sparse Attention", arXiv:2502.11089, sections 3 and 4.
#ifndef NSA_CONFIG_H_
#define NSA_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/types.h"
#include "nsa/config.pb.h"

namespace nsa {

struct NsaConfig {
  int32_t num_q_heads = 64;             // Hq, a multiple of num_kv_heads
  int32_t num_kv_heads = 4;             // Hkv; G = Hq / Hkv query heads share one k/v head
  int32_t head_dim_qk = 128;            // Dk, one of 64, 128, 192, 256
  int32_t head_dim_v = 128;             // Dv, one of 64, 128, 192, 256
  int32_t compress_block_tokens = 32;   // l, a multiple of 16 and of d
  int32_t compress_stride_tokens = 16;  // d, a multiple of 16
  int32_t select_block_tokens = 64;     // l', a multiple of d
  int32_t num_selected_blocks = 16;     // n, the forced blocks counted in
  int32_t num_initial_blocks = 1;       // n_init, forced first blocks
  int32_t num_local_blocks = 2;         // n_local, forced last blocks up to the query's own
  int32_t window_tokens = 512;          // w, the query's own token counted in
  std::optional<float> softmax_scale = std::nullopt;  // 1 / sqrt(Dk) when absent
  Compressor compressor = Compressor::kMean;

  bool operator==(const NsaConfig&) const = default;
};

// Every broken rule of a configuration, one "field = value: rule" a line; empty when it is valid.
std::vector<std::string> BrokenRules(const NsaConfig& config);

// InvalidArgument with all of BrokenRules, or OK.
absl::Status Validate(const NsaConfig& config);

// The numbers that kernels need. `config` must be valid.
kernels::AttentionDims MakeDims(const NsaConfig& config, DType dtype);

// Blocks of a document of `num_tokens` tokens: the one place that counts them.
int64_t NumCompressionBlocks(const NsaConfig& config, int64_t num_tokens);
int64_t NumSelectBlocks(const NsaConfig& config, int64_t num_tokens);

NsaConfigProto ToProto(const NsaConfig& config);
// Does not validate. A field that is absent keeps its default.
NsaConfig FromProto(const NsaConfigProto& proto);

// Parse and validate. InvalidArgument says where the text is wrong or lists the broken rules.
absl::StatusOr<NsaConfig> ParseTextProto(absl::string_view text);
absl::StatusOr<NsaConfig> ParseJson(absl::string_view text);
// Reads a file: JSON when its name ends in ".json", else text-proto. NotFound when it can't be
// read.
absl::StatusOr<NsaConfig> LoadConfig(const std::string& path);

// The fields as (name, value) in order of declaration, for printing and comparing.
std::vector<std::pair<std::string, std::string>> Fields(const NsaConfig& config);

}  // namespace nsa

#endif  // NSA_CONFIG_H_
