// Processes that are killed or stopped while others wait for them.
#include <signal.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/conformance/check.h"
#include "comm/conformance/launch.h"
#include "comm/conformance/waits.h"
#include "comm/ucx/test_group.h"
#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

using conformance::FreePort;
using conformance::Notify;
using conformance::Processes;
using conformance::Wait;
using ucx::CreateOnThisHost;
using ucx::Transport;
using ucx::Transports;

constexpr int kSize = 3;

// What a rank does until the victim falls: `prepare` while all are well, `run` until it fails.
struct Work {
  std::string name;
  std::string call;  // in which a stopped victim is missed; empty: any
  std::function<absl::StatusOr<std::unique_ptr<conformance::PreparedWait>>(Communicator&)> prepare;
  bool victim_takes_part;
};

// Large transfers without end, so that the victim falls in the middle of one.
class Streaming final : public conformance::PreparedWait {
 public:
  using Step = std::function<absl::Status(Communicator&, Window&)>;
  Streaming(Communicator& comm, std::unique_ptr<Window> window, Step step)
      : comm_(comm), window_(std::move(window)), step_(std::move(step)) {}
  absl::Status Run(int /*absent*/) override {
    // A window in shared memory outlives its owner's standstill, hence the barriers.
    for (int i = 0;; ++i) {
      absl::Status status = step_(comm_, *window_);
      if (status.ok() && i % 8 == 7) status = comm_.Barrier();
      if (!status.ok()) return status;
    }
  }

 private:
  Communicator& comm_;
  const std::unique_ptr<Window> window_;
  const Step step_;
};

constexpr int64_t kStreamBytes = 8 << 20;

absl::Status StreamGather(Communicator& comm, Window& window) {
  constexpr int64_t kRecord = 16 << 10;
  std::vector<int32_t> peers;
  std::vector<int64_t> offsets;
  for (int64_t offset = kStreamBytes - kRecord; offset >= 0; offset -= kRecord) {
    for (int peer = 0; peer < comm.size(); ++peer) {
      peers.push_back(peer);
      offsets.push_back(offset);
    }
  }
  const int32_t count = static_cast<int32_t>(peers.size());
  std::vector<char> dst(count * kRecord);
  if (absl::Status s = window.BeginWrite(nullptr); !s.ok()) return s;
  if (absl::Status s = window.Publish(nullptr); !s.ok()) return s;
  if (absl::Status s = window.Gather({peers.data(), offsets.data(), &count, count}, kRecord,
                                     dst.data(), nullptr);
      !s.ok()) {
    return s;
  }
  return window.Release(nullptr);
}

absl::Status StreamAllGather(Communicator& comm, Window& /*window*/) {
  std::vector<char> buffer(kStreamBytes * comm.size());
  std::vector<GatherRun> runs;
  for (int rank = 0; rank < comm.size(); ++rank) {
    runs.push_back({rank, rank * kStreamBytes, kStreamBytes});
  }
  return comm.AllGather(buffer.data(), runs, nullptr);
}

absl::Status StreamExchange(Communicator& comm, Window& /*window*/) {
  std::vector<std::vector<char>> buffers;
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  for (int peer = 0; peer < comm.size(); ++peer) {
    for (int64_t bytes : {kStreamBytes, int64_t{5000}}) {
      buffers.emplace_back(bytes);
      sends.push_back({peer, buffers.back().data(), bytes});
      buffers.emplace_back(bytes);
      recvs.push_back({peer, buffers.back().data(), bytes});
    }
  }
  return comm.Exchange(sends, recvs, nullptr);
}

