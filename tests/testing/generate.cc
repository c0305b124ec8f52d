#include "tests/testing/generate.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace nsa::test {
namespace {

using reference::CompressorKind;
using reference::CompressorParameters;
using reference::ReferenceConfig;
using reference::ReferenceInputs;

// Tokens over which the keys of the compressed branch keep a common part.
constexpr int64_t kKeyRunTokens = 16;

std::vector<double> Normals(DType dtype, int64_t count, double scale, Random* random) {
  std::vector<double> values(count);
  for (double& x : values) x = scale * random->Normal();
  return Rounded(dtype, values);
}

// A multiple of `step` in [step, max].
int64_t Multiple(int64_t step, int64_t max, Random* random) {
  return step * random->Int(1, std::max<int64_t>(1, max / step));
}

std::vector<double> CompressedKeys(int64_t num_tokens, int64_t row_size, DType dtype,
                                   Random* random) {
  std::vector<double> keys(num_tokens * row_size);
  std::vector<double> common(row_size);
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (t % kKeyRunTokens == 0) {
      for (double& x : common) x = random->Normal();
    }
    for (int64_t c = 0; c < row_size; ++c) keys[t * row_size + c] = common[c] + random->Normal();
  }
  return Rounded(dtype, keys);
}

CompressorParameters RandomParameters(const ReferenceConfig& config, int64_t head_dim,
                                      const InputOptions& options, Random* random) {
  CompressorParameters parameters;
  if (config.compressor == CompressorKind::kMean) return parameters;
  const int64_t l = config.compress_block_tokens;
  const int64_t heads = options.parameters_per_head ? config.num_kv_heads : 1;
  const int64_t width = options.hidden_width;
  const DType dtype = options.parameter_dtype;
  parameters.num_heads = heads;
  if (options.with_pe) parameters.pe = Normals(dtype, heads * l * head_dim, 0.5, random);
  // Scaled so that summaries of unit inputs are near unit size.
  const double flat_scale = 1.0 / std::sqrt(static_cast<double>(l * head_dim));
  switch (config.compressor) {
    case CompressorKind::kMean:
      break;
    case CompressorKind::kWeighted:
      parameters.weight = Normals(dtype, heads * l, 1.0 / std::sqrt(double(l)), random);
      break;
    case CompressorKind::kLinear:
      parameters.w = Normals(dtype, heads * head_dim * l * head_dim, flat_scale, random);
      break;
    case CompressorKind::kMlp:
      parameters.hidden_width = width;
      parameters.w1 = Normals(dtype, heads * width * l * head_dim, flat_scale, random);
      parameters.b1 = Normals(dtype, heads * width, 0.5, random);
      parameters.w2 =
          Normals(dtype, heads * head_dim * width, 1.5 / std::sqrt(double(width)), random);
      parameters.b2 = Normals(dtype, heads * head_dim, 0.5, random);
      break;
  }
  return parameters;
}

EncodedParameters EncodeParameters(const CompressorParameters& parameters, DType dtype) {
  EncodedParameters encoded;
  encoded.dtype = dtype;
  encoded.num_heads = static_cast<int32_t>(parameters.num_heads);
  encoded.hidden_width = static_cast<int32_t>(parameters.hidden_width);
  encoded.weight = Encode(dtype, parameters.weight);
  encoded.pe = Encode(dtype, parameters.pe);
  encoded.w = Encode(dtype, parameters.w);
  encoded.w1 = Encode(dtype, parameters.w1);
  encoded.b1 = Encode(dtype, parameters.b1);
  encoded.w2 = Encode(dtype, parameters.w2);
  encoded.b2 = Encode(dtype, parameters.b2);
  return encoded;
}

}  // namespace

