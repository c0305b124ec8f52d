// Gather and AllGather between all GPUs of this host. Prints GB/s received by a GPU, of the slowest
// rank, all ranks at once.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "comm/conformance/check.h"
#include "comm/conformance/launch.h"
#include "comm/nccl/cuda_status.h"
#include "comm/nccl/test_group.h"

namespace nsa::comm {
namespace {

using nccl::ToDevice;

constexpr int64_t kWindowBytes = int64_t{512} << 20;
constexpr int64_t kGatherBytes = int64_t{256} << 20;
constexpr int kRounds = 10;
constexpr int kRepeats = 10;  // of a call between two events

// The slowest rank's median time of `work`, in milliseconds.
template <typename Work>
absl::StatusOr<double> Time(Communicator& comm, const Work& work) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  NSA_NCCL_CUDA_OK(cudaEventCreate(&begin));
  NSA_NCCL_CUDA_OK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int round = 0; round < kRounds + 2; ++round) {
    NSA_COMM_OK(comm.Barrier());
    NSA_COMM_OK(work(begin, end));
    NSA_NCCL_CUDA_OK(cudaStreamSynchronize(nullptr));
    NSA_COMM_OK(comm.HealthCheck());
    float ms = 0;
    NSA_NCCL_CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (round >= 2) times.push_back(ms);
  }
  NSA_NCCL_CUDA_OK(cudaEventDestroy(begin));
  NSA_NCCL_CUDA_OK(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  auto all = comm.HostAllGather(absl::StrCat(times[times.size() / 2]));
  NSA_COMM_OK(all.status());
  double slowest = 0;
  for (const std::string& ms : *all) slowest = std::max(slowest, std::stod(ms));
  return slowest;
}

absl::Status TimeGather(Communicator& comm, int64_t record_bytes, int64_t num_bytes,
                        const std::string& label) {
  auto window = comm.CreateWindow(kWindowBytes);
  NSA_COMM_OK(window.status());
  std::mt19937_64 random(comm.rank());
  std::vector<int32_t> peers;
  std::vector<int64_t> offsets;
  for (int64_t i = 0; i < num_bytes / record_bytes; ++i) {
    // From every other rank in turn, never from itself.
    peers.push_back((comm.rank() + 1 + i % std::max(comm.size() - 1, 1)) % comm.size());
    offsets.push_back(static_cast<int64_t>(random() % (kWindowBytes / record_bytes)) *
                      record_bytes);
  }
  auto device_peers = ToDevice(peers);
  NSA_COMM_OK(device_peers.status());
  auto device_offsets = ToDevice(offsets);
  NSA_COMM_OK(device_offsets.status());
  auto device_count = ToDevice(std::vector<int32_t>{static_cast<int32_t>(peers.size())});
  NSA_COMM_OK(device_count.status());
  auto dst = ToDevice(std::vector<char>(num_bytes));
  NSA_COMM_OK(dst.status());
  const GatherList list = {device_peers->get(), device_offsets->get(), device_count->get(),
                           static_cast<int64_t>(peers.size())};
  auto ms = Time(comm, [&](cudaEvent_t begin, cudaEvent_t end) -> absl::Status {
    NSA_COMM_OK((*window)->BeginWrite(nullptr));
    NSA_COMM_OK((*window)->Publish(nullptr));
    // The first waits for the peers' Publish, which comes when their hosts get to it.
    NSA_COMM_OK((*window)->Gather(list, record_bytes, dst->get(), nullptr));
    NSA_NCCL_CUDA_OK(cudaEventRecord(begin, nullptr));
    for (int i = 0; i < kRepeats; ++i) {
      NSA_COMM_OK((*window)->Gather(list, record_bytes, dst->get(), nullptr));
    }
    NSA_NCCL_CUDA_OK(cudaEventRecord(end, nullptr));
    return (*window)->Release(nullptr);
  });
  NSA_COMM_OK(ms.status());
  if (comm.rank() == 0) {
    std::printf("gather %s records %6d B, %7d KiB: %8.1f us %7.1f GB/s\n", label.c_str(),
                static_cast<int>(record_bytes), static_cast<int>(num_bytes >> 10),
                *ms * 1e3 / kRepeats, num_bytes * kRepeats / *ms * 1e-6);
  }
  return absl::OkStatus();
}

// What an epoch costs when nothing is read: signals alone.
absl::Status TimeEpoch(Communicator& comm) {
  auto window = comm.CreateWindow(4096);
  NSA_COMM_OK(window.status());
  constexpr int kEpochs = 100;
  auto ms = Time(comm, [&](cudaEvent_t begin, cudaEvent_t end) -> absl::Status {
    NSA_NCCL_CUDA_OK(cudaEventRecord(begin, nullptr));
    for (int i = 0; i < kEpochs; ++i) {
      NSA_COMM_OK((*window)->BeginWrite(nullptr));
      NSA_COMM_OK((*window)->Publish(nullptr));
      NSA_COMM_OK((*window)->Release(nullptr));
    }
    NSA_NCCL_CUDA_OK(cudaEventRecord(end, nullptr));
    return absl::OkStatus();
  });
  NSA_COMM_OK(ms.status());
  if (comm.rank() == 0) std::printf("epoch without a gather: %.1f us\n", *ms * 1e3 / kEpochs);
  return absl::OkStatus();
}

absl::Status TimeAllGather(Communicator& comm, int64_t bytes_per_rank, bool zigzag) {
  auto buffer = ToDevice(std::vector<char>(bytes_per_rank * comm.size()));
  NSA_COMM_OK(buffer.status());
  std::vector<GatherRun> runs;
  const int chunks = zigzag ? 2 * comm.size() : comm.size();
  const int64_t chunk = bytes_per_rank * comm.size() / chunks;
  for (int i = 0; i < chunks; ++i) {
    runs.push_back({i < comm.size() ? i : chunks - 1 - i, i * chunk, chunk});
  }
  auto ms = Time(comm, [&](cudaEvent_t begin, cudaEvent_t end) -> absl::Status {
    NSA_COMM_OK(comm.AllGather(buffer->get(), runs, nullptr));
    NSA_NCCL_CUDA_OK(cudaEventRecord(begin, nullptr));
    for (int i = 0; i < kRepeats; ++i) {
      NSA_COMM_OK(comm.AllGather(buffer->get(), runs, nullptr));
    }
    NSA_NCCL_CUDA_OK(cudaEventRecord(end, nullptr));
    return absl::OkStatus();
  });
  NSA_COMM_OK(ms.status());
  if (comm.rank() == 0) {
    std::printf("all-gather %s %9d B a rank: %8.1f us %7.1f GB/s\n", zigzag ? "zig-zag" : "by rank",
                static_cast<int>(bytes_per_rank), *ms * 1e3 / kRepeats,
                bytes_per_rank * (comm.size() - 1) * kRepeats / *ms * 1e-6);
  }
  return absl::OkStatus();
}

absl::Status RunRank(int rank, int size, int port) {
  for (const auto& [ctas, warps] :
       std::vector<std::pair<int, int>>{{16, 4}, {16, 8}, {16, 16}, {32, 4}, {32, 8}, {32, 16}}) {
    NcclOptions options;
    options.gather_ctas = ctas;
    options.gather_warps = warps;
    auto comm = nccl::CreateOnThisHost(absl::StrCat(ctas, "x", warps), rank, size, port, options);
    NSA_COMM_OK(comm.status());
    const std::string label = absl::StrFormat("%2d CTAs x %2d warps", ctas, warps);
    for (int64_t record_bytes : {1024, 4096, 16384, 32768}) {
      NSA_COMM_OK(TimeGather(**comm, record_bytes, kGatherBytes, label));
    }
    for (int64_t num_bytes : {128 << 10, 2 << 20}) {
      NSA_COMM_OK(TimeGather(**comm, 32768, num_bytes, label));
    }
    NSA_COMM_OK((*comm)->Barrier());
    if (ctas != 32 || warps != 16) continue;
    NSA_COMM_OK(TimeEpoch(**comm));
    for (int64_t bytes : {4 << 10, 256 << 10, 1 << 20, 16 << 20, 64 << 20}) {
      NSA_COMM_OK(TimeAllGather(**comm, bytes, false));
      NSA_COMM_OK(TimeAllGather(**comm, bytes, true));
    }
    NSA_COMM_OK((*comm)->Barrier());
  }
  std::fflush(stdout);
  return absl::OkStatus();
}

int Main() {
  const int size = std::min(nccl::CountGpus(), 8);
  if (size < 1) {
    std::fprintf(stderr, "no GPU\n");
    return 1;
  }
  std::printf("%d GPUs, GB/s received by each\n", size);
  std::fflush(stdout);
  const int port = conformance::FreePort();
  const absl::Status status =
      conformance::RunOnProcesses(size, [&](int rank) { return RunRank(rank, size, port); });
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace nsa::comm

int main() { return nsa::comm::Main(); }
