// Processes that are killed or stopped while others wait for them on their GPUs.
#include <cuda_runtime_api.h>
#include <signal.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/conformance/check.h"
#include "comm/conformance/gpus.h"
#include "comm/conformance/launch.h"
#include "comm/conformance/waits.h"
#include "comm/cuda_status.h"
#include "comm/nccl/test_group.h"
#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

using conformance::FreePort;
using conformance::Notify;
using conformance::PreparedWait;
using conformance::Processes;

// What a rank does until the victim falls.
struct Work {
  std::string name;
  std::function<absl::StatusOr<std::unique_ptr<PreparedWait>>(Communicator&)> prepare;
  bool victim_takes_part;
};

// All-gathers and gathers without end, so that the victim falls in the middle of one.
class Streaming final : public PreparedWait {
 public:
  Streaming(Communicator& comm, std::unique_ptr<Window> window)
      : comm_(comm), window_(std::move(window)) {}
  absl::Status Run(int /*absent*/) override {
    constexpr int64_t kRecord = 16 << 10;
    std::vector<int32_t> peers;
    std::vector<int64_t> offsets;
    for (int64_t offset = 0; offset < window_->num_bytes(); offset += kRecord) {
      for (int peer = 0; peer < comm_.size(); ++peer) {
        peers.push_back(peer);
        offsets.push_back(offset);
      }
    }
    const int32_t count = static_cast<int32_t>(peers.size());
    std::vector<char> dst(count * kRecord);
    std::vector<char> buffer(comm_.size() * kRecord);
    std::vector<GatherRun> runs;
    for (int rank = 0; rank < comm_.size(); ++rank) runs.push_back({rank, rank * kRecord, kRecord});
    while (true) {
      absl::Status status = window_->BeginWrite(nullptr);
      if (status.ok()) status = window_->Publish(nullptr);
      if (status.ok()) {
        status = window_->Gather({peers.data(), offsets.data(), &count, count}, kRecord, dst.data(),
                                 nullptr);
      }
      if (status.ok()) status = window_->Release(nullptr);
      if (status.ok()) status = comm_.AllGather(buffer.data(), runs, nullptr);
      if (!status.ok()) return status;
    }
  }

 private:
  Communicator& comm_;
  const std::unique_ptr<Window> window_;
};

std::vector<Work> Works() {
  std::vector<Work> works;
  for (const conformance::Wait& wait : conformance::Waits()) {
    if (wait.name == "Barrier" || wait.name == "BigAllGather" || wait.name == "Gather" ||
        wait.name == "BeginWrite") {
      works.push_back({wait.name, wait.prepare, false});
    }
  }
  works.push_back({"Stream",
                   [](Communicator& comm) -> absl::StatusOr<std::unique_ptr<PreparedWait>> {
                     auto window = comm.CreateWindow(4 << 20);
                     if (!window.ok()) return window.status();
                     return std::make_unique<Streaming>(comm, *std::move(window));
                   },
                   true});
  return works;
}

using Case = std::tuple<Work, int /*victim*/, int /*signal*/, bool /*use_windows*/>;

class NcclFault : public testing::TestWithParam<Case> {};

