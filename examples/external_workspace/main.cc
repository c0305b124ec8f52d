// The engine from a workspace of one's own: two ranks as threads, and one, give the same bits.

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "comm/loopback/loopback.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/plan/sharding.h"

namespace {

constexpr int64_t kNumTokens = 1000;
constexpr int64_t kNumHeads = 4;
constexpr int64_t kDim = 64;

nsa::NsaConfig MakeConfig() {
  nsa::NsaConfig config;
  config.num_q_heads = kNumHeads;
  config.num_kv_heads = kNumHeads;
  config.head_dim_qk = kDim;
  config.head_dim_v = kDim;
  config.num_selected_blocks = 4;
  return config;
}

// Something that varies from token to token, head to head and dimension to dimension.
float Value(int64_t token, int64_t i, int64_t seed) {
  const uint64_t x = (token * 7919 + i * 104729 + seed * 1299709) * 2654435761u;
  return static_cast<float>(x >> 8 & 0xffff) / 32768.0f - 1.0f;
}

// One rank's part of the forward; its rows of the result go where their tokens are in `o`.
absl::Status RunRank(const nsa::ShardPlan& plan,
                     std::unique_ptr<nsa::comm::Communicator> communicator, std::vector<float>& o) {
  const int rank = communicator->rank();
  absl::StatusOr<std::unique_ptr<nsa::kernels::Kernels>> kernels =
      nsa::kernels::CpuKernels::Create({.num_threads = 1});
  if (!kernels.ok()) return kernels.status();
  nsa::EngineOptions options;
  options.config = MakeConfig();
  options.dtype = nsa::DType::kF32;
  absl::StatusOr<std::unique_ptr<nsa::Engine>> engine =
      nsa::Engine::Create(options, plan, std::move(communicator), *std::move(kernels));
  if (!engine.ok()) return engine.status();

  const int64_t num_tokens = plan.TokensOfRank(rank);
  auto make = [&](int64_t width, int64_t seed, float low) {
    std::vector<float> values(num_tokens * width);
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t i = 0; i < width; ++i) {
        const float value = Value(plan.GlobalToken(rank, t), i, seed);
        values[t * width + i] = value < low ? -value : value;
      }
    }
    return values;
  };
  std::vector<float> q = make(kNumHeads * kDim, 1, -1);
  std::vector<float> k = make(kNumHeads * kDim, 2, -1);
  std::vector<float> v = make(kNumHeads * kDim, 3, -1);
  std::vector<float> gate = make(kNumHeads * 3, 4, 0);
  std::vector<float> own(num_tokens * kNumHeads * kDim);
  auto view = [num_tokens](std::vector<float>& values, int64_t dim) {
    return nsa::Tensor(values.data(), nsa::DType::kF32, {num_tokens, kNumHeads, dim});
  };
  nsa::ForwardInputs inputs;
  inputs.q = view(q, kDim);
  inputs.SetSharedKv(view(k, kDim), view(v, kDim));
  inputs.gate = view(gate, 3);
  nsa::ForwardOutputs outputs;
  outputs.o = view(own, kDim);
  if (absl::Status status = (*engine)->Forward(inputs, outputs); !status.ok()) return status;

  for (int64_t t = 0; t < num_tokens; ++t) {
    std::memcpy(&o[plan.GlobalToken(rank, t) * kNumHeads * kDim], &own[t * kNumHeads * kDim],
                kNumHeads * kDim * sizeof(float));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Run(int num_ranks) {
  absl::StatusOr<nsa::ShardPlan> plan =
      nsa::ShardPlan::Create(kNumTokens, num_ranks, nsa::ZigZagChunks(kNumTokens, num_ranks));
  if (!plan.ok()) return plan.status();
  auto group = nsa::comm::LoopbackGroup::Create(num_ranks);
  if (!group.ok()) return group.status();
  std::vector<float> o(kNumTokens * kNumHeads * kDim);
  std::vector<absl::Status> statuses(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back(
        [&, rank] { statuses[rank] = RunRank(*plan, std::move((*group)[rank]), o); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return o;
}

}  // namespace

int main() {
  std::vector<std::vector<float>> results;
  for (int num_ranks : {1, 2}) {
    absl::StatusOr<std::vector<float>> o = Run(num_ranks);
    if (!o.ok()) {
      std::fprintf(stderr, "main: %s\n", o.status().ToString().c_str());
      return 1;
    }
    std::printf("%d rank%s: o[%d] = %.4f %.4f %.4f ...\n", num_ranks, num_ranks == 1 ? " " : "s",
                static_cast<int>(kNumTokens) - 1, *(o->end() - kDim), *(o->end() - kDim + 1),
                *(o->end() - kDim + 2));
    results.push_back(*std::move(o));
  }
  const bool same =
      std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)) == 0;
  std::printf("the results are %s\n", same ? "the same bit for bit" : "DIFFERENT");
  return same ? 0 : 1;
}
