// A step of decoding on GPUs, replayed as a CUDA graph: one new token for each sequence of a batch.
//
//   decode_cuda                                   one GPU, all lengths and batches
//   decode_cuda --cached=65536 --batch=1,8
//   mpirun -n 4 decode_cuda --cached=1048576      the cache is shared by four GPUs
//
// Prints one line of JSON for each length and batch; README.md says what its fields mean.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "benchmarks/caller_tensors.h"
#include "benchmarks/decode_reads.h"
#include "benchmarks/device_values.h"
#include "benchmarks/gpu_rank.h"
#include "benchmarks/gpu_timer.h"
#include "benchmarks/hold_stream.h"
#include "benchmarks/result_lines.h"
#include "kernels/cuda/cuda_kernels.h"
#include "nsa/serving/kv_cache.h"

ABSL_FLAG(std::vector<std::string>, cached,
          std::vector<std::string>({"16384", "65536", "262144", "1048576"}),
          "tokens of each sequence, the new one counted in");
ABSL_FLAG(std::vector<std::string>, batch, std::vector<std::string>({"1", "8", "32"}), "sequences");
ABSL_FLAG(int, homes, 1, "ranks that the sequences are dealt out to; all hold pages");
ABSL_FLAG(int64_t, max_tokens, 1 << 20, "KvCacheOptions::max_tokens, if not less than --cached");
ABSL_FLAG(bool, flush, true, "flush the L2 before each step");
ABSL_FLAG(bool, plan, false, "time PlanStep too, and with it the host");
ABSL_FLAG(int, reps, 10, "timed steps, after 3 that are not timed; at least 1");

namespace nsa::benchmarks {
namespace {

using serving::KvCache;

constexpr int kWarmUps = 3;
constexpr int64_t kPieceTokens = 1024;  // appended at a time
// Longer than the host takes to launch a graph.
constexpr int64_t kHoldNanoseconds = 100'000;
// Of a rank that waits while another fills the cache.
constexpr absl::Duration kTimeout = absl::Minutes(5);

struct GraphDeleter {
  void operator()(cudaGraph_t graph) const { (void)cudaGraphDestroy(graph); }
  void operator()(cudaGraphExec_t graph) const { (void)cudaGraphExecDestroy(graph); }
};
using Graph = std::unique_ptr<std::remove_pointer_t<cudaGraph_t>, GraphDeleter>;
using GraphExec = std::unique_ptr<std::remove_pointer_t<cudaGraphExec_t>, GraphDeleter>;

struct Bench {
  GpuRank gpu;
  std::shared_ptr<kernels::Kernels> kernels;
  std::unique_ptr<GpuTimer> timer;
};

struct Case {
  int64_t cached;
  int64_t batch;
};

// A cache with the sequences of a case, and the graph of this rank's step.
class DecodeStep {
 public:
  // Collective. ResourceExhausted on every rank if there is no room.
  static absl::StatusOr<std::unique_ptr<DecodeStep>> Create(Bench& bench, const NsaConfig& config,
                                                            const Case& sizes) {
    auto step = absl::WrapUnique(new DecodeStep(bench, config, sizes));
    NSA_BENCHMARK_OK(step->CreateCache());
    if (step->NumRows() == 0) return step;
    NSA_BENCHMARK_OK(step->FillSequences());
    NSA_BENCHMARK_OK(step->Capture());
    return step;
  }

  // Collective: microseconds of a step of the slowest rank.
  absl::StatusOr<double> Time() {
    const bool plans = absl::GetFlag(FLAGS_plan);
    const auto prepare = [&]() -> absl::Status {
      NSA_BENCHMARK_OK(CudaStatus(cudaStreamSynchronize(stream()), "flush"));
      NSA_BENCHMARK_OK(bench_.gpu.communicator->Barrier());
      return plans ? absl::OkStatus()
                   : CudaStatus(HoldStream(kHoldNanoseconds, stream()), "HoldStream");
    };
    const auto work = [&]() -> absl::Status {
      if (NumRows() == 0) return absl::OkStatus();
      if (plans) NSA_BENCHMARK_OK(cache_->PlanStep(rows_, stream()));
      return CudaStatus(cudaGraphLaunch(graph_.get(), stream()), "cudaGraphLaunch");
    };
    NSA_BENCHMARK_OK(TakeBack());
    if (!plans && NumRows() > 0) NSA_BENCHMARK_OK(cache_->PlanStep(rows_, stream()));
    auto mine = bench_.timer->Time(prepare, work, absl::GetFlag(FLAGS_flush));
    if (!mine.ok()) return mine.status();
    return LargestOfRanks(*bench_.gpu.communicator, *mine * 1e3);
  }

  // Of all homes together, by the rank that they lie on.
  absl::StatusOr<std::vector<int64_t>> PagesOfRanks() const {
    std::vector<int64_t> pages(bench_.gpu.communicator->size());
    auto all =
        bench_.gpu.communicator->HostAllGather(Json(cache_->Stats().pages_used_of_rank).dump());
    if (!all.ok()) return all.status();
    for (const std::string& of_home : *all) {
      const auto theirs = Json::parse(of_home).get<std::vector<int64_t>>();
      for (size_t rank = 0; rank < pages.size(); ++rank) pages[rank] += theirs[rank];
    }
    return pages;
  }

