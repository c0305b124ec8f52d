#include "examples/text/text_tensors.h"

#include <bit>
#include <cmath>

#include "examples/text/vectors.h"

namespace nsa::examples {
namespace {

// With the default scale 1/8: logits of 40 for a match against noise of standard deviation 5.
constexpr float kReaderGain = 5.0f;
constexpr float kFinderGain = 6.0f;

// Rounds to nearest; the demo has neither NaN nor infinity.
uint16_t Bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float FloatOf(uint16_t bf16) { return std::bit_cast<float>(uint32_t{bf16} << 16); }

void Put(const Vector& v, float gain, uint16_t* out) {
  for (int c = 0; c < kDim; ++c) out[c] = Bf16(gain * v[c]);
}

// Every second head of a group is a finder.
bool IsFinder(int head) { return head % 2 == 0; }

}  // namespace

NsaConfig DemoConfig() {
  NsaConfig config;
  config.num_q_heads = 8;
  config.num_kv_heads = 2;
  config.head_dim_qk = kDim;
  config.head_dim_v = kDim;
  return config;
}

std::vector<int64_t> TokensOfRank(const ShardPlan& plan, int rank) {
  std::vector<int64_t> tokens(plan.TokensOfRank(rank));
  for (size_t row = 0; row < tokens.size(); ++row) {
    tokens[row] = plan.GlobalToken(rank, static_cast<int64_t>(row));
  }
  return tokens;
}

TextTensors::TextTensors(const NsaConfig& config, const std::string& text,
                         absl::Span<const int64_t> tokens)
    : config_(config), num_tokens_(static_cast<int64_t>(tokens.size())) {
  const int64_t hq = config.num_q_heads;
  const int64_t hkv = config.num_kv_heads;
  q_.resize(num_tokens_ * hq * kDim);
  k_cmp_.resize(num_tokens_ * hkv * kDim);
  k_slc_.resize(num_tokens_ * hkv * kDim);
  v_.resize(num_tokens_ * hkv * kDim);
  gate_.resize(num_tokens_ * hq * 3);
  for (int64_t row = 0; row < num_tokens_; ++row) {
    const int64_t t = tokens[row];
    const Vector query_bag = BagOf(text, t);
    const Vector query_ngram = NgramOf(text, t);
    for (int64_t h = 0; h < hq; ++h) {
      const bool finder = IsFinder(static_cast<int>(h));
      Put(finder ? query_bag : query_ngram, finder ? kFinderGain : kReaderGain,
          &q_[(row * hq + h) * kDim]);
      // Finders put out what the compressed branch saw, readers what the selected blocks hold.
      float* gate = &gate_[(row * hq + h) * 3];
      gate[0] = finder ? 1.0f : 0.0f;
      gate[1] = finder ? 0.0f : 1.0f;
    }
    // A key stands for what came before its token, the value for the token itself.
    const Vector key_bag = BagOf(text, t - 1);
    const Vector key_ngram = NgramOf(text, t - 1);
    const Vector value = ByteVector(static_cast<unsigned char>(text[t]));
    for (int64_t g = 0; g < hkv; ++g) {
      Put(key_bag, 1.0f, &k_cmp_[(row * hkv + g) * kDim]);
      Put(key_ngram, 1.0f, &k_slc_[(row * hkv + g) * kDim]);
      Put(value, 1.0f, &v_[(row * hkv + g) * kDim]);
    }
  }
}

ForwardInputs TextTensors::inputs() const {
  auto heads = [this](const std::vector<uint16_t>& data, int64_t num_heads) {
    return ConstTensor(data.data(), DType::kBF16, {num_tokens_, num_heads, kDim});
  };
  ForwardInputs inputs;
  inputs.q = heads(q_, config_.num_q_heads);
  inputs.k_cmp = heads(k_cmp_, config_.num_kv_heads);
  inputs.k_slc = inputs.k_win = heads(k_slc_, config_.num_kv_heads);
  inputs.v_cmp = inputs.v_slc = inputs.v_win = heads(v_, config_.num_kv_heads);
  inputs.gate = ConstTensor(gate_.data(), DType::kF32, {num_tokens_, config_.num_q_heads, 3});
  return inputs;
}

char RetrievedByte(const NsaConfig& config, const uint16_t* o, int64_t row) {
  Vector sum = {};
  for (int h = 0; h < config.num_q_heads; ++h) {
    if (IsFinder(h)) continue;
    for (int c = 0; c < kDim; ++c) sum[c] += FloatOf(o[(row * config.num_q_heads + h) * kDim + c]);
  }
  int best = 0;
  float best_score = -INFINITY;
  for (int byte = 0; byte < 256; ++byte) {
    const Vector v = ByteVector(byte);
    float score = 0;
    for (int c = 0; c < kDim; ++c) score += sum[c] * v[c];
    if (score > best_score) {
      best = byte;
      best_score = score;
    }
  }
  return static_cast<char>(best);
}

}  // namespace nsa::examples
