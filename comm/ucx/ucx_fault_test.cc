// Processes that are killed or stopped while others wait for them.
#include <signal.h>

#include <algorithm>
#include <functional>
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
  static absl::Status RunRank(const Case& parameters, int rank, int port, absl::Duration timeout,
                              const std::function<absl::Status(const absl::Status&)>& check) {
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
    NSA_COMM_OK(check(status));
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
    return RunRank(parameters, rank, port, absl::Seconds(30), [&](const absl::Status& status) {
      NSA_COMM_FAILS(status, absl::StatusCode::kUnavailable,
                     absl::StrCat("rank ", victim, " died"));
      NSA_COMM_CHECK(absl::Now() - start < absl::Seconds(10), "long before the deadline");
      return absl::OkStatus();
    });
  });
  Strike(parameters, SIGKILL, processes);
}

TEST_P(UcxFault, StoppedRankIsNamedAtTheDeadline) {
  const Case& parameters = GetParam();
  const auto& [transport, work, victim] = parameters;
  const int port = FreePort();
  Processes processes(kSize, [&, &work = work, victim = victim](int rank) {
    return RunRank(parameters, rank, port, absl::Seconds(1), [&](const absl::Status& status) {
      // Whoever comes to its deadline first may be gone before another does, which then hears of
      // it.
      NSA_COMM_FAILS(status, absl::StatusCode::kDeadlineExceeded, work.call);
      NSA_COMM_FAILS(status, status.code(), " waited 1s for rank");
      NSA_COMM_FAILS(status, status.code(), absl::StrCat(" ", victim));
      return absl::OkStatus();
    });
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

}  // namespace
}  // namespace nsa::comm
