// One rank on the first GPU, for tests of the forward as users run it: device memory, NCCL,
// streams.
#ifndef TESTS_FORWARD_CUDA_TESTING_H_
#define TESTS_FORWARD_CUDA_TESTING_H_

#include <memory>
#include <utility>

#include "comm/communicator.h"
#include "comm/conformance/launch.h"
#include "comm/nccl/test_group.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gpu_testing.h"
#include "tests/testing/sharded.h"

namespace nsa::test {

inline ShardPlan OneRank(const Problem& problem) {
  return *ShardPlan::Parse("contiguous", problem.num_tokens(), 1, problem.cu_seqlens);
}

class CudaRankTest : public ::testing::Test {
 protected:
  void SetUp() override {
    NSA_SKIP_WITHOUT_GPU();
    auto kernels = kernels::CudaKernels::Create();
    ASSERT_TRUE(kernels.ok()) << kernels.status();
    kernels_ = *std::move(kernels);
  }

  // Of a group of its own.
  std::shared_ptr<comm::Communicator> NewCommunicator() {
    auto communicator =
        comm::nccl::CreateOnThisHost("rank", 0, 1, comm::conformance::FreePort(), {});
    EXPECT_TRUE(communicator.ok()) << communicator.status();
    return communicator.ok() ? *std::move(communicator) : nullptr;
  }

  std::unique_ptr<RankForward> NewForward(const Problem& problem, const RunOptions& options = {}) {
    auto forward =
        RankForward::Create(problem, OneRank(problem), options, NewCommunicator(), kernels_);
    EXPECT_TRUE(forward.ok()) << forward.status();
    return forward.ok() ? *std::move(forward) : nullptr;
  }

  std::shared_ptr<kernels::Kernels> kernels_;
};

}  // namespace nsa::test

#endif  // TESTS_FORWARD_CUDA_TESTING_H_
