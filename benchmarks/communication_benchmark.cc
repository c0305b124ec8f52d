// Each communication step of the forward between GPUs, under mpirun, one GPU a rank:
//
//   mpirun -n 4 communication_benchmark [--gather_ctas 16 --gather_warps 8]
//
// A time is that of the slowest rank, for one of 10 calls one behind the other, after one that is
// not timed and that brings the ranks together; GB/s are those that a GPU receives. Flags of Google
// Benchmark (--benchmark_filter, --benchmark_format=json) work; it is the first rank that reports.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "benchmark/benchmark.h"
#include "benchmarks/gpu_rank.h"
#include "benchmarks/gpu_timer.h"
#include "comm/communicator.h"

ABSL_FLAG(int, gather_ctas, 16, "CTAs of the kernel of Gather");
ABSL_FLAG(int, gather_warps, 8, "reads under way in each");

namespace nsa::benchmarks {
namespace {

constexpr int kRounds = 10;   // timed
constexpr int kWarmUps = 2;   // rounds that are not
constexpr int kRepeats = 10;  // calls between two events
constexpr int64_t kWindowBytes = int64_t{512} << 20;

// The shape of the performance goals: Hkv 4, Dk = Dv = 128, bf16, d 16, w 512.
constexpr int64_t kTokenBytes = 4 * (128 + 128) * 2;  // of k and v, and of a summary
constexpr int64_t kStrideTokens = 16;
constexpr int64_t kHaloTokens = 511;

using Call = std::function<absl::Status()>;

struct Bench {
  comm::Communicator& communicator;
  GpuTimer& timer;

