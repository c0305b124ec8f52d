// The whole forward, backward or both on GPUs: time, exposed communication, memory, and whether
// ranks and GPU agree with one rank and with the CPU.
//
//   passes_cuda --tokens 8192,65536                        one GPU, forward
//   passes_cuda --tokens 8192,65536 --pass backward        after one forward that is not timed
//   mpirun -n 4 passes_cuda --tokens 65536 --pass step     forward and backward, one GPU a rank
//   passes_cuda --tokens 4096 --check                      o against the CPU kernels', relative L2
//
// Prints one line of JSON for each length; README.md says what its fields mean.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "benchmarks/caller_tensors.h"
#include "benchmarks/gpu_rank.h"
#include "benchmarks/gpu_timer.h"
#include "benchmarks/in_place_communicator.h"
#include "benchmarks/result_lines.h"
#include "comm/loopback/loopback.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/cuda_kernels.h"
#include "nsa/engine.h"

ABSL_FLAG(std::vector<std::string>, tokens, {"8192"}, "tokens of the global sequence, ascending");
ABSL_FLAG(std::string, pass, "forward", "forward, backward, or step: both");
ABSL_FLAG(std::string, sharding, "zigzag", "see ShardPlan::Parse");
ABSL_FLAG(int, reps, 10, "timed calls, after 3 that are not timed; at least 1");
ABSL_FLAG(int64_t, fetch_budget_mib, 1024, "EngineOptions::fetch_budget_bytes");
ABSL_FLAG(bool, agree, false, "EngineOptions::agree_in_every_call");
ABSL_FLAG(bool, check, false, "compare o with the CPU kernels' on one rank");

