// Two processes of this host: bandwidth of window reads and of all-gather, latency of an empty
// barrier, and the processor time of a rank that waits for a slow one.
//   bazel run -c opt //comm/ucx:ucx_benchmark
#include <sys/resource.h>

#include <cstdio>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "comm/communicator.h"
#include "comm/conformance/check.h"
#include "comm/conformance/launch.h"
#include "comm/ucx/test_group.h"

namespace nsa::comm {
namespace {

constexpr int kSize = 2;

absl::Duration ProcessorTime() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return absl::DurationFromTimeval(usage.ru_utime) + absl::DurationFromTimeval(usage.ru_stime);
}

double GigabytesPerSecond(int64_t bytes, absl::Duration time) {
  return static_cast<double>(bytes) / absl::ToDoubleSeconds(time) / 1e9;
}

// Random records of the other rank; both ranks read at once, or rank 0 alone while 1 makes no call.
absl::Status MeasureGather(Communicator& comm, int64_t record_bytes, bool both) {
  constexpr int64_t kWindowBytes = int64_t{64} << 20;
  constexpr int kRounds = 4;
  auto window = comm.CreateWindow(kWindowBytes);
  NSA_COMM_OK(window.status());
  NSA_COMM_OK((*window)->BeginWrite(nullptr));
  NSA_COMM_OK((*window)->Publish(nullptr));
  const int32_t count = static_cast<int32_t>(kWindowBytes / record_bytes);
  std::vector<int32_t> peers(count, 1 - comm.rank());
  std::vector<int64_t> offsets;
  for (int32_t i = 0; i < count; ++i) offsets.push_back(i * record_bytes);
  std::shuffle(offsets.begin(), offsets.end(), std::mt19937(1));
  std::vector<char> dst(kWindowBytes);
  if (both || comm.rank() == 0) {
    absl::Time start;
    for (int round = -1; round < kRounds; ++round) {
      if (round == 0) start = absl::Now();  // after one to warm up
      NSA_COMM_OK((*window)->Gather({peers.data(), offsets.data(), &count, count}, record_bytes,
                                    dst.data(), nullptr));
    }
    if (comm.rank() == 0) {
      absl::PrintF("  gather, records of %6d bytes, %s: %6.2f GB/s\n", record_bytes,
                   both ? "both ranks read " : "one rank reads  ",
                   GigabytesPerSecond(kRounds * kWindowBytes, absl::Now() - start));
    }
  }
  NSA_COMM_OK((*window)->Release(nullptr));
  return comm.Barrier();
}

absl::Status MeasureAllGather(Communicator& comm, int64_t bytes_per_rank, int rounds) {
  std::vector<char> buffer(kSize * bytes_per_rank);
  std::vector<GatherRun> runs;
  for (int rank = 0; rank < kSize; ++rank) {
    runs.push_back({rank, rank * bytes_per_rank, bytes_per_rank});
  }
  absl::Time start;
  for (int round = -2; round < rounds; ++round) {
    if (round == 0) start = absl::Now();
    NSA_COMM_OK(comm.AllGather(buffer.data(), runs, nullptr));
  }
  if (comm.rank() == 0) {
    const absl::Duration each = (absl::Now() - start) / rounds;
    absl::PrintF("  all-gather, %8d bytes a rank: %9.1f us, %5.2f GB/s received a rank\n",
                 bytes_per_rank, absl::ToDoubleMicroseconds(each),
                 GigabytesPerSecond((kSize - 1) * bytes_per_rank, each));
  }
  return absl::OkStatus();
}

absl::Status MeasureBarrier(Communicator& comm) {
  constexpr int kRounds = 3000;
  const absl::Time start = absl::Now();
  for (int round = 0; round < kRounds; ++round) NSA_COMM_OK(comm.Barrier());
  if (comm.rank() == 0) {
    absl::PrintF("  barrier: %.1f us\n",
                 absl::ToDoubleMicroseconds((absl::Now() - start) / kRounds));
  }
  return absl::OkStatus();
}

absl::Status MeasureIdleWait(Communicator& comm) {
  constexpr absl::Duration kWait = absl::Seconds(3);
  const absl::Duration before = ProcessorTime();
  if (comm.rank() == 1) absl::SleepFor(kWait);
  NSA_COMM_OK(comm.Barrier());
  if (comm.rank() == 0) {
    absl::PrintF("  waiting for a slow rank: %.2f %% of a core\n",
                 100 * absl::FDivDuration(ProcessorTime() - before, kWait));
  }
  return absl::OkStatus();
}

absl::Status Measure(const ucx::Transport& transport, int rank, int port) {
  auto comm = ucx::CreateOnThisHost(transport, rank, kSize, port, 0, absl::Seconds(60));
  NSA_COMM_OK(comm.status());
  for (int64_t record_bytes : {4 << 10, 16 << 10, 32 << 10}) {
    NSA_COMM_OK(MeasureGather(**comm, record_bytes, /*both=*/false));
    NSA_COMM_OK(MeasureGather(**comm, record_bytes, /*both=*/true));
  }
  NSA_COMM_OK(MeasureAllGather(**comm, 4 << 10, 1000));
  NSA_COMM_OK(MeasureAllGather(**comm, 1 << 20, 200));
  NSA_COMM_OK(MeasureAllGather(**comm, 64 << 20, 4));
  NSA_COMM_OK(MeasureBarrier(**comm));
  return MeasureIdleWait(**comm);
}

}  // namespace
}  // namespace nsa::comm

int main() {
  for (const auto& transport : nsa::comm::ucx::Transports()) {
    absl::PrintF("%s (%s)\n", transport.name, transport.tls);
    std::fflush(stdout);
    const int port = nsa::comm::conformance::FreePort();
    const absl::Status status =
        nsa::comm::conformance::RunOnProcesses(nsa::comm::kSize, [&](int rank) {
          const absl::Status measured = nsa::comm::Measure(transport, rank, port);
          std::fflush(stdout);
          return measured;
        });
    if (!status.ok()) {
      absl::FPrintF(stderr, "%s\n", status.ToString());
      return 1;
    }
  }
  return 0;
}
