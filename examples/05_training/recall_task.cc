#include "examples/05_training/recall_task.h"

#include <array>
#include <numeric>
#include <random>
#include <utility>

namespace nsa::training {

std::vector<Token> MakeSequence(int64_t num_tokens, uint64_t seed) {
  std::mt19937_64 generator(seed);
  // std::shuffle and the standard's distributions differ between libraries.
  const auto shuffle = [&generator](auto& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[generator() % i]);
  };
  std::array<int, kNumKeys> keys;
  std::iota(keys.begin(), keys.end(), 0);
  std::vector<int64_t> places(num_tokens - kNumKeys);
  std::iota(places.begin(), places.end(), int64_t{0});
  shuffle(places);
  std::array<int, kNumKeys> values;
  for (int& value : values) value = static_cast<int>(generator() % kNumValues);

  std::vector<Token> tokens(num_tokens);
  for (int key : keys) tokens[places[key]] = {.key = key, .value = values[key]};
  shuffle(keys);
  for (int i = 0; i < kNumKeys; ++i) {
    tokens[num_tokens - kNumKeys + i] = {.key = keys[i], .answer = values[keys[i]]};
  }
  return tokens;
}

}  // namespace nsa::training
