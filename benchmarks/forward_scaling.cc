// Whether time grows as the arithmetic does: the forward at 16k, 32k and 64k tokens on this host,
// beside the FLOPs that nsa_plan counts. Exit code 1 when the growth of the time from 16k differs
// from the growth of the FLOPs by more than 25 %.
//
// The demo's shape: 8 query heads, 2 kv heads of 64, bf16, one rank on all cores; best of 3.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <random>
#include <vector>

#include "absl/time/clock.h"
#include "comm/loopback/loopback.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/engine.h"

namespace {

constexpr int kRepetitions = 3;
constexpr double kTolerance = 0.25;

struct Measured {
  double seconds;
  double cpu_seconds;  // of all threads
  double flops;
};

double ProcessorSeconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

absl::StatusOr<Measured> Measure(int64_t num_tokens) {
  nsa::NsaConfig config;
  config.num_q_heads = 8;
  config.num_kv_heads = 2;
  config.head_dim_qk = config.head_dim_v = 64;
  auto group = nsa::comm::LoopbackGroup::Create(1);
  if (!group.ok()) return group.status();
  auto kernels = nsa::kernels::CpuKernels::Create({});
  if (!kernels.ok()) return kernels.status();
  auto plan = nsa::ShardPlan::Parse("contiguous", num_tokens, 1);
  if (!plan.ok()) return plan.status();
  auto engine = nsa::Engine::Create({.config = config, .dtype = nsa::DType::kBF16},
                                    *std::move(plan), std::move((*group)[0]), *std::move(kernels));
  if (!engine.ok()) return engine.status();

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  auto tensor = [&](std::vector<uint16_t>& data, int64_t heads) {
    data.resize(num_tokens * heads * 64);
    for (uint16_t& x : data) {
      const float value = normal(random);
      x = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
    }
    return nsa::Tensor(data.data(), nsa::DType::kBF16, {num_tokens, heads, 64});
  };
  std::vector<uint16_t> q, k, v;
  std::vector<uint16_t> o(num_tokens * 8 * 64);
  std::vector<float> gate(num_tokens * 8 * 3, 0.5f);
  nsa::ForwardInputs inputs;
  inputs.q = tensor(q, 8);
  inputs.SetSharedKv(tensor(k, 2), tensor(v, 2));
  inputs.gate = nsa::ConstTensor(gate.data(), nsa::DType::kF32, {num_tokens, 8, 3});
  nsa::ForwardOutputs outputs;
  outputs.o = nsa::Tensor(o.data(), nsa::DType::kBF16, {num_tokens, 8, 64});

  Measured best = {.seconds = INFINITY, .cpu_seconds = INFINITY, .flops = 0};
  for (int i = 0; i < kRepetitions; ++i) {
    const absl::Time begin = absl::Now();
    const double cpu_begin = ProcessorSeconds();
    absl::Status status = (*engine)->Forward(inputs, outputs);
    if (!status.ok()) return status;
    best.seconds = std::min(best.seconds, absl::ToDoubleSeconds(absl::Now() - begin));
    best.cpu_seconds = std::min(best.cpu_seconds, ProcessorSeconds() - cpu_begin);
  }
  best.flops = (*engine)->last_stats().flops();
  return best;
}

}  // namespace

int main() {
  std::printf("%8s %10s %10s %10s %10s %12s %12s %8s\n", "tokens", "seconds", "cpu s", "GFLOP",
              "GFLOP/s", "cpu time x", "FLOPs x", "ratio");
  Measured first = {};
  bool grows_as_it_should = true;
  for (int64_t tokens : {16384, 32768, 65536}) {
    const absl::StatusOr<Measured> measured = Measure(tokens);
    if (!measured.ok()) {
      std::fprintf(stderr, "forward_scaling: %s\n", measured.status().ToString().c_str());
      return 1;
    }
    if (first.flops == 0) first = *measured;
    const double time_growth = measured->cpu_seconds / first.cpu_seconds;
    const double flop_growth = measured->flops / first.flops;
    std::printf("%8ld %10.3f %10.3f %10.1f %10.1f %12.2f %12.2f %8.2f\n", static_cast<long>(tokens),
                measured->seconds, measured->cpu_seconds, measured->flops * 1e-9,
                measured->flops * 1e-9 / measured->seconds, time_growth, flop_growth,
                time_growth / flop_growth);
    grows_as_it_should &= std::abs(time_growth / flop_growth - 1) <= kTolerance;
  }
  if (!grows_as_it_should) std::printf("time does not grow as the FLOPs do, within 25 %%\n");
  return grows_as_it_should ? 0 : 1;
}
