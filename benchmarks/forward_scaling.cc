// Whether time grows as the arithmetic does: the forward at 16k, 32k and 64k tokens on this host,
// beside the FLOPs that nsa_plan counts. Exit code 1 when the growth of the time from 16k differs
// from the growth of the FLOPs by more than 25 %.
//
// The demo's shape: 8 query heads, 2 kv heads of 64, bf16, one rank on all cores. Best of at least
// 2 rounds over the three sizes, and of up to 6 while the figures of a busy host disagree.
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

constexpr int kMinRounds = 2;
constexpr int kMaxRounds = 6;
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

  Measured measured;
  const absl::Time begin = absl::Now();
  const double cpu_begin = ProcessorSeconds();
  absl::Status status = (*engine)->Forward(inputs, outputs);
  if (!status.ok()) return status;
  measured.seconds = absl::ToDoubleSeconds(absl::Now() - begin);
  measured.cpu_seconds = ProcessorSeconds() - cpu_begin;
  measured.flops = (*engine)->LastStats()->flops();
  return measured;
}

constexpr int64_t kTokens[] = {16384, 32768, 65536};
constexpr int kSizes = 3;

// How the processor time has grown since the first size, against the FLOPs.
double GrowthRatio(const Measured& first, const Measured& measured) {
  return (measured.cpu_seconds / first.cpu_seconds) / (measured.flops / first.flops);
}

bool GrowsAsItShould(const Measured (&best)[kSizes]) {
  for (const Measured& measured : best) {
    if (std::abs(GrowthRatio(best[0], measured) - 1) > kTolerance) return false;
  }
  return true;
}

}  // namespace

int main() {
  Measured best[kSizes];
  for (Measured& measured : best) measured = {INFINITY, INFINITY, 0};
  for (int round = 0; round < kMaxRounds; ++round) {
    if (round >= kMinRounds && GrowsAsItShould(best)) break;
    for (int i = 0; i < kSizes; ++i) {
      const absl::StatusOr<Measured> measured = Measure(kTokens[i]);
      if (!measured.ok()) {
        std::fprintf(stderr, "forward_scaling: %s\n", measured.status().ToString().c_str());
        return 1;
      }
      best[i] = {std::min(best[i].seconds, measured->seconds),
                 std::min(best[i].cpu_seconds, measured->cpu_seconds), measured->flops};
    }
  }
  std::printf("%8s %10s %10s %10s %10s %12s %12s %8s\n", "tokens", "seconds", "cpu s", "GFLOP",
              "GFLOP/s", "cpu time x", "FLOPs x", "ratio");
  for (int i = 0; i < kSizes; ++i) {
    std::printf("%8ld %10.3f %10.3f %10.1f %10.1f %12.2f %12.2f %8.2f\n",
                static_cast<long>(kTokens[i]), best[i].seconds, best[i].cpu_seconds,
                best[i].flops * 1e-9, best[i].flops * 1e-9 / best[i].seconds,
                best[i].cpu_seconds / best[0].cpu_seconds, best[i].flops / best[0].flops,
                GrowthRatio(best[0], best[i]));
  }
  if (GrowsAsItShould(best)) return 0;
  std::printf("time does not grow as the FLOPs do, within 25 %%\n");
  return 1;
}
