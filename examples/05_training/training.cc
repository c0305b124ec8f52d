// Trains a model of one sparse attention layer by SGD to recall what was said long ago, with every
// sequence sharded over the ranks.
//
//   training [--ranks 4] [--steps N] [--tokens N] [--sharding S] [--dtype f32|bf16]
//   mpirun -n 4 training [--device cpu|cuda]
#include <cstdlib>
#include <iostream>
#include <string>

#include "absl/flags/flag.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "examples/05_training/model.h"
#include "examples/05_training/recall_task.h"
#include "examples/05_training/weights.h"
#include "tools/launch/flags.h"
#include "tools/launch/launch.h"

ABSL_FLAG(int, steps, 400, "training steps, each on one new sequence");
ABSL_FLAG(int64_t, tokens, 512, "tokens of a sequence");
ABSL_FLAG(double, learning_rate, 0.02, "of SGD at the start; falls linearly to zero");
ABSL_FLAG(double, momentum, 0.9, "of SGD");
ABSL_FLAG(int64_t, seed, 1, "of weights and sequences");
ABSL_FLAG(std::string, sharding, "zigzag", "contiguous, zigzag, or tokens per rank: A,B,...");
ABSL_FLAG(std::string, dtype, "", "of q, k, v and o: f32 or bf16; default: f32 on CPUs");

namespace nsa::training {
namespace {

constexpr int kNumTestSequences = 10;
constexpr double kMostLoss = 0.05;  // of a model that has learned

absl::StatusOr<DType> DTypeOf(const std::string& name, const std::string& device) {
  if (name == "f32" || (name.empty() && device == "cpu")) return DType::kF32;
  if (name == "bf16" || name.empty()) return DType::kBF16;
  return absl::InvalidArgumentError(absl::StrCat("dtype = \"", name, "\": must be f32 or bf16"));
}

absl::Status Train(const tools::RankContext& context) {
  const bool first = context.communicator->rank() == 0;
  const int num_ranks = context.communicator->size();
  const int64_t tokens = absl::GetFlag(FLAGS_tokens);
  if (tokens < 2 * kNumKeys) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokens = ", tokens, ": must be at least ", 2 * kNumKeys));
  }
  auto plan = ShardPlan::Parse(absl::GetFlag(FLAGS_sharding), tokens, num_ranks);
  if (!plan.ok()) return plan.status();
  auto dtype = DTypeOf(absl::GetFlag(FLAGS_dtype), context.device);
  if (!dtype.ok()) return dtype.status();
  auto model = Model::Create(*plan, *dtype, context);
  if (!model.ok()) return model.status();
  if (first) {
    std::cout << absl::StrFormat("%d tokens, %s over %d ranks, each on %s, in %s\n", tokens,
                                 absl::GetFlag(FLAGS_sharding), num_ranks, context.device_name,
                                 NameOf(*dtype));
  }

  // Every rank holds all weights and makes the same steps.
  const auto seed = static_cast<uint64_t>(absl::GetFlag(FLAGS_seed)) << 32;
  const auto learning_rate = static_cast<float>(absl::GetFlag(FLAGS_learning_rate));
  const auto momentum = static_cast<float>(absl::GetFlag(FLAGS_momentum));
  const int steps = absl::GetFlag(FLAGS_steps);
  Weights weights = Weights::Random(seed), velocity;
  for (int step = 0; step < steps; ++step) {
    auto score = model->Forward(weights, MakeSequence(tokens, seed + 1 + step));
    if (!score.ok()) return score.status();
    if (first && (step % 20 == 0)) {
      std::cout << absl::StrFormat("step %4d  loss %8.6f  accuracy %5.1f %%\n", step, score->loss,
                                   100 * score->accuracy)
                << std::flush;
    }
    auto gradients = model->Backward(weights);
    if (!gradients.ok()) return gradients.status();
    const float rate = learning_rate * (1 - static_cast<float>(step) / static_cast<float>(steps));
    for (size_t i = 0; i < weights.all.size(); ++i) {
      velocity.all[i] = momentum * velocity.all[i] + gradients->all[i];
      weights.all[i] -= rate * velocity.all[i];
    }
  }

  Score mean;
  for (int i = 0; i < kNumTestSequences; ++i) {
    auto score = model->Forward(weights, MakeSequence(tokens, seed + 1 + steps + i));
    if (!score.ok()) return score.status();
    mean.loss += score->loss / kNumTestSequences;
    mean.accuracy += score->accuracy / kNumTestSequences;
  }
  if (!first) return absl::OkStatus();
  std::cout << absl::StrFormat("new sequences: loss %8.6f  accuracy %5.1f %% of %d answers\n",
                               mean.loss, 100 * mean.accuracy, kNumTestSequences * kNumKeys);
  if (mean.loss < kMostLoss) return absl::OkStatus();
  return absl::InternalError(absl::StrCat("has not learned to recall: loss of new sequences = ",
                                          mean.loss, ", must be below ", kMostLoss));
}

}  // namespace
}  // namespace nsa::training

int main(int argc, char** argv) {
  absl::Status status = nsa::tools::ParseFlags(
      "Trains a model with a sharded sparse attention layer to recall.", argc, argv);
  auto options = nsa::tools::LaunchOptionsFromFlags();
  status.Update(options.status());
  if (status.ok()) status = nsa::tools::RunRanks(*options, std::getenv, nsa::training::Train);
  if (status.ok()) return 0;
  std::cerr << "training: " << status << "\n";
  return 1;
}
