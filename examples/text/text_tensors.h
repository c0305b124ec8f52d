// Text as q, k, v such that attention retrieves what followed the same words before: a hand-made
// induction head, so that a reader sees what a trained layer would do, without any training.
//
// Every n-gram of bytes has a random vector of signs. Heads come in two kinds:
//   - finders compare bags of the last 32 n-grams, through the compressed branch: their importance
//     makes the blocks that continue the same phrase be selected;
//   - readers compare the one last n-gram, token by token, inside the selected blocks, and return
//     the byte that followed it.
#ifndef EXAMPLES_TEXT_TEXT_TENSORS_H_
#define EXAMPLES_TEXT_TEXT_TENSORS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/plan/sharding.h"

namespace nsa::examples {

// 8 query heads, 2 key/value heads of 64, the other fields as in NSA's paper.
NsaConfig DemoConfig();

// A rank's tokens under a plan, as places in the text.
std::vector<int64_t> TokensOfRank(const ShardPlan& plan, int rank);

// Tensors of some tokens of a text in bf16, dense, and views of them.
class TextTensors {
 public:
  TextTensors(const NsaConfig& config, const std::string& text, absl::Span<const int64_t> tokens);
  ForwardInputs inputs() const;

 private:
  NsaConfig config_;
  int64_t num_tokens_;
  std::vector<uint16_t> q_, k_cmp_, k_slc_, v_;
  std::vector<float> gate_;
};

// The byte that row `row` of o [T,Hq,Dv] bf16 retrieved: that of the nearest byte vector, by the
// sum over the readers.
char RetrievedByte(const NsaConfig& config, const uint16_t* o, int64_t row);

}  // namespace nsa::examples

#endif  // EXAMPLES_TEXT_TEXT_TENSORS_H_
