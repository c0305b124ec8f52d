#include "examples/05_training/weights.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "examples/05_training/recall_task.h"

namespace nsa::training {

NsaConfig ModelConfig() {
  NsaConfig config;
  config.num_q_heads = 2;
  config.num_kv_heads = 1;
  config.head_dim_qk = config.head_dim_v = 64;
  config.compress_block_tokens = config.compress_stride_tokens = config.select_block_tokens = 16;
  config.num_selected_blocks = 8;
  config.num_initial_blocks = 0;
  config.num_local_blocks = 1;
  config.window_tokens = 32;
  config.compressor = Compressor::kWeighted;
  return config;
}

Weights::Weights() {
  const NsaConfig config = ModelConfig();
  const int64_t q = config.num_q_heads, kv = config.num_kv_heads, d = config.head_dim_qk;
  const int64_t l = config.compress_block_tokens, e = kWidth;
  shapes_[kKeys] = {kNumKeys, e};
  shapes_[kValues] = {kNumValues, e};
  shapes_[kQ] = {e, q * d};
  shapes_[kK] = shapes_[kV] = {e, kv * d};
  shapes_[kGate] = {e, q * 3};
  shapes_[kO] = {q * d, e};
  shapes_[kHead] = {e, kNumValues};
  shapes_[kWeightK] = shapes_[kWeightV] = {1, l};
  shapes_[kPeK] = shapes_[kPeV] = {l, d};
  int64_t total = 0;
  for (int w = 0; w < kNumWeights; ++w) {
    offsets_[w] = total;
    total += size(static_cast<Weight>(w));
  }
  all.resize(total);
}

Weights Weights::Random(uint64_t seed) {
  Weights weights;
  std::mt19937_64 generator(seed);
  for (Weight w : {kKeys, kValues, kK, kV, kGate, kO}) {
    // Variance 1 for embeddings, 1 / inputs for projections. The head starts at zero.
    const float inputs = w <= kValues ? 1.0f : static_cast<float>(weights.rows(w));
    for (int64_t i = 0; i < weights.size(w); ++i) {
      const float uniform = static_cast<float>(generator() >> 40) * 0x1p-23f - 1;
      weights[w][i] = std::sqrt(3 / inputs) * uniform;
    }
  }
  const NsaConfig config = ModelConfig();
  const int64_t dim = config.head_dim_qk, group = config.num_q_heads / config.num_kv_heads;
  for (int64_t row = 0; row < kWidth; ++row) {
    for (int64_t head = 0; head < config.num_q_heads; ++head) {
      std::copy_n(weights[kK] + (row * config.num_kv_heads + head / group) * dim, dim,
                  weights[kQ] + (row * config.num_q_heads + head) * dim);
    }
  }
  for (Weight w : {kWeightK, kWeightV}) {  // the mean
    std::fill_n(weights[w], weights.size(w), 1.0f / static_cast<float>(weights.size(w)));
  }
  return weights;
}

}  // namespace nsa::training