  int rank() const { return communicator.rank(); }
  int size() const { return communicator.size(); }
  // Zig-zag: chunks 0..2P-1, of which rank r holds r and 2P-1-r.
  int num_chunks() const { return 2 * size(); }
  int OwnerOfChunk(int chunk) const { return std::min(chunk, num_chunks() - 1 - chunk); }
};

struct DeviceFree {
  void operator()(void* memory) const { (void)cudaFree(memory); }
};
using DeviceMemory = std::unique_ptr<void, DeviceFree>;

absl::StatusOr<DeviceMemory> Allocate(int64_t num_bytes) {
  void* memory = nullptr;
  NSA_BENCHMARK_OK(CudaStatus(cudaMalloc(&memory, std::max<int64_t>(1, num_bytes)), "cudaMalloc"));
  return DeviceMemory(memory);
}

template <typename T>
absl::StatusOr<DeviceMemory> Upload(const std::vector<T>& values) {
  const int64_t num_bytes = values.size() * sizeof(T);
  auto memory = Allocate(num_bytes);
  if (!memory.ok()) return memory.status();
  NSA_BENCHMARK_OK(
      CudaStatus(cudaMemcpy(memory->get(), values.data(), num_bytes, cudaMemcpyDefault), "upload"));
  return memory;
}

// Times `call`, between a `before` and an `after` of each round. `bytes` is what a call brings to
// this GPU.
absl::Status Measure(benchmark::State& state, Bench& bench, double bytes, const Call& before,
                     const Call& call, const Call& after) {
  const auto round = [&]() -> absl::StatusOr<double> {
    auto mine = bench.timer.Time(
        [&] {
          NSA_BENCHMARK_OK(CudaStatus(cudaStreamSynchronize(bench.timer.stream()), "flush"));
          NSA_BENCHMARK_OK(bench.communicator.Barrier());
          NSA_BENCHMARK_OK(before());
          return call();
        },
        [&] {
          for (int i = 0; i < kRepeats; ++i) NSA_BENCHMARK_OK(call());
          return absl::OkStatus();
        });
    if (!mine.ok()) return mine.status();
    NSA_BENCHMARK_OK(after());
    NSA_BENCHMARK_OK(bench.communicator.HealthCheck());
    return LargestOfRanks(bench.communicator, *mine / kRepeats);
  };
  for (int i = 0; i < kWarmUps; ++i) NSA_BENCHMARK_OK(round().status());
  std::vector<double> times;
  for (auto _ : state) {
    auto ms = round();
    if (!ms.ok()) return ms.status();
    state.SetIterationTime(*ms * 1e-3);
    times.push_back(*ms);
  }
  const Spread spread = SpreadOf(times);
  state.counters["median_us"] = spread.median * 1e3;
  state.counters["min_us"] = spread.min * 1e3;
  state.counters["max_us"] = spread.max * 1e3;
  if (bytes > 0) state.counters["GB/s"] = bytes / spread.median * 1e-6;
  return absl::OkStatus();
}

absl::Status Nothing() { return absl::OkStatus(); }

// The summaries of a sequence of state.range(0) tokens.
absl::Status AllGatherSummaries(benchmark::State& state, Bench& bench) {
  const int64_t chunk = state.range(0) / bench.num_chunks() / kStrideTokens * kTokenBytes;
  std::vector<comm::GatherRun> runs;
  for (int i = 0; i < bench.num_chunks(); ++i) {
    runs.push_back({bench.OwnerOfChunk(i), i * chunk, chunk});
  }
  auto buffer = Allocate(chunk * bench.num_chunks());
  if (!buffer.ok()) return buffer.status();
  const auto gather = [&] {
    return bench.communicator.AllGather(buffer->get(), runs, bench.timer.stream());
  };
  return Measure(state, bench, static_cast<double>(chunk * (bench.num_chunks() - 2)), Nothing,
                 gather, Nothing);
}

// The tokens of k and of v before each chunk, w - 1 each.
absl::Status ExchangeHalo(benchmark::State& state, Bench& bench) {
  constexpr int64_t kBytes = kHaloTokens * kTokenBytes / 2;
  std::vector<comm::SendOp> sends;
  std::vector<comm::RecvOp> receives;
  auto memory = Allocate(4 * bench.num_chunks() * kBytes);
  if (!memory.ok()) return memory.status();
  char* next = static_cast<char*>(memory->get());
  for (int tensor = 0; tensor < 2; ++tensor) {
    for (int chunk = 1; chunk < bench.num_chunks(); ++chunk) {
      const int from = bench.OwnerOfChunk(chunk - 1), to = bench.OwnerOfChunk(chunk);
      if (from == to) continue;
      if (from == bench.rank()) sends.push_back({to, std::exchange(next, next + kBytes), kBytes});
      if (to == bench.rank())
        receives.push_back({from, std::exchange(next, next + kBytes), kBytes});
    }
  }
  const auto exchange = [&] {
    return bench.communicator.Exchange(sends, receives, bench.timer.stream());
  };
  return Measure(state, bench, static_cast<double>(receives.size() * kBytes), Nothing, exchange,
                 Nothing);
}

// state.range(1) KiB of records of state.range(0) bytes at random places of the other ranks.
absl::Status GatherRecords(benchmark::State& state, Bench& bench) {
  const int64_t record_bytes = state.range(0);
  const int64_t num_bytes = state.range(1) << 10;
  auto window = bench.communicator.CreateWindow(kWindowBytes);
  if (!window.ok()) return window.status();
  std::mt19937_64 random(bench.rank());
  std::vector<int32_t> peers;
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < num_bytes / record_bytes; ++i) {
    const int64_t others = std::max(bench.size() - 1, 1);
    peers.push_back(static_cast<int32_t>((bench.rank() + 1 + i % others) % bench.size()));
    offsets.push_back(static_cast<int64_t>(random() % (kWindowBytes / record_bytes)) *
                      record_bytes);
  }
  const int32_t num_records = static_cast<int32_t>(peers.size());
  auto device_peers = Upload(peers);
  auto device_offsets = Upload(offsets);
  auto device_count = Upload(std::vector<int32_t>{num_records});
  auto dst = Allocate(num_bytes);
  for (const auto* memory : {&device_peers, &device_offsets, &device_count, &dst}) {
    if (!memory->ok()) return memory->status();
  }
  const comm::GatherList list = {static_cast<const int32_t*>(device_peers->get()),
                                 static_cast<const int64_t*>(device_offsets->get()),
                                 static_cast<const int32_t*>(device_count->get()), num_records};
  cudaStream_t const stream = bench.timer.stream();
  const auto publish = [&] {
    NSA_BENCHMARK_OK((*window)->BeginWrite(stream));
    return (*window)->Publish(stream);
  };
  const auto gather = [&] { return (*window)->Gather(list, record_bytes, dst->get(), stream); };
  const auto release = [&] { return (*window)->Release(stream); };
  return Measure(state, bench, static_cast<double>(num_bytes), publish, gather, release);
}

// What an epoch costs in which nothing is read: signals alone.
absl::Status PublishAndRelease(benchmark::State& state, Bench& bench) {
  auto window = bench.communicator.CreateWindow(4096);
  if (!window.ok()) return window.status();
  cudaStream_t const stream = bench.timer.stream();
  const auto epoch = [&] {
    NSA_BENCHMARK_OK((*window)->BeginWrite(stream));
    NSA_BENCHMARK_OK((*window)->Publish(stream));
    return (*window)->Release(stream);
  };
  return Measure(state, bench, 0, Nothing, epoch, Nothing);
}

using Step = absl::Status (*)(benchmark::State& state, Bench& bench);

benchmark::internal::Benchmark* Register(const char* name, Step step, Bench& bench) {
  return benchmark::RegisterBenchmark(name,
                                      [step, &bench](benchmark::State& state) {
                                        const absl::Status status = step(state, bench);
                                        if (!status.ok()) {
                                          state.SkipWithError(status.ToString().c_str());
                                        }
                                      })
      ->Iterations(kRounds)
      ->UseManualTime()
      ->Unit(benchmark::kMicrosecond);
}

class Silent : public benchmark::BenchmarkReporter {
 public:
  bool ReportContext(const Context&) override { return true; }
  void ReportRuns(const std::vector<Run>&) override {}
};

absl::Status RunAll(GpuRank gpu) {
  auto timer = GpuTimer::Create();
  if (!timer.ok()) return timer.status();
  Bench bench = {*gpu.communicator, **timer};
  auto* all_gather = Register("all_gather_summaries", AllGatherSummaries, bench);
  for (int64_t tokens : {8 << 10, 64 << 10, 256 << 10, 1 << 20}) all_gather->Arg(tokens);
  all_gather->ArgName("tokens");
  Register("exchange_halo", ExchangeHalo, bench);
  auto* gather = Register("gather_records", GatherRecords, bench);
  for (int64_t record_bytes : {1 << 10, 4 << 10, 16 << 10, 32 << 10}) {
    gather->Args({record_bytes, 256 << 10});
  }
  for (int64_t kib : {128, 2 << 10}) gather->Args({32 << 10, kib});
  gather->ArgNames({"record_bytes", "KiB"});
  Register("publish_and_release", PublishAndRelease, bench);

  benchmark::AddCustomContext("gpus", std::to_string(bench.size()));
  Silent silent;
  if (bench.rank() == 0) {
    benchmark::RunSpecifiedBenchmarks();
  } else {
    benchmark::RunSpecifiedBenchmarks(&silent);
  }
  NSA_BENCHMARK_OK(bench.communicator.HealthCheck());
  return bench.communicator.Barrier();
}

}  // namespace
}  // namespace nsa::benchmarks

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);  // takes its own flags out
  absl::ParseCommandLine(argc, argv);
  nsa::comm::NcclOptions options;
  options.gather_ctas = absl::GetFlag(FLAGS_gather_ctas);
  options.gather_warps = absl::GetFlag(FLAGS_gather_warps);
  const bool under_mpirun = std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr;
  const absl::Status status =
      nsa::benchmarks::RunOnGpu(under_mpirun, options, nsa::benchmarks::RunAll);
  if (status.ok()) return 0;
  std::fprintf(stderr, "communication_benchmark: %s\n", status.ToString().c_str());
  return 1;
}