TEST_P(NcclFault, NamesTheVictim) {
  const auto& [work, victim, signal, use_windows] = GetParam();
  const int size = conformance::CountGpuRanks();
  if (size < 2) GTEST_SKIP() << "needs two GPUs";
  const int port = FreePort();
  const bool killed = signal == SIGKILL;
  const absl::Duration timeout = killed ? absl::Seconds(30) : absl::Seconds(1);
  Processes processes(
      size,
      [&, &work = work, victim = victim, use_windows = use_windows](int rank) -> absl::Status {
        NcclOptions options;
        options.timeout = timeout;
        options.use_windows = use_windows;
        auto inner = nccl::CreateOnThisHost("fault", rank, size, port, options);
        NSA_COMM_OK(inner.status());
        auto view = nccl::HostView(*std::move(inner));
        NSA_COMM_OK(view.status());
        std::unique_ptr<Communicator> comm = *std::move(view);
        auto prepared = work.prepare(*comm);
        NSA_COMM_OK(prepared.status());
        NSA_COMM_OK(comm->Barrier());
        Notify();
        if (rank == victim && !work.victim_takes_part) absl::SleepFor(absl::Seconds(60));
        const absl::Time start = absl::Now();
        const absl::Status status = (*prepared)->Run(victim);
        if (killed) {
          NSA_COMM_FAILS(status, absl::StatusCode::kUnavailable,
                         absl::StrCat("rank ", victim, " died"));
          NSA_COMM_CHECK(absl::Now() - start < absl::Seconds(10), "long before the deadline");
          NSA_COMM_CHECK(comm->LostRanks() == std::vector<int>{victim}, "the victim alone");
        } else {
          NSA_COMM_FAILS(status, absl::StatusCode::kDeadlineExceeded, " waited 1s for rank");
          NSA_COMM_FAILS(status, status.code(), absl::StrCat(" ", victim));
          NSA_COMM_CHECK(comm->LostRanks().empty(), "late is not lost");
        }
        NSA_COMM_CHECK(comm->HealthCheck() == status, "the error must stick");
        NSA_COMM_CHECK(comm->Barrier() == status, "the error must stick");
        const absl::Time end = absl::Now();
        prepared->reset();
        comm.reset();
        NSA_COMM_CHECK(absl::Now() - end < absl::Seconds(8), "the end was too long");
        return absl::OkStatus();
      });
  for (int rank = 0; rank < size; ++rank) {
    ASSERT_TRUE(processes.AwaitNotify(rank, absl::Seconds(40)));
  }
  absl::SleepFor(absl::Milliseconds(200));
  processes.Signal(victim, signal);
  if (!killed) {
    for (int rank = 0; rank < size; ++rank) {
      if (rank != victim) processes.Await(rank);
    }
    processes.Signal(victim, SIGKILL);
  }
  const auto results = processes.Join();
  for (int rank = 0; rank < size; ++rank) {
    if (rank == victim) {
      EXPECT_EQ(results[rank].signal, SIGKILL);
    } else {
      EXPECT_EQ(results[rank].status, absl::OkStatus()) << "rank " << rank;
    }
  }
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const Work& work : Works()) {
    for (int signal : {SIGKILL, SIGSTOP}) {
      // Rank 0 is the middle of the control plane.
      for (int victim : {0, 1}) cases.emplace_back(work, victim, signal, true);
    }
    if (work.name == "Barrier") continue;  // no use of windows
    for (int signal : {SIGKILL, SIGSTOP}) cases.emplace_back(work, 1, signal, false);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, NcclFault, testing::ValuesIn(Cases()), [](const auto& info) {
  return absl::StrCat(std::get<0>(info.param).name, "_victim", std::get<1>(info.param),
                      std::get<2>(info.param) == SIGKILL ? "_killed" : "_stopped",
                      std::get<3>(info.param) ? "" : "_packs");
});

// A rank that is left keeps the windows of the dead.
TEST(NcclLoss, MemoryOfTheDeadStays) {
  const int size = conformance::CountGpuRanks();
  if (size < 2) GTEST_SKIP() << "needs two GPUs";
  if (conformance::GpuRanksShareGpus()) GTEST_SKIP() << "needs a GPU for each rank";
  constexpr int64_t kBytes = 4 << 20;
  const int port = FreePort();
  Processes processes(size, [&](int rank) -> absl::Status {
    auto comm = nccl::CreateOnThisHost("loss", rank, size, port, {});
    NSA_COMM_OK(comm.status());
    auto window = (*comm)->CreateWindow(kBytes);
    NSA_COMM_OK(window.status());
    NSA_COMM_CUDA_OK(cudaMemset((*window)->data(), rank + 1, kBytes));
    NSA_COMM_CUDA_OK(cudaDeviceSynchronize());
    NSA_COMM_OK((*comm)->Barrier());
    Notify();
    if (rank == 1) absl::SleepFor(absl::Seconds(60));
    const absl::Time start = absl::Now();
    while ((*comm)->LostRanks() != std::vector<int>{1}) {
      NSA_COMM_CHECK(absl::Now() - start < absl::Seconds(10), "the death must be noticed");
      absl::SleepFor(absl::Milliseconds(1));
    }
    std::vector<char> got(kBytes);
    NSA_COMM_CUDA_OK(
        cudaMemcpy(got.data(), (*window)->PeerData(1), kBytes, cudaMemcpyDeviceToHost));
    NSA_COMM_CHECK(std::all_of(got.begin(), got.end(), [](char c) { return c == 2; }), "bytes");
    return absl::OkStatus();
  });
  for (int rank = 0; rank < size; ++rank) {
    ASSERT_TRUE(processes.AwaitNotify(rank, absl::Seconds(40)));
  }
  processes.Signal(1, SIGKILL);
  const auto results = processes.Join();
  for (int rank = 0; rank < size; ++rank) {
    if (rank == 1) continue;
    EXPECT_EQ(results[rank].status, absl::OkStatus()) << "rank " << rank;
  }
}

}  // namespace
}  // namespace nsa::comm
