#include "comm/loopback/loopback.h"

#include <map>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "comm/conformance/check.h"
#include "comm/conformance/conformance.h"
#include "comm/conformance/launch.h"
#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

using conformance::Context;

// Makes a group when the first rank asks for its k-th communicator, and hands out the rest.
class Dispenser {
 public:
  explicit Dispenser(int size) : size_(size), asked_(size, 0) {}

  absl::StatusOr<std::unique_ptr<Communicator>> Take(int rank, absl::Duration timeout) {
    absl::MutexLock lock(&mu_);
    auto& group = groups_[asked_[rank]++];
    if (group.empty()) {
      auto made = LoopbackGroup::Create(size_, {timeout});
      if (!made.ok()) return made.status();
      group = *std::move(made);
    }
    return std::move(group[rank]);
  }

 private:
  const int size_;
  absl::Mutex mu_;
  std::vector<int> asked_;
  std::map<int, std::vector<std::unique_ptr<Communicator>>> groups_;
};

class LoopbackConformance
    : public testing::TestWithParam<std::tuple<conformance::Test, int /*size*/>> {};

TEST_P(LoopbackConformance, Passes) {
  const auto& [test, size] = GetParam();
  Dispenser dispenser(size);
  EXPECT_EQ(conformance::RunOnThreads(size,
                                      [&, &test = test, size = size](int rank) {
                                        return test.run({rank, size, [&](absl::Duration timeout) {
                                                           return dispenser.Take(rank, timeout);
                                                         }});
                                      }),
            absl::OkStatus());
}

std::vector<std::tuple<conformance::Test, int>> Cases() {
  std::vector<std::tuple<conformance::Test, int>> cases;
  const auto add = [&](const std::vector<conformance::Test>& tests, std::vector<int> sizes) {
    for (const conformance::Test& test : tests) {
      for (int size : sizes) {
        if (size >= test.min_size) cases.emplace_back(test, size);
      }
    }
  };
  add(conformance::CollectiveTests(), {1, 2, 3, 5, 8});
  add(conformance::WindowTests(), {1, 2, 3, 5, 8});
  add(conformance::ErrorTests(), {1, 2, 5});  // these wait for deadlines
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, LoopbackConformance, testing::ValuesIn(Cases()),
                         [](const auto& info) {
                           return absl::StrCat(std::get<0>(info.param).name, "_",
                                               std::get<1>(info.param), "ranks");
                         });

TEST(LoopbackWindowTest, ReachesAllPeers) {
  auto group = LoopbackGroup::Create(3);
  ASSERT_TRUE(group.ok()) << group.status();
  EXPECT_EQ(conformance::RunOnThreads(3,
                                      [&](int rank) -> absl::Status {
                                        auto window = (*group)[rank]->CreateWindow(64);
                                        NSA_COMM_OK(window.status());
                                        for (int peer = 0; peer < 3; ++peer) {
                                          NSA_COMM_CHECK((*window)->PeerData(peer) != nullptr,
                                                         peer);
                                        }
                                        return absl::OkStatus();
                                      }),
            absl::OkStatus());
}

TEST(LoopbackGroupTest, RejectsBadSize) {
  const absl::Status status = LoopbackGroup::Create(0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(status.message(), "size: 0; must be >= 1");
}

}  // namespace
}  // namespace nsa::comm