ReferenceConfig RandomConfig(const ConfigBounds& bounds, Random* random) {
  ReferenceConfig config;
  config.num_kv_heads = random->Int(1, std::min<int64_t>(4, bounds.max_q_heads));
  config.num_q_heads =
      config.num_kv_heads * random->Int(1, bounds.max_q_heads / config.num_kv_heads);
  config.head_dim_qk = Multiple(64, bounds.max_head_dim, random);
  config.head_dim_v =
      random->OneIn(2) ? config.head_dim_qk : Multiple(64, bounds.max_head_dim, random);
  // Small strides and short blocks more often: they make more blocks of a short sequence.
  config.compress_stride_tokens =
      random->OneIn(3) ? Multiple(16, bounds.max_compress_block_tokens / 2, random) : 16;
  const int64_t d = config.compress_stride_tokens;
  config.compress_block_tokens = Multiple(d, bounds.max_compress_block_tokens, random);
  config.select_block_tokens = Multiple(d, bounds.max_select_block_tokens, random);
  config.num_initial_blocks = random->Int(0, 2);
  config.num_local_blocks =
      random->Int(1, std::min<int64_t>(3, bounds.max_selected_blocks - config.num_initial_blocks));
  config.num_selected_blocks =
      random->Int(config.num_initial_blocks + config.num_local_blocks, bounds.max_selected_blocks);
  config.window_tokens = random->OneIn(8) ? 1 : random->Int(1, bounds.max_window_tokens);
  if (random->OneIn(4)) config.softmax_scale = 0.0625 * static_cast<double>(random->Int(1, 4));
  config.compressor = random->Pick({CompressorKind::kMean, CompressorKind::kWeighted,
                                    CompressorKind::kLinear, CompressorKind::kMlp});
  return config;
}

std::vector<int64_t> RandomDocuments(const ReferenceConfig& config, int64_t num_tokens,
                                     int64_t max_documents, Random* random) {
  const int64_t l = config.compress_block_tokens;
  std::vector<int64_t> cu_seqlens = {0};
  const int64_t num_documents = random->Int(1, max_documents);
  while (cu_seqlens.back() < num_tokens) {
    const int64_t left = num_tokens - cu_seqlens.back();
    int64_t length = left;
    if (static_cast<int64_t>(cu_seqlens.size()) < num_documents) {
      length =
          random->OneIn(3) ? random->Pick<int64_t>({1, l - 1, l, l + 1}) : random->Int(1, left);
    }
    cu_seqlens.push_back(cu_seqlens.back() + std::min(left, length));
  }
  return cu_seqlens;
}

ReferenceInputs RandomInputs(const ReferenceConfig& config, const std::vector<int64_t>& cu_seqlens,
                             const InputOptions& options, Random* random) {
  const int64_t s = cu_seqlens.back();
  const int64_t k_row = config.num_kv_heads * config.head_dim_qk;
  const int64_t v_row = config.num_kv_heads * config.head_dim_v;
  // The logits of unit q and k have a deviation of scale * sqrt(Dk).
  const double root = std::sqrt(static_cast<double>(config.head_dim_qk));
  const double unit = config.softmax_scale.value_or(1.0 / root) * root;
  ReferenceInputs inputs;
  inputs.cu_seqlens = cu_seqlens;
  inputs.q = Normals(options.dtype, s * config.num_q_heads * config.head_dim_qk,
                     options.logit_scale / unit, random);
  inputs.k_cmp = CompressedKeys(s, k_row, options.dtype, random);
  inputs.v_cmp = Normals(options.dtype, s * v_row, 1.0, random);
  for (auto* k : {&inputs.k_slc, &inputs.k_win}) {
    *k = options.share_keys ? inputs.k_cmp : Normals(options.dtype, s * k_row, 1.0, random);
  }
  for (auto* v : {&inputs.v_slc, &inputs.v_win}) {
    *v = options.share_keys ? inputs.v_cmp : Normals(options.dtype, s * v_row, 1.0, random);
  }
  inputs.gate.resize(s * config.num_q_heads * 3);
  for (double& x : inputs.gate) x = random->Uniform();
  inputs.gate = Rounded(options.gate_dtype, inputs.gate);
  inputs.compress_k = RandomParameters(config, config.head_dim_qk, options, random);
  inputs.compress_v = RandomParameters(config, config.head_dim_v, options, random);
  return inputs;
}

Compressor MakeCompressor(CompressorKind kind) {
  switch (kind) {
    case CompressorKind::kMean:
      return Compressor::kMean;
    case CompressorKind::kWeighted:
      return Compressor::kWeighted;
    case CompressorKind::kLinear:
      return Compressor::kLinear;
    case CompressorKind::kMlp:
      return Compressor::kMlp;
  }
  return Compressor::kMean;
}

reference::Rounding SummaryRounding(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return reference::Rounding::kF32;
    case DType::kBF16:
      return reference::Rounding::kBF16;
    case DType::kF16:
      return reference::Rounding::kF16;
  }
  return reference::Rounding::kNone;
}

