// The learned weights of the model, or their gradients, or their velocities: f32, one after another
// in one vector, so that the optimizer and the sum over ranks need not tell them apart.
#ifndef EXAMPLES_05_TRAINING_WEIGHTS_H_
#define EXAMPLES_05_TRAINING_WEIGHTS_H_

#include <array>
#include <cstdint>
#include <vector>

#include "nsa/config.h"

namespace nsa::training {

NsaConfig ModelConfig();

inline constexpr int64_t kWidth = 64;  // E, of an embedding

enum Weight {
  kKeys,     // [kNumKeys,E] embeddings
  kValues,   // [kNumValues,E] embeddings
  kQ,        // [E,Hq*D]
  kK,        // [E,Hkv*D]
  kV,        // [E,Hkv*D]
  kGate,     // [E,Hq*3]
  kO,        // [Hq*D,E]
  kHead,     // [E,kNumValues]
  kWeightK,  // [1,l] of the compressor of k, and
  kPeK,      // [l,D]
  kWeightV,  // [1,l] of the compressor of v, and
  kPeV,      // [l,D]
  kNumWeights
};

class Weights {
 public:
  Weights();  // all zero
  // The same for the same seed. Each query head starts with its kv head's projection, so that equal
  // keys attract each other from the first step on.
  static Weights Random(uint64_t seed);

  float* operator[](Weight w) { return &all[offsets_[w]]; }
  const float* operator[](Weight w) const { return &all[offsets_[w]]; }
  int64_t rows(Weight w) const { return shapes_[w][0]; }
  int64_t columns(Weight w) const { return shapes_[w][1]; }
  int64_t size(Weight w) const { return rows(w) * columns(w); }

  std::vector<float> all;

 private:
  std::array<std::array<int64_t, 2>, kNumWeights> shapes_;
  std::array<int64_t, kNumWeights> offsets_;
};

}  // namespace nsa::training

#endif  // EXAMPLES_05_TRAINING_WEIGHTS_H_
