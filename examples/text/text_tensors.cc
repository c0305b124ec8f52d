#include "examples/text/text_tensors.h"

#include <array>
#include <bit>
#include <cmath>

namespace nsa::examples {
namespace {

constexpr int kDim = 64;         // of every head
constexpr int kBag = 32;         // n-grams in a finder's bag
constexpr int kFinderBytes = 6;  // length of its n-grams
constexpr int kReaderBytes = 8;
// With the default scale 1/8: logits of 40 for a match against noise of standard deviation 5.
constexpr float kReaderGain = 5.0f;
constexpr float kFinderGain = 6.0f;

using Vector = std::array<float, kDim>;

uint64_t Mix(uint64_t z) {  // SplitMix64
  z += 0x9e3779b97f4a7c15;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// Signs of a 64-bit hash as a vector.
Vector Signs(uint64_t hash) {
  Vector v;
  for (int i = 0; i < kDim; ++i) v[i] = (hash >> i) & 1 ? 1.0f : -1.0f;
  return v;
}

// Of the `length` bytes that end at `end` (included); bytes before the text count as 0.
uint64_t NgramHash(const std::string& text, int64_t end, int length, uint64_t seed) {
  uint64_t hash = Mix(seed);
  for (int64_t i = end - length + 1; i <= end; ++i) {
    hash = Mix(hash ^ (i < 0 ? 0 : static_cast<unsigned char>(text[i])));
  }
  return hash;
}

Vector ByteVector(int byte) { return Signs(Mix(0xb17e0000 + byte)); }

// The finders' vector of the text up to and with `end`.
Vector BagOf(const std::string& text, int64_t end) {
  Vector bag = {};
  for (int64_t i = end - kBag + 1; i <= end; ++i) {
    const Vector one = Signs(NgramHash(text, i, kFinderBytes, 1));
    for (int c = 0; c < kDim; ++c) bag[c] += one[c];
  }
  // As long as a vector of signs, also where the text repeats itself (a line of dashes).
  float square = 0;
  for (float x : bag) square += x * x;
  for (float& x : bag) x *= std::sqrt(kDim / square);
  return bag;
}

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
    const Vector query_ngram = Signs(NgramHash(text, t, kReaderBytes, 2));
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
    const Vector key_ngram = Signs(NgramHash(text, t - 1, kReaderBytes, 2));
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
