// The conformance suite over UCX for device memory, each rank a process with a GPU.
#include <functional>
#include <string>
#include <vector>

#include "comm/conformance/conformance.h"
#include "comm/conformance/gpus.h"
#include "comm/conformance/launch.h"
#include "comm/cuda_memory.h"
#include "comm/ucx/test_group.h"
#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

struct Case {
  std::string name;
  std::function<std::vector<conformance::Test>()> tests;
};

class UcxCuda : public testing::TestWithParam<Case> {};

TEST_P(UcxCuda, Passes) {
  const int size = conformance::CountGpuRanks();
  if (size < 1) GTEST_SKIP() << "needs a GPU";
  const int port = conformance::FreePort();
  const ucx::Transport transport = {"Cuda", "sm,tcp,self", [](int rank) {
                                      return CreateCudaMemory(conformance::GpuOfRank(rank));
                                    }};
  const auto create = [&](const std::string& group, int rank, absl::Duration timeout) {
    return ucx::CreateOnThisHost(transport, rank, size, port, group, timeout);
  };
  EXPECT_EQ(conformance::RunTestsOnProcesses(GetParam().tests(), size, create), absl::OkStatus());
}

INSTANTIATE_TEST_SUITE_P(All, UcxCuda,
                         testing::Values(Case{"Collectives", conformance::CollectiveTests},
                                         Case{"Windows", conformance::WindowTests},
                                         Case{"Errors", conformance::ErrorTests}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nsa::comm
