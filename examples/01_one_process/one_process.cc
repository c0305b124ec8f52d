// One process, one rank, one forward: the smallest whole program around the engine.
//
// With more ranks only step 2 (which tokens are this rank's) and step 3 (a communicator of a larger
// group) change; the result stays the same, bit for bit.

#include <cstdint>
#include <cstdio>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/loopback/loopback.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/plan/sharding.h"
#include "nsa/stats.h"

namespace {

constexpr int64_t kNumTokens = 2048;

// A dense tensor of f32 with memory of its own.
struct Activations {
  std::vector<int64_t> shape;
  std::vector<float> values;

  explicit Activations(std::vector<int64_t> shape)
      : shape(std::move(shape)),
        values(std::accumulate(this->shape.begin(), this->shape.end(), int64_t{1},
                               std::multiplies<>())) {}

  // What the engine takes: a view, which holds no memory.
  nsa::Tensor view() {
    return nsa::Tensor(values.data(), nsa::DType::kF32, nsa::Dims(shape.begin(), shape.end()));
  }
};

Activations Random(std::vector<int64_t> shape, float low, float high, std::mt19937& generator) {
  Activations tensor(std::move(shape));
  for (float& value : tensor.values) {
    value = low + (high - low) * static_cast<float>(generator() * 0x1p-32);
  }
  return tensor;
}

absl::Status Run() {
  // 1. The layer: sizes and rules of the attention. What is not set keeps the paper's value.
  nsa::NsaConfig config;
  config.num_q_heads = 8;
  config.num_kv_heads = 2;
  config.head_dim_qk = 64;
  config.head_dim_v = 64;
  config.num_selected_blocks = 8;
  config.window_tokens = 128;
  std::printf("Config\n");
  for (const auto& [name, value] : nsa::Fields(config)) {
    std::printf("  %-22s  %s\n", name.c_str(), value.c_str());
  }

  // 2. The shard plan: which rank holds which tokens of the sequence. Here rank 0 holds them all.
  absl::StatusOr<nsa::ShardPlan> plan =
      nsa::ShardPlan::Create(kNumTokens, /*num_ranks=*/1, nsa::ContiguousChunks(kNumTokens, 1));
  if (!plan.ok()) return plan.status();

  // 3. What moves bytes between ranks, and what computes on a rank.
  absl::StatusOr<std::vector<std::unique_ptr<nsa::comm::Communicator>>> group =
      nsa::comm::LoopbackGroup::Create(/*size=*/1);
  if (!group.ok()) return group.status();
  absl::StatusOr<std::unique_ptr<nsa::kernels::Kernels>> kernels =
      nsa::kernels::CpuKernels::Create();
  if (!kernels.ok()) return kernels.status();

  // 4. The engine checks all of this and takes its memory.
  nsa::EngineOptions options;
  options.config = config;
  options.dtype = nsa::DType::kF32;
  absl::StatusOr<std::unique_ptr<nsa::Engine>> engine =
      nsa::Engine::Create(options, *std::move(plan), std::move((*group)[0]), *std::move(kernels));
  if (!engine.ok()) return engine.status();

  // 5. Tensors of this rank's tokens. The three branches may have keys and values of their own, as
  //    in the paper; here they share one pair. The mean compressor has no parameters.
  const int64_t num_q_heads = config.num_q_heads;
  const int64_t num_kv_heads = config.num_kv_heads;
  std::mt19937 generator(/*seed=*/1);
  Activations q = Random({kNumTokens, num_q_heads, config.head_dim_qk}, -2, 2, generator);
  Activations k = Random({kNumTokens, num_kv_heads, config.head_dim_qk}, -2, 2, generator);
  Activations v = Random({kNumTokens, num_kv_heads, config.head_dim_v}, -2, 2, generator);
  Activations gate = Random({kNumTokens, num_q_heads, 3}, 0, 1, generator);
  Activations o({kNumTokens, num_q_heads, config.head_dim_v});
  std::vector<int32_t> block_indices(kNumTokens * num_kv_heads * config.num_selected_blocks);

  nsa::ForwardInputs inputs;
  inputs.q = q.view();
  inputs.SetSharedKv(k.view(), v.view());
  inputs.gate = gate.view();
  nsa::ForwardOutputs outputs;
  outputs.o = o.view();
  outputs.block_indices = block_indices.data();  // optional, as all outputs but o

  // 6. The forward. Any number of them may follow, on the same memory.
  absl::Status status = (*engine)->Forward(inputs, outputs);
  if (!status.ok()) return status;

  double sum = 0;
  double sum_of_squares = 0;
  for (float value : o.values) {
    sum += value;
    sum_of_squares += double{value} * value;
  }
  std::printf("\nOutput  [%d, %d, %d], sum %.2f, sum of squares %.2f\n",
              static_cast<int>(kNumTokens), config.num_q_heads, config.head_dim_v, sum,
              sum_of_squares);

  std::printf("\nBlocks of %d tokens that the last query selected, of %d\n",
              config.select_block_tokens,
              static_cast<int>(nsa::NumSelectBlocks(config, kNumTokens)));
  const int32_t* next =
      &block_indices[(kNumTokens - 1) * num_kv_heads * config.num_selected_blocks];
  for (int head = 0; head < config.num_kv_heads; ++head) {
    std::printf("  kv head %d:", head);
    for (int i = 0; i < config.num_selected_blocks; ++i) std::printf(" %d", *next++);
    std::printf("\n");
  }

  // 7. What the ranks moved, kept and took.
  absl::StatusOr<nsa::ForwardStats> stats = (*engine)->GatherStats();
  if (!stats.ok()) return stats.status();
  std::printf("\n%s", nsa::FormatTable(*stats).c_str());
  return absl::OkStatus();
}

}  // namespace

int main() {
  const absl::Status status = Run();
  if (status.ok()) return 0;
  std::fprintf(stderr, "one_process: %s\n", status.ToString().c_str());
  return 1;
}
