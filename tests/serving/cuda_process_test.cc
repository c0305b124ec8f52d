// Random schedules on ranks as processes with a GPU each, over NCCL, with pages read in place and
// fetched.
#include <memory>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "comm/conformance/gpus.h"
#include "comm/conformance/launch.h"
#include "comm/nccl/test_group.h"
#include "gtest/gtest.h"
#include "kernels/cuda/cuda_kernels.h"
#include "tests/serving/schedule.h"

namespace nsa::test {
namespace {

constexpr absl::Duration kLimit = absl::Seconds(240);  // of a group of processes

using Kind = reference::CompressorKind;

class CudaServingProcessTest : public testing::TestWithParam<Variant> {};

TEST_P(CudaServingProcessTest, RandomSchedulesEqualAPlainCopy) {
  const int num_ranks = comm::conformance::CountGpuRanks();
  if (num_ranks < 1) GTEST_SKIP() << "this host has no GPU";
  const Variant& variant = GetParam();
  const Universe universe(variant);
  for (int size : std::set<int>{1, num_ranks}) {
    if (!variant.is_reachable && size == 1) continue;  // a rank reaches itself
    const int port = comm::conformance::FreePort();
    const absl::Status status = comm::conformance::RunOnProcesses(
        size,
        [&](int rank) -> absl::Status {
          comm::NcclOptions options;
          options.use_windows = variant.is_reachable;
          auto communicator = comm::nccl::CreateOnThisHost(variant.name, rank, size, port, options);
          if (!communicator.ok()) return communicator.status();
          auto kernels =
              kernels::CudaKernels::Create({.device = comm::conformance::GpuOfRank(rank)});
          if (!kernels.ok()) return kernels.status();
          RunSchedule(variant, universe, *std::move(communicator), *std::move(kernels));
          return testing::Test::HasFailure()
                     ? absl::InternalError(absl::StrCat("rank ", rank, " failed; see above"))
                     : absl::OkStatus();
        },
        kLimit);
    EXPECT_TRUE(status.ok()) << size << " ranks: " << status;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Caches, CudaServingProcessTest,
    testing::Values(Variant{"Shared", DType::kBF16, true, true, Kind::kMean, 1000},
                    Variant{"OwnKvOfBranches", DType::kF16, false, true, Kind::kMlp, 300},
                    Variant{"Fetched", DType::kBF16, true, false, Kind::kMean, 300}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nsa::test
