// Associative recall: pairs of a key and a value lie scattered in a long filler; at the end of the
// sequence, for each key, its value is asked for.
#ifndef EXAMPLES_05_TRAINING_RECALL_TASK_H_
#define EXAMPLES_05_TRAINING_RECALL_TASK_H_

#include <cstdint>
#include <vector>

namespace nsa::training {

inline constexpr int kNumKeys = 32;
inline constexpr int kNumValues = 16;
inline constexpr int kNone = -1;

// A pair has a key and a value, a question a key alone, filler neither.
struct Token {
  int key = kNone;
  int value = kNone;
  int answer = kNone;  // of a question: the value that its key was paired with
};

// Pairs of every key with some value, in any order and at any places before the questions, of which
// each key has one. `num_tokens`: at least 2 * kNumKeys. The same for the same seed.
std::vector<Token> MakeSequence(int64_t num_tokens, uint64_t seed);

}  // namespace nsa::training

#endif  // EXAMPLES_05_TRAINING_RECALL_TASK_H_