std::vector<Work> Works() {
  std::vector<Work> works;
  for (const Wait& wait : conformance::Waits()) {
    works.push_back({wait.name, wait.call, wait.prepare, false});
  }
  const std::pair<std::string, Streaming::Step> steps[] = {{"StreamGather", StreamGather},
                                                           {"StreamAllGather", StreamAllGather},
                                                           {"StreamExchange", StreamExchange}};
  for (const auto& [name, step] : steps) {
    works.push_back({name, "",
                     [step = step](Communicator& comm)
                         -> absl::StatusOr<std::unique_ptr<conformance::PreparedWait>> {
                       auto window = comm.CreateWindow(kStreamBytes);
                       if (!window.ok()) return window.status();
                       return std::make_unique<Streaming>(comm, *std::move(window), step);
                     },
                     true});
  }
  return works;
}

using Case = std::tuple<Transport, Work, int /*victim*/>;

class UcxFault : public testing::TestWithParam<Case> {
 protected:
  // One rank of a group whose victim is about to get `signal`.
  static absl::Status RunRank(
      const Case& parameters, int rank, int port, absl::Duration timeout,
      const std::function<absl::Status(const absl::Status&, Communicator&)>& check) {
    const auto& [transport, work, victim] = parameters;
    auto comm = CreateOnThisHost(transport, rank, kSize, port, 0, timeout);
    NSA_COMM_OK(comm.status());
    auto prepared = work.prepare(**comm);
    NSA_COMM_OK(prepared.status());
    NSA_COMM_OK((*comm)->Barrier());
    Notify();
    if (rank == victim && !work.victim_takes_part) absl::SleepFor(absl::Seconds(60));
    const absl::Time start = absl::Now();
    const absl::Status status = (*prepared)->Run(victim);
    NSA_COMM_OK(check(status, **comm));
    NSA_COMM_CHECK(absl::Now() - start < timeout + absl::Seconds(5), "the wait was too long");
    NSA_COMM_CHECK((*comm)->HealthCheck() == status, "the error must stick");
    NSA_COMM_CHECK((*comm)->Barrier() == status, "the error must stick");
    const absl::Time end = absl::Now();
    prepared->reset();
    comm->reset();
    NSA_COMM_CHECK(absl::Now() - end < absl::Seconds(5), "the end was too long");
    return absl::OkStatus();
  }

  // Sends `signal` to the victim when all work, and expects the others to end well.
  static void Strike(const Case& parameters, int signal, Processes& processes) {
    const auto& [transport, work, victim] = parameters;
    for (int rank = 0; rank < kSize; ++rank) {
      ASSERT_TRUE(processes.AwaitNotify(rank, absl::Seconds(30)));
    }
    absl::SleepFor(absl::Milliseconds(30));
    processes.Signal(victim, signal);
    if (signal == SIGSTOP) {
      for (int rank = 0; rank < kSize; ++rank) {
        if (rank != victim) processes.Await(rank);
      }
      processes.Signal(victim, SIGKILL);
    }
    const auto results = processes.Join();
    for (int rank = 0; rank < kSize; ++rank) {
      if (rank == victim) {
        EXPECT_EQ(results[rank].signal, SIGKILL);
      } else {
        EXPECT_EQ(results[rank].status, absl::OkStatus()) << "rank " << rank;
      }
    }
  }
};

TEST_P(UcxFault, KilledRankIsNamedAtOnce) {
  const Case& parameters = GetParam();
  const int victim = std::get<2>(parameters);
  const int port = FreePort();
  Processes processes(kSize, [&](int rank) {
    const absl::Time start = absl::Now();
    const auto check = [&](const absl::Status& status, Communicator& comm) -> absl::Status {
      NSA_COMM_FAILS(status, absl::StatusCode::kUnavailable,
                     absl::StrCat("rank ", victim, " died"));
      NSA_COMM_CHECK(absl::Now() - start < absl::Seconds(10), "long before the deadline");
      NSA_COMM_CHECK(comm.LostRanks() == std::vector<int>{victim}, "the victim alone");
      return absl::OkStatus();
    };
    return RunRank(parameters, rank, port, absl::Seconds(30), check);
  });
  Strike(parameters, SIGKILL, processes);
}