namespace nsa::benchmarks {
namespace {

constexpr int kWarmUps = 3;
constexpr int kStageCalls = 5;

// Milliseconds by stage, in the order of the stages.
using StageTimes = std::vector<std::pair<std::string, double>>;

// The entry of `stage`, made if need be.
template <typename T>
T& At(std::vector<std::pair<std::string, T>>& by_stage, absl::string_view stage) {
  for (auto& [name, value] : by_stage) {
    if (name == stage) return value;
  }
  return by_stage.emplace_back(stage, T()).second;
}

float FromBf16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// What all measurements of a process share.
struct Bench {
  GpuRank gpu;
  std::shared_ptr<InPlaceCommunicator> communicator;
  std::shared_ptr<kernels::Kernels> kernels;
  std::unique_ptr<GpuTimer> timer;
};

// Memory in use on this rank's GPU but for what flushes the L2: the caller's tensors, the engine,
// NCCL and the CUDA context.
absl::StatusOr<int64_t> UsedMib() {
  size_t free_bytes = 0, total_bytes = 0;
  NSA_BENCHMARK_OK(CudaStatus(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo"));
  return (static_cast<int64_t>(total_bytes - free_bytes) - GpuTimer::kFlushBytes) >> 20;
}

// This rank's milliseconds of `work`, which all ranks begin together.
absl::StatusOr<double> TimeTogether(Bench& bench, absl::FunctionRef<absl::Status()> work) {
  const auto meet = [&] {
    NSA_BENCHMARK_OK(CudaStatus(cudaStreamSynchronize(bench.timer->stream()), "flush"));
    return bench.communicator->Barrier();
  };
  return bench.timer->Time(meet, work);
}

bool Trains() { return absl::GetFlag(FLAGS_pass) != "forward"; }

// An engine, and the pass that is measured.
class Pass {
 public:
  static absl::StatusOr<Pass> Create(Bench& bench, const EngineOptions& options,
                                     const ShardPlan& plan, const CallerTensors& tensors) {
    auto engine = Engine::Create(options, plan, bench.communicator, bench.kernels);
    if (!engine.ok()) return engine.status();
    Pass pass(bench, tensors, *std::move(engine));
    if (!Trains()) return pass;
    auto saved = pass.engine_->CreateSavedForward();
    if (!saved.ok()) return saved.status();
    pass.saved_ = *std::move(saved);
    NSA_BENCHMARK_OK(pass.Forward());
    return pass;
  }

  Engine& engine() { return *engine_; }

  // This rank's milliseconds.
  absl::StatusOr<double> TimeMine() {
    return TimeTogether(bench_, [&] {
      if (absl::GetFlag(FLAGS_pass) != "backward") NSA_BENCHMARK_OK(Forward());
      return Trains() ? engine_->Backward(tensors_.inputs(), tensors_.d_o(), *saved_,
                                          tensors_.gradients(), bench_.timer->stream())
                      : absl::OkStatus();
    });
  }
  // The slowest rank's.
  absl::StatusOr<double> Time() {
    auto mine = TimeMine();
    return mine.ok() ? LargestOfRanks(*bench_.communicator, *mine) : mine.status();
  }

 private:
  Pass(Bench& bench, const CallerTensors& tensors, std::unique_ptr<Engine> engine)
      : bench_(bench), tensors_(tensors), engine_(std::move(engine)) {}

  absl::Status Forward() {
    return engine_->Forward(tensors_.inputs(), tensors_.outputs(), bench_.timer->stream(),
                            saved_.get());
  }

  Bench& bench_;
  const CallerTensors& tensors_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<SavedForward> saved_;  // destroyed before the engine
};

// Milliseconds by stage: the median of kStageCalls calls, averaged over the ranks.
absl::StatusOr<Json> TimeStages(Bench& bench, const EngineOptions& options, const ShardPlan& plan,
                                const CallerTensors& tensors) {
  EngineOptions timed = options;
  timed.time_stages = true;
  auto pass = Pass::Create(bench, timed, plan, tensors);
  if (!pass.ok()) return pass.status();
  std::vector<std::pair<std::string, std::vector<double>>> times;
  for (int i = -1; i < kStageCalls; ++i) {
    if (auto total = pass->TimeMine(); !total.ok()) return total.status();
    auto stats = pass->engine().LastStats();
    if (!stats.ok()) return stats.status();
    StageTimes call;
    for (const StageSpan& span : stats->stages()) {
      At(call, span.stage()) += (span.end_seconds() - span.begin_seconds()) * 1e3;
    }
    for (const auto& [stage, ms] : call) {
      if (i >= 0) At(times, stage).push_back(ms);
    }
  }
  Json mine;
  for (const auto& [stage, values] : times) mine[stage] = SpreadOf(values).median;
  auto all = bench.communicator->HostAllGather(mine.dump());
  if (!all.ok()) return all.status();
  StageTimes mean;
  for (const std::string& one : *all) {
    const Json theirs = Json::parse(one);
    for (const auto& [stage, ms] : theirs.items()) {
      At(mean, stage) += ms.get<double>() / static_cast<double>(all->size());
    }
  }
  Json rounded;
  for (const auto& [stage, ms] : mean) rounded[stage] = Rounded(ms);
  return rounded;
}

// o of the whole sequence by the CPU kernels.
absl::StatusOr<std::vector<uint16_t>> OnCpu(Bench& bench, const NsaConfig& config, int64_t tokens) {
  auto group = comm::LoopbackGroup::Create(1);
  if (!group.ok()) return group.status();
  auto cpu = kernels::CpuKernels::Create({});
  if (!cpu.ok()) return cpu.status();
  const ShardPlan plan = *ShardPlan::Parse("contiguous", tokens, 1);
  auto on_device = CallerTensors::Allocate(*bench.kernels, config, plan, 0);
  if (!on_device.ok()) return on_device.status();
  NSA_BENCHMARK_OK(on_device->Fill(bench.timer->stream()));
  auto tensors = CallerTensors::Allocate(**cpu, config, plan, 0);
  if (!tensors.ok()) return tensors.status();
  NSA_BENCHMARK_OK(tensors->CopyInputs(*on_device));
  auto engine = Engine::Create({.config = config}, plan, std::move((*group)[0]), *std::move(cpu));
  if (!engine.ok()) return engine.status();
  NSA_BENCHMARK_OK((*engine)->Forward(tensors->inputs(), tensors->outputs()));
  return tensors->OutputOnHost();
}

absl::StatusOr<double> RelativeL2AgainstCpu(Bench& bench, const NsaConfig& config,
                                            const ShardPlan& plan, const CallerTensors& tensors) {
  auto whole = OnCpu(bench, config, plan.num_tokens());
  if (!whole.ok()) return whole.status();
  auto mine = tensors.OutputOnHost();
  if (!mine.ok()) return mine.status();
  const int rank = bench.communicator->rank();
  const int64_t row = int64_t{config.num_q_heads} * config.head_dim_v;
  double difference = 0, norm = 0;
  for (int64_t t = 0; t < plan.TokensOfRank(rank); ++t) {
    const int64_t first = plan.GlobalToken(rank, t) * row;
    for (int64_t i = 0; i < row; ++i) {
      const double expected = FromBf16((*whole)[first + i]);
      const double d = FromBf16((*mine)[t * row + i]) - expected;
      difference += d * d;
      norm += expected * expected;
    }
  }
  return LargestOfRanks(*bench.communicator, std::sqrt(difference / norm));
}

absl::StatusOr<std::string> FingerprintOfAll(Bench& bench, const CallerTensors& tensors) {
  auto mine = tensors.Fingerprint(*bench.kernels, bench.timer->stream());
  if (!mine.ok()) return mine.status();
  auto all = bench.communicator->HostAllGather(absl::StrCat(*mine));
  if (!all.ok()) return all.status();
  uint64_t sum = 0;
  for (const std::string& one : *all) sum += std::strtoull(one.c_str(), nullptr, 10);
  return absl::StrFormat("%016x", sum);
}

Json Milliseconds(const Spread& spread) {
  return {{"median_ms", Rounded(spread.median)},
          {"min_ms", Rounded(spread.min)},
          {"max_ms", Rounded(spread.max)}};
}

// The step, and in turns with it the step with remote data in place, into `line`. The last call is
// one that moves data.
absl::Status MeasureStep(Bench& bench, Pass& pass, const CallerTensors& tensors, Json& line) {
  const bool several = bench.communicator->size() > 1;
  std::vector<double> step, in_place;
  for (int i = -kWarmUps; i < absl::GetFlag(FLAGS_reps); ++i) {
    auto ms = pass.Time();
    if (!ms.ok()) return ms.status();
    if (i >= 0) step.push_back(*ms);
    if (!several) continue;
    bench.communicator->set_data_in_place(true);
    ms = pass.Time();
    bench.communicator->set_data_in_place(false);
    if (!ms.ok()) return ms.status();
    if (i >= 0) in_place.push_back(*ms);
  }
  line.update(Milliseconds(SpreadOf(step)));
  line["reps"] = step.size();

  // Nothing was freed since the first call.
  auto used_mib = UsedMib();
  if (!used_mib.ok()) return used_mib.status();
  auto peak_mib = LargestOfRanks(*bench.communicator, static_cast<double>(*used_mib));
  if (!peak_mib.ok()) return peak_mib.status();
  line["peak_memory_mib"] = *peak_mib;

  auto fingerprint = FingerprintOfAll(bench, tensors);
  if (!fingerprint.ok()) return fingerprint.status();
  if (several) {
    const std::string of_in_place = *fingerprint;
    NSA_BENCHMARK_OK(pass.Time().status());
    fingerprint = FingerprintOfAll(bench, tensors);
    if (!fingerprint.ok()) return fingerprint.status();
    line["in_place"] = Milliseconds(SpreadOf(in_place));
    line["in_place"]["same_bits"] = of_in_place == *fingerprint;
    line["exposed_communication"] = Rounded(SpreadOf(step).median / SpreadOf(in_place).median - 1);
  }
  line["fingerprint"] = *fingerprint;
  return absl::OkStatus();
}

absl::Status MeasureLength(Bench& bench, const Json& heading, int64_t tokens) {
  EngineOptions options = {.config = ConfigOfFlags()};
  options.agree_in_every_call = absl::GetFlag(FLAGS_agree);
  options.fetch_budget_bytes = absl::GetFlag(FLAGS_fetch_budget_mib) << 20;
  auto plan = ShardPlan::Parse(absl::GetFlag(FLAGS_sharding), tokens, bench.communicator->size());
  if (!plan.ok()) return plan.status();
  options.has_backward = Trains();
  auto tensors = CallerTensors::Allocate(*bench.kernels, options.config, *plan,
                                         bench.communicator->rank(), Trains());
  if (!tensors.ok()) return tensors.status();
  NSA_BENCHMARK_OK(tensors->Fill(bench.timer->stream()));
  Json line = heading;
  line["tokens"] = tokens;
  line["agree_in_every_call"] = options.agree_in_every_call;
  line["fetch_budget_mib"] = options.fetch_budget_bytes >> 20;
  {
    auto pass = Pass::Create(bench, options, *plan, *tensors);
    if (!pass.ok()) return pass.status();
    NSA_BENCHMARK_OK(MeasureStep(bench, *pass, *tensors, line));
    if (absl::GetFlag(FLAGS_check)) {
      auto error = RelativeL2AgainstCpu(bench, options.config, *plan, *tensors);
      if (!error.ok()) return error.status();
      line["relative_l2_against_cpu"] = *error;
    }
    auto stats = pass->engine().GatherStats();
    if (!stats.ok()) return stats.status();
    double flops = 0;
    int64_t fetched_bytes = 0, saved_bytes = 0;
    for (const RankStats& rank : stats->ranks()) {
      flops += rank.flops();
      fetched_bytes = std::max(fetched_bytes, rank.block_bytes_received());
      saved_bytes = std::max(saved_bytes, rank.saved_bytes());
    }
    line["flops"] = flops;
    line["fetched_mib"] = static_cast<double>(fetched_bytes) / (1 << 20);
    if (Trains()) line["saved_mib"] = saved_bytes >> 20;
  }
  auto stages = TimeStages(bench, options, *plan, *tensors);
  if (!stages.ok()) return stages.status();
  line["stages_ms"] = *std::move(stages);
  Print(bench.gpu, line);
  return absl::OkStatus();
}

absl::Status Run(GpuRank gpu) {
  auto kernels = kernels::CudaKernels::Create({.device = gpu.device});
  if (!kernels.ok()) return kernels.status();
  auto timer = GpuTimer::Create();
  if (!timer.ok()) return timer.status();
  Bench bench = {gpu, std::make_shared<InPlaceCommunicator>(gpu.communicator), *std::move(kernels),
                 *std::move(timer)};

  auto heading = Heading(absl::GetFlag(FLAGS_pass), bench.gpu, ConfigOfFlags());
  if (!heading.ok()) return heading.status();
  (*heading)["sharding"] = absl::GetFlag(FLAGS_sharding);
  auto lengths = NumbersOf("tokens", absl::GetFlag(FLAGS_tokens));
  if (!lengths.ok()) return lengths.status();
  for (int64_t tokens : *lengths) NSA_BENCHMARK_OK(MeasureLength(bench, *heading, tokens));
  return bench.communicator->Barrier();
}

}  // namespace
}  // namespace nsa::benchmarks

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  if (absl::GetFlag(FLAGS_reps) < 1) {
    std::fprintf(stderr, "passes_cuda: --reps = %d: must be at least 1\n",
                 absl::GetFlag(FLAGS_reps));
    return 1;
  }
  const std::string pass = absl::GetFlag(FLAGS_pass);
  if (pass != "forward" && pass != "backward" && pass != "step") {
    std::fprintf(stderr, "passes_cuda: --pass = \"%s\": must be forward, backward or step\n",
                 pass.c_str());
    return 1;
  }
  const bool under_mpirun = std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr;
  const absl::Status status = nsa::benchmarks::RunOnGpu(under_mpirun, {}, nsa::benchmarks::Run);
  if (status.ok()) return 0;
  std::fprintf(stderr, "passes_cuda: %s\n", status.ToString().c_str());
  return 1;
}