 private:
  DecodeStep(Bench& bench, const NsaConfig& config, const Case& sizes)
      : bench_(bench), config_(config), sizes_(sizes) {}

  cudaStream_t stream() const { return bench_.timer->stream(); }
  int64_t NumRows() const { return static_cast<int64_t>(rows_.size()); }

  // Sequences whose home `rank` is.
  int64_t SequencesOf(int rank) const {
    const int homes = absl::GetFlag(FLAGS_homes);
    return rank < homes ? (sizes_.batch - rank + homes - 1) / homes : 0;
  }

  absl::Status CreateCache() {
    const int rank = bench_.gpu.communicator->rank(), size = bench_.gpu.communicator->size();
    const int64_t mine = SequencesOf(rank);
    serving::KvCacheOptions options;
    options.config = config_;
    for (int home = 0; home < size; ++home) options.home_shares.push_back(SequencesOf(home));
    // As many on every rank as hold all sequences, and what rounding the shares takes: a home takes
    // its own pages first.
    const int64_t pages = sizes_.batch * NumSelectBlocks(config_, sizes_.cached);
    options.num_pages = (pages + size - 1) / size + size;
    options.max_sequences = static_cast<int32_t>(std::max<int64_t>(mine, 1));
    options.max_step_rows = options.max_sequences;
    options.max_tokens = std::max(absl::GetFlag(FLAGS_max_tokens), sizes_.cached);
    auto cache = KvCache::Create(options, bench_.gpu.communicator, bench_.kernels);
    if (!cache.ok()) return cache.status();
    cache_ = *std::move(cache);
    if (!cache_->is_reachable()) {
      return absl::FailedPreconditionError(
          "the GPUs do not load each other's memory: no graph without that");
    }
    for (int64_t i = 0; i < mine; ++i) {
      auto sequence = cache_->Open();
      if (!sequence.ok()) return sequence.status();
      rows_.push_back({*sequence, 1});
    }
    return absl::OkStatus();
  }

  // All tokens but the new one, in pieces of one sequence after the other's, so that all have pages
  // on all ranks.
  absl::Status FillSequences() {
    const int64_t heads = config_.num_kv_heads;
    const int64_t row_k = heads * config_.head_dim_qk, row_v = heads * config_.head_dim_v;
    auto k = bench_.kernels->Allocate(kPieceTokens * row_k * 2);
    if (!k.ok()) return k.status();
    auto v = bench_.kernels->Allocate(kPieceTokens * row_v * 2);
    if (!v.ok()) return v.status();
    for (int64_t begin = 0; begin < sizes_.cached - 1; begin += kPieceTokens) {
      const int64_t count = std::min(kPieceTokens, sizes_.cached - 1 - begin);
      for (int64_t i = 0; i < NumRows(); ++i) {
        const int64_t sequence = i * absl::GetFlag(FLAGS_homes) + bench_.gpu.communicator->rank();
        const int64_t first = sequence * sizes_.cached + begin;
        NSA_BENCHMARK_OK(CudaStatus(
            FillNormal(1, first * row_k, count * row_k, (*k)->data(), stream()), "FillNormal"));
        NSA_BENCHMARK_OK(CudaStatus(
            FillNormal(2, first * row_v, count * row_v, (*v)->data(), stream()), "FillNormal"));
        serving::KvTokens tokens;
        tokens.k_slc = ConstTensor((*k)->data(), DType::kBF16, {count, heads, config_.head_dim_qk});
        tokens.v_slc = ConstTensor((*v)->data(), DType::kBF16, {count, heads, config_.head_dim_v});
        NSA_BENCHMARK_OK(cache_->Append(rows_[i].sequence, tokens, stream()));
      }
    }
    return CudaStatus(cudaStreamSynchronize(stream()), "filling the cache");
  }