TEST_P(UcxFault, StoppedRankIsNamedAtTheDeadline) {
  const Case& parameters = GetParam();
  const auto& [transport, work, victim] = parameters;
  const int port = FreePort();
  Processes processes(kSize, [&, &work = work, victim = victim](int rank) {
    const auto check = [&](const absl::Status& status, Communicator& comm) -> absl::Status {
      // Whoever comes to its deadline first may be gone before another does, which then hears of
      // it.
      NSA_COMM_FAILS(status, absl::StatusCode::kDeadlineExceeded, work.call);
      NSA_COMM_FAILS(status, status.code(), " waited 1s for rank");
      NSA_COMM_FAILS(status, status.code(), absl::StrCat(" ", victim));
      NSA_COMM_CHECK(comm.LostRanks().empty(), "late is not lost");
      return absl::OkStatus();
    };
    return RunRank(parameters, rank, port, absl::Seconds(1), check);
  });
  Strike(parameters, SIGSTOP, processes);
}

std::vector<Case> Cases() {
  std::vector<Case> cases;
  for (const Transport& transport : Transports()) {
    for (const Work& work : Works()) {
      // Rank 0 is the middle of the control plane.
      for (int victim : {0, kSize - 1}) cases.emplace_back(transport, work, victim);
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, UcxFault, testing::ValuesIn(Cases()), [](const auto& info) {
  return absl::StrCat(std::get<0>(info.param).name, "_", std::get<1>(info.param).name, "_victim",
                      std::get<2>(info.param));
});

// A rank that loses its peers one by one knows which, and keeps their windows.
class UcxLoss : public testing::TestWithParam<Transport> {};

TEST_P(UcxLoss, MemoryOfTheDeadStays) {
  const bool reachable = GetParam().name == "SharedMemory";
  constexpr int64_t kBytes = 1 << 20;
  const int port = FreePort();
  const auto run = [&](int rank) -> absl::Status {
    auto comm = CreateOnThisHost(GetParam(), rank, kSize, port, 0, absl::Seconds(30));
    NSA_COMM_OK(comm.status());
    auto window = (*comm)->CreateWindow(kBytes);
    NSA_COMM_OK(window.status());
    std::memset((*window)->data(), rank + 1, kBytes);
    NSA_COMM_OK((*comm)->Barrier());
    Notify();
    if (rank != 0) absl::SleepFor(absl::Seconds(60));
    for (int victim = 1; victim < kSize; ++victim) {
      std::vector<int> dead(victim);
      std::iota(dead.begin(), dead.end(), 1);
      const absl::Time start = absl::Now();
      while ((*comm)->LostRanks() != dead) {
        NSA_COMM_CHECK(absl::Now() - start < absl::Seconds(10), victim);
        absl::SleepFor(absl::Milliseconds(1));
      }
      NSA_COMM_FAILS((*comm)->HealthCheck(), absl::StatusCode::kUnavailable, "rank 1 died");
      for (int peer = 1; peer < kSize; ++peer) {
        const char* const data = static_cast<const char*>((*window)->PeerData(peer));
        NSA_COMM_CHECK((data != nullptr) == reachable, peer);
        if (!reachable) continue;
        NSA_COMM_CHECK(std::all_of(data, data + kBytes, [&](char c) { return c == peer + 1; }),
                       absl::StrCat("of rank ", peer, " after the death of ", victim));
      }
      Notify();
    }
    return absl::OkStatus();
  };
  Processes processes(kSize, run);
  for (int rank = 0; rank < kSize; ++rank) {
    ASSERT_TRUE(processes.AwaitNotify(rank, absl::Seconds(30)));
  }
  for (int victim = 1; victim < kSize; ++victim) {
    processes.Signal(victim, SIGKILL);
    if (!processes.AwaitNotify(0, absl::Seconds(30))) break;
  }
  EXPECT_EQ(processes.Join()[0].status, absl::OkStatus());
}

INSTANTIATE_TEST_SUITE_P(All, UcxLoss, testing::ValuesIn(Transports()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nsa::comm
