// A model of one sparse attention layer, sharded over the ranks by tokens:
//
//   x = key embedding + value embedding, of what the token has       [T,E]
//   q, k, v = x Wq, x Wk, x Wv                                       [T,heads*D]
//   gate = sigmoid(x Wgate)                                          [T,Hq*3]
//   logits = (x + NSA(q, k, v, gate) Wo) Whead                       [T,kNumValues]
//   loss = the mean of -log softmax(logits)[answer] over the answers
//
// All but NSA is computed by one thread of the host.
#ifndef EXAMPLES_05_TRAINING_MODEL_H_
#define EXAMPLES_05_TRAINING_MODEL_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "examples/05_training/attention.h"
#include "examples/05_training/recall_task.h"
#include "examples/05_training/weights.h"

namespace nsa::training {

// Of a sequence, over all ranks' tokens.
struct Score {
  double loss = 0;
  double accuracy = 0;  // share of the answers that have the highest logit
};

class Model {
 public:
  // Collective, as all calls.
  static absl::StatusOr<Model> Create(const ShardPlan& plan, DType dtype,
                                      const tools::RankContext& context);
  // All ranks pass the whole sequence; each computes its own tokens.
  absl::StatusOr<Score> Forward(const Weights& weights, const std::vector<Token>& sequence);
  // The gradient of the loss of the last Forward, the same bits on every rank.
  absl::StatusOr<Weights> Backward(const Weights& weights);

 private:
  Model(const ShardPlan& plan, const tools::RankContext& context)
      : plan_(plan), context_(context) {}

  ShardPlan plan_;
  tools::RankContext context_;
  std::unique_ptr<Attention> attention_;
  // What Forward leaves for Backward.
  std::vector<Token> tokens_;    // this rank's
  std::vector<float> x_, y_;     // [T,E] before and after the attention
  std::vector<float> d_logits_;  // [T,kNumValues]
};

}  // namespace nsa::training

#endif  // EXAMPLES_05_TRAINING_MODEL_H_
