#include "examples/05_training/model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/string_view.h"
#include "examples/05_training/matrix.h"

namespace nsa::training {
namespace {

// Calls f with the rows of the embedding tables that make up a token.
template <typename AnyWeights, typename F>
void ForEachEmbedding(const Token& token, AnyWeights& weights, F f) {
  if (token.key != kNone) f(weights[kKeys] + token.key * kWidth);
  if (token.value != kNone) f(weights[kValues] + token.value * kWidth);
}

// The weights that the attention itself holds, each with its array there.
std::array<std::pair<Array*, Weight>, 4> CompressorArrays(AttentionArrays& a) {
  return {{{&a.weight_k, kWeightK}, {&a.pe_k, kPeK}, {&a.weight_v, kWeightV}, {&a.pe_v, kPeV}}};
}

// Sums of loss and right answers; and the gradient of the mean over a sequence's kNumKeys answers.
std::vector<float> CrossEntropy(const std::vector<Token>& tokens, const std::vector<float>& logits,
                                std::vector<float>* d_logits) {
  std::vector<float> sums(2);
  d_logits->assign(logits.size(), 0);
  for (size_t row = 0; row < tokens.size(); ++row) {
    const int answer = tokens[row].answer;
    if (answer == kNone) continue;
    const float* logit = &logits[row * kNumValues];
    const float* best = std::max_element(logit, logit + kNumValues);
    float sum = 0;
    for (int i = 0; i < kNumValues; ++i) sum += std::exp(logit[i] - *best);
    for (int i = 0; i < kNumValues; ++i) {
      const float probability = std::exp(logit[i] - *best) / sum;
      (*d_logits)[row * kNumValues + i] = (probability - (i == answer ? 1.0f : 0.0f)) / kNumKeys;
    }
    sums[0] += std::log(sum) + *best - logit[answer];
    sums[1] += best == logit + answer ? 1.0f : 0.0f;
  }
  return sums;
}

// Adds in the order of ranks, so that all get the same bits.
absl::Status SumOverRanks(comm::Communicator& communicator, std::vector<float>* values) {
  const auto all = communicator.HostAllGather(absl::string_view(
      reinterpret_cast<const char*>(values->data()), values->size() * sizeof(float)));
  if (!all.ok()) return all.status();
  std::fill(values->begin(), values->end(), 0.0f);
  std::vector<float> theirs(values->size());
  for (const std::string& bytes : *all) {
    std::memcpy(theirs.data(), bytes.data(), bytes.size());
    for (size_t i = 0; i < theirs.size(); ++i) (*values)[i] += theirs[i];
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Model> Model::Create(const ShardPlan& plan, DType dtype,
                                    const tools::RankContext& context) {
  Model model(plan, context);
  auto attention = Attention::Create(ModelConfig(), dtype, plan, context);
  if (!attention.ok()) return attention.status();
  model.attention_ = *std::move(attention);
  return model;
}

absl::StatusOr<Score> Model::Forward(const Weights& weights, const std::vector<Token>& sequence) {
  const int rank = context_.communicator->rank();
  const int64_t rows = plan_.TokensOfRank(rank);
  tokens_.clear();
  x_.assign(rows * kWidth, 0);
  for (int64_t row = 0; row < rows; ++row) {
    tokens_.push_back(sequence[plan_.GlobalToken(rank, row)]);
    ForEachEmbedding(tokens_[row], weights, [&](const float* embedding) {
      for (int64_t i = 0; i < kWidth; ++i) x_[row * kWidth + i] += embedding[i];
    });
  }
  const auto project = [&](const std::vector<float>& x, Weight w) {
    std::vector<float> y(rows * weights.columns(w));
    Multiply(x.data(), weights[w], rows, weights.rows(w), weights.columns(w), y.data());
    return y;
  };
  AttentionArrays& a = attention_->values;
  a.q.host = project(x_, kQ);
  a.k.host = project(x_, kK);
  a.v.host = project(x_, kV);
  a.gate.host = project(x_, kGate);
  for (float& gate : a.gate.host) gate = 1 / (1 + std::exp(-gate));
  for (const auto& [array, w] : CompressorArrays(a)) {
    std::copy_n(weights[w], weights.size(w), array->host.begin());
  }
  if (absl::Status status = attention_->Forward(); !status.ok()) return status;
  y_ = project(a.o.host, kO);
  for (size_t i = 0; i < y_.size(); ++i) y_[i] += x_[i];
  std::vector<float> sums = CrossEntropy(tokens_, project(y_, kHead), &d_logits_);
  absl::Status status = SumOverRanks(*context_.communicator, &sums);
  if (!status.ok()) return status;
  return Score{.loss = sums[0] / kNumKeys, .accuracy = sums[1] / kNumKeys};
}

absl::StatusOr<Weights> Model::Backward(const Weights& weights) {
  const auto rows = static_cast<int64_t>(tokens_.size());
  Weights gradients;
  // Adds to the gradients of x and of the weight.
  const auto project_backward = [&](const std::vector<float>& x, Weight w,
                                    const std::vector<float>& dy, std::vector<float>* dx) {
    MultiplyBackward(x.data(), weights[w], dy.data(), rows, weights.rows(w), weights.columns(w),
                     dx->data(), gradients[w]);
  };
  const AttentionArrays& a = attention_->values;
  AttentionArrays& d = attention_->gradients;
  std::vector<float> dx(x_.size());
  project_backward(y_, kHead, d_logits_, &dx);
  std::fill(d.o.host.begin(), d.o.host.end(), 0.0f);
  project_backward(a.o.host, kO, dx, &d.o.host);
  if (absl::Status status = attention_->Backward(); !status.ok()) return status;
  for (size_t i = 0; i < d.gate.host.size(); ++i) {
    d.gate.host[i] *= a.gate.host[i] * (1 - a.gate.host[i]);
  }
  project_backward(x_, kQ, d.q.host, &dx);
  project_backward(x_, kK, d.k.host, &dx);
  project_backward(x_, kV, d.v.host, &dx);
  project_backward(x_, kGate, d.gate.host, &dx);
  for (const auto& [array, w] : CompressorArrays(d)) {
    std::copy(array->host.begin(), array->host.end(), gradients[w]);
  }
  for (int64_t row = 0; row < rows; ++row) {
    ForEachEmbedding(tokens_[row], gradients, [&](float* embedding) {
      for (int64_t i = 0; i < kWidth; ++i) embedding[i] += dx[row * kWidth + i];
    });
  }
  absl::Status status = SumOverRanks(*context_.communicator, &gradients.all);
  if (!status.ok()) return status;
  return gradients;
}

}  // namespace nsa::training