kernels::AttentionDims MakeDims(const ReferenceConfig& config, DType dtype) {
  kernels::AttentionDims dims;
  dims.dtype = dtype;
  dims.num_q_heads = static_cast<int32_t>(config.num_q_heads);
  dims.num_kv_heads = static_cast<int32_t>(config.num_kv_heads);
  dims.head_dim_qk = static_cast<int32_t>(config.head_dim_qk);
  dims.head_dim_v = static_cast<int32_t>(config.head_dim_v);
  dims.compress_block_tokens = static_cast<int32_t>(config.compress_block_tokens);
  dims.compress_stride_tokens = static_cast<int32_t>(config.compress_stride_tokens);
  dims.select_block_tokens = static_cast<int32_t>(config.select_block_tokens);
  dims.num_selected_blocks = static_cast<int32_t>(config.num_selected_blocks);
  dims.num_initial_blocks = static_cast<int32_t>(config.num_initial_blocks);
  dims.num_local_blocks = static_cast<int32_t>(config.num_local_blocks);
  dims.window_tokens = static_cast<int32_t>(config.window_tokens);
  dims.softmax_scale = static_cast<float>(
      config.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(config.head_dim_qk))));
  return dims;
}

std::vector<kernels::Document> MakeDocuments(const ReferenceConfig& config,
                                             const std::vector<int64_t>& cu_seqlens) {
  std::vector<kernels::Document> documents;
  int64_t cmp_block_begin = 0, slc_block_begin = 0;
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    kernels::Document document;
    document.token_begin = cu_seqlens[i];
    document.num_tokens = cu_seqlens[i + 1] - cu_seqlens[i];
    document.cmp_block_begin = cmp_block_begin;
    document.num_cmp_blocks = reference::NumCompressBlocks(config, document.num_tokens);
    document.slc_block_begin = slc_block_begin;
    document.num_slc_blocks =
        (document.num_tokens + config.select_block_tokens - 1) / config.select_block_tokens;
    cmp_block_begin += document.num_cmp_blocks;
    slc_block_begin += document.num_slc_blocks;
    documents.push_back(document);
  }
  return documents;
}

kernels::CompressorWeights EncodedParameters::view() const {
  const auto pointer = [](const Bytes& bytes) -> const void* {
    return bytes.empty() ? nullptr : bytes.data();
  };
  kernels::CompressorWeights weights;
  weights.dtype = dtype;
  weights.num_heads = num_heads;
  weights.hidden_width = hidden_width;
  weights.weight = pointer(weight);
  weights.pe = pointer(pe);
  weights.w = pointer(w);
  weights.w1 = pointer(w1);
  weights.b1 = pointer(b1);
  weights.w2 = pointer(w2);
  weights.b2 = pointer(b2);
  return weights;
}

EncodedInputs Encode(const ReferenceInputs& inputs, const InputOptions& options) {
  EncodedInputs encoded;
  encoded.q = Encode(options.dtype, inputs.q);
  encoded.k_cmp = Encode(options.dtype, inputs.k_cmp);
  encoded.v_cmp = Encode(options.dtype, inputs.v_cmp);
  encoded.k_slc = Encode(options.dtype, inputs.k_slc);
  encoded.v_slc = Encode(options.dtype, inputs.v_slc);
  encoded.k_win = Encode(options.dtype, inputs.k_win);
  encoded.v_win = Encode(options.dtype, inputs.v_win);
  encoded.gate = Encode(options.gate_dtype, inputs.gate);
  encoded.compress_k = EncodeParameters(inputs.compress_k, options.parameter_dtype);
  encoded.compress_v = EncodeParameters(inputs.compress_v, options.parameter_dtype);
  return encoded;
}

std::string Describe(const ReferenceConfig& config) {
  constexpr const char* kNames[] = {"mean", "weighted", "linear", "mlp"};
  return absl::StrCat(
      "num_q_heads ", config.num_q_heads, " num_kv_heads ", config.num_kv_heads, " head_dim_qk ",
      config.head_dim_qk, " head_dim_v ", config.head_dim_v, " compress_block_tokens ",
      config.compress_block_tokens, " compress_stride_tokens ", config.compress_stride_tokens,
      " select_block_tokens ", config.select_block_tokens, " num_selected_blocks ",
      config.num_selected_blocks, " num_initial_blocks ", config.num_initial_blocks,
      " num_local_blocks ", config.num_local_blocks, " window_tokens ", config.window_tokens,
      " softmax_scale ",
      config.softmax_scale.has_value() ? absl::StrCat(*config.softmax_scale) : "default",
      " compressor ", kNames[static_cast<int>(config.compressor)]);
}

}  // namespace nsa::test
