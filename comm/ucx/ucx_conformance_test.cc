// The conformance suite over UCX, each rank a process.
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/conformance/check.h"
#include "comm/conformance/conformance.h"
#include "comm/conformance/fake_memory.h"
#include "comm/conformance/launch.h"
#include "comm/ucx/test_group.h"
#include "comm/ucx/ucx_communicator.h"
#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

using ucx::CreateOnThisHost;
using ucx::Transport;
using ucx::Transports;

using Case = std::tuple<Transport, conformance::Test, int /*size*/>;

class UcxConformance : public testing::TestWithParam<Case> {};

TEST_P(UcxConformance, Passes) {
  const auto& [transport, test, size] = GetParam();
  const int port = conformance::FreePort();
  const auto run = [&, &transport = transport, &test = test, size = size](int rank) {
    int created = 0;
    const auto create = [&](absl::Duration timeout) {
      return CreateOnThisHost(transport, rank, size, port, ++created, timeout);
    };
    return test.run({rank, size, create});
  };
  EXPECT_EQ(conformance::RunOnProcesses(size, run), absl::OkStatus());
}

std::vector<Case> Cases() {
  std::vector<Transport> transports = Transports();
  // Of a device that is not there.
  transports.push_back({"Staged", "sm,tcp,self", [](int /*rank*/) {
                          return conformance::MakeFakeMemory(int64_t{1} << 30);
                        }});
  std::vector<Case> cases;
  const auto add = [&](const std::vector<conformance::Test>& tests, std::vector<int> sizes) {
    for (const Transport& transport : transports) {
      for (const conformance::Test& test : tests) {
        for (int size : sizes) {
          if (size >= test.min_size) cases.emplace_back(transport, test, size);
        }
      }
    }
  };
  add(conformance::CollectiveTests(), {1, 2, 4});
  add(conformance::WindowTests(), {1, 2, 4});
  add(conformance::ErrorTests(), {1, 3});
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, UcxConformance, testing::ValuesIn(Cases()), [](const auto& info) {
  return absl::StrCat(std::get<0>(info.param).name, "_", std::get<1>(info.param).name, "_",
                      std::get<2>(info.param), "ranks");
});

// A rank that cannot start says why, and the others hear it instead of waiting for it.
TEST(UcxCommunicatorTest, UnknownTransportFailsAllRanks) {
  const int port = conformance::FreePort();
  const auto run = [&](int rank) -> absl::Status {
    const Transport transport = {"", rank == 1 ? "carrier_pigeon" : "tcp,self"};
    const absl::Status status =
        CreateOnThisHost(transport, rank, 2, port, 0, absl::Seconds(30)).status();
    const auto code =
        rank == 1 ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kUnavailable;
    return conformance::HasError(status, code, "'carrier_pigeon'");
  };
  EXPECT_EQ(conformance::RunOnProcesses(2, run), absl::OkStatus());
}

TEST(UcxCommunicatorTest, PollingEndsAtTheDeadline) {
  const int port = conformance::FreePort();
  const auto run = [&](int rank) -> absl::Status {
    TcpBootstrapOptions meeting;
    meeting.rank = rank;
    meeting.world_size = 2;
    meeting.master_addr = "127.0.0.1";
    meeting.master_port = port;
    auto bootstrap = CreateTcpBootstrap(meeting);
    NSA_COMM_OK(bootstrap.status());
    UcxOptions options;
    options.timeout = absl::Seconds(1);
    options.poll_time = absl::Seconds(20);
    auto comm = UcxCommunicator::Create(*std::move(bootstrap), options);
    NSA_COMM_OK(comm.status());
    const absl::Time start = absl::Now();
    if (rank == 1) {
      while ((*comm)->HealthCheck().ok() && absl::Now() - start < absl::Seconds(10)) {
        absl::SleepFor(absl::Milliseconds(5));
      }
      return absl::OkStatus();
    }
    NSA_COMM_FAILS((*comm)->Barrier(), absl::StatusCode::kDeadlineExceeded, "waited 1s for rank 1");
    NSA_COMM_CHECK(absl::Now() - start < absl::Seconds(5), "long before it has polled");
    return absl::OkStatus();
  };
  EXPECT_EQ(conformance::RunOnProcesses(2, run), absl::OkStatus());
}

TEST(UcxCommunicatorTest, ChecksOptions) {
  const absl::Status status = UcxCommunicator::Create(nullptr).status();
  EXPECT_EQ(status, absl::InvalidArgumentError("bootstrap: null; must be connected"));
}

}  // namespace
}  // namespace nsa::comm
