#include "tools/launch/launch.h"

#include <atomic>

#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace nsa::tools {
namespace {

const char* EmptyEnvironment(const char*) { return nullptr; }

TEST(RunRanksTest, ThreadsAreRanks) {
  std::atomic<int> seen = 0;
  const absl::Status status = RunRanks({.backend = "loopback", .num_ranks = 3}, EmptyEnvironment,
                                       [&seen](const RankContext& context) {
                                         EXPECT_EQ(context.communicator->size(), 3);
                                         EXPECT_EQ(context.num_ranks_on_host, 3);
                                         seen += 1 << (4 * context.communicator->rank());
                                         return context.communicator->Barrier();
                                       });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(seen, 0x111);
}

TEST(RunRanksTest, OneRankIsTheDefault) {
  const absl::Status status = RunRanks({}, EmptyEnvironment, [](const RankContext& context) {
    EXPECT_EQ(context.communicator->size(), 1);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(RunRanksTest, AFailureEndsTheOthersWaits) {
  const absl::Time start = absl::Now();
  const absl::Status status =
      RunRanks({.num_ranks = 3}, EmptyEnvironment, [](const RankContext& context) {
        if (context.communicator->rank() == 1) return absl::DataLossError("bad input");
        return context.communicator->Barrier();
      });
  EXPECT_EQ(status, absl::DataLossError("bad input"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
}

TEST(RunRanksTest, NamesWhatIsWrong) {
  const auto never = [](const RankContext&) { return absl::InternalError("must not run"); };
  EXPECT_EQ(RunRanks({.num_ranks = -1}, EmptyEnvironment, never),
            absl::InvalidArgumentError("ranks = -1: must be 0 or more"));
  EXPECT_EQ(RunRanks({.backend = "telepathy"}, EmptyEnvironment, never),
            absl::InvalidArgumentError("backend = \"telepathy\": must be auto, loopback or ucx"));
  EXPECT_EQ(RunRanks({.backend = "ucx"}, EmptyEnvironment, never).code(),
            absl::StatusCode::kInvalidArgument);
  const auto mpirun = [](const char* name) {
    return absl::string_view(name) == "OMPI_COMM_WORLD_SIZE" ? "4" : nullptr;
  };
  EXPECT_EQ(RunRanks({.num_ranks = 3}, mpirun, never),
            absl::InvalidArgumentError("ranks = 3: must be 0 or the number of processes, 4"));
  EXPECT_EQ(RunRanks({.backend = "loopback"}, mpirun, never),
            absl::InvalidArgumentError("backend = \"loopback\": makes all ranks in one process, "
                                       "but this is one of 4 processes"));
  const auto torchrun = [](const char* name) {
    return absl::string_view(name) == "WORLD_SIZE" ? "2" : nullptr;
  };
  EXPECT_EQ(RunRanks({}, torchrun, never).code(), absl::StatusCode::kInvalidArgument);
}

TEST(ThreadsPerRankTest, SharesTheCores) {
  EXPECT_EQ(ThreadsPerRank(7, 3), 7);
  EXPECT_GE(ThreadsPerRank(0, 1), 1);
  EXPECT_EQ(ThreadsPerRank(0, 1 << 20), 1);
}

}  // namespace
}  // namespace nsa::tools