  // After a step that is not captured, which loads the kernels.
  absl::Status Capture() {
    auto tensors = CallerTensors::Allocate(*bench_.kernels, config_,
                                           *ShardPlan::Parse("contiguous", NumRows(), 1), 0);
    if (!tensors.ok()) return tensors.status();
    tensors_ = std::make_unique<CallerTensors>(*std::move(tensors));
    NSA_BENCHMARK_OK(tensors_->Fill(stream()));
    serving::StepInputs inputs;
    inputs.q = tensors_->inputs().q;
    inputs.kv.k_slc = tensors_->inputs().k_slc;
    inputs.kv.v_slc = tensors_->inputs().v_slc;
    inputs.gate = tensors_->inputs().gate;
    serving::StepOutputs outputs;
    outputs.o = tensors_->outputs().o;

    NSA_BENCHMARK_OK(cache_->Step(rows_, inputs, outputs, stream()));
    NSA_BENCHMARK_OK(CudaStatus(cudaStreamSynchronize(stream()), "the first step"));
    NSA_BENCHMARK_OK(CudaStatus(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeThreadLocal),
                                "begin the graph"));
    const absl::Status captured = cache_->RunStep(NumRows(), inputs, outputs, stream());
    cudaGraph_t graph = nullptr;
    const cudaError_t ended = cudaStreamEndCapture(stream(), &graph);
    const Graph owned(graph);
    NSA_BENCHMARK_OK(captured);
    NSA_BENCHMARK_OK(CudaStatus(ended, "end the graph"));
    cudaGraphExec_t exec = nullptr;
    NSA_BENCHMARK_OK(CudaStatus(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate"));
    graph_.reset(exec);
    return absl::OkStatus();
  }

  // The new tokens of the step before.
  absl::Status TakeBack() {
    for (const serving::StepSequence& row : rows_) {
      NSA_BENCHMARK_OK(cache_->Truncate(row.sequence, sizes_.cached - 1));
    }
    return absl::OkStatus();
  }

  Bench& bench_;
  const NsaConfig config_;
  const Case sizes_;
  std::unique_ptr<KvCache> cache_;
  std::vector<serving::StepSequence> rows_;  // of this home
  std::unique_ptr<CallerTensors> tensors_;   // as is what follows; null without sequences
  GraphExec graph_;
};

absl::Status Measure(Bench& bench, const NsaConfig& config, const Json& heading,
                     const Case& sizes) {
  Json line = heading;
  line["homes"] = absl::GetFlag(FLAGS_homes);
  line["flush"] = absl::GetFlag(FLAGS_flush);
  line["plan"] = absl::GetFlag(FLAGS_plan);
  line["max_tokens"] = std::max(absl::GetFlag(FLAGS_max_tokens), sizes.cached);
  line["cached"] = sizes.cached;
  line["batch"] = sizes.batch;
  auto step = DecodeStep::Create(bench, config, sizes);
  if (absl::IsResourceExhausted(step.status())) {
    line["skipped"] = std::string(step.status().message());
    Print(bench.gpu, line);
    return absl::OkStatus();
  }
  if (!step.ok()) return step.status();
  std::vector<double> times;
  for (int i = -kWarmUps; i < absl::GetFlag(FLAGS_reps); ++i) {
    auto us = (*step)->Time();
    if (!us.ok()) return us.status();
    if (i >= 0) times.push_back(*us);
  }
  const Spread spread = SpreadOf(times);
  line["median_us"] = Rounded(spread.median);
  line["min_us"] = Rounded(spread.min);
  line["max_us"] = Rounded(spread.max);
  line["reps"] = times.size();
  line["tokens_per_s"] = Rounded(static_cast<double>(sizes.batch) / spread.median * 1e6);
  const DecodeReads reads = DecodeReadsOf(config, sizes.cached);
  line["read_tokens"] = reads.rows();
  line["bytes_read"] = sizes.batch * reads.rows() * KvRowBytes(config);
  line["dense_bytes"] = sizes.batch * sizes.cached * KvRowBytes(config);
  auto pages = (*step)->PagesOfRanks();
  if (!pages.ok()) return pages.status();
  line["pages_of_rank"] = *pages;
  Print(bench.gpu, line);
  return absl::OkStatus();
}

absl::Status Run(GpuRank gpu) {
  auto kernels = kernels::CudaKernels::Create({.device = gpu.device});
  if (!kernels.ok()) return kernels.status();
  auto timer = GpuTimer::Create();
  if (!timer.ok()) return timer.status();
  Bench bench = {gpu, *std::move(kernels), *std::move(timer)};
  const NsaConfig config = ConfigOfFlags();
  auto heading = Heading("decode", gpu, config);
  if (!heading.ok()) return heading.status();
  auto lengths = NumbersOf("cached", absl::GetFlag(FLAGS_cached));
  if (!lengths.ok()) return lengths.status();
  auto batches = NumbersOf("batch", absl::GetFlag(FLAGS_batch));
  if (!batches.ok()) return batches.status();
  if (const int homes = absl::GetFlag(FLAGS_homes); homes < 1 || homes > gpu.communicator->size()) {
    return absl::InvalidArgumentError(absl::StrCat("--homes = ", homes, ": must be in [1, ",
                                                   gpu.communicator->size(), "], the ranks"));
  }
  for (int64_t cached : *lengths) {
    for (int64_t batch : *batches) {
      NSA_BENCHMARK_OK(Measure(bench, config, *heading, {cached, batch}));
    }
  }
  return gpu.communicator->Barrier();
}

}  // namespace
}  // namespace nsa::benchmarks

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  if (absl::GetFlag(FLAGS_reps) < 1) {
    std::fprintf(stderr, "decode_cuda: --reps = %d: must be at least 1\n",
                 absl::GetFlag(FLAGS_reps));
    return 1;
  }
  const bool under_mpirun = std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr;
  nsa::comm::NcclOptions options;
  options.timeout = nsa::benchmarks::kTimeout;
  const absl::Status status =
      nsa::benchmarks::RunOnGpu(under_mpirun, options, nsa::benchmarks::Run);
  if (status.ok()) return 0;
  std::fprintf(stderr, "decode_cuda: %s\n", status.ToString().c_str());
  return 1;
}
