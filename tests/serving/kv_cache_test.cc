// Random schedules on several ranks as threads.
#include <atomic>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "tests/forward/backend.h"
#include "tests/serving/schedule.h"
#include "tests/serving/unreachable.h"

namespace nsa::test {
namespace {

constexpr int kRanks = 3;

class KvCacheTest : public BackendTest, public testing::WithParamInterface<Variant> {};

TEST_P(KvCacheTest, RandomSchedulesEqualAPlainCopy) {
  Variant variant = GetParam();
  // A GPU has no f32.
  if (TheBackend().dtypes.front() != DType::kF32 && variant.dtype == DType::kF32) {
    variant.dtype = DType::kBF16;
    variant.num_operations = 150;
  }
  const Universe universe(variant);
  auto group = comm::LoopbackGroup::Create(kRanks);
  ASSERT_TRUE(group.ok()) << group.status();
  std::atomic<int64_t> bytes_fetched = 0, exhausted = 0;
  std::vector<std::thread> threads;
  for (auto& communicator : *group) {
    threads.emplace_back([&, rank = std::shared_ptr(std::move(communicator))]() mutable {
      if (!variant.is_reachable) rank = std::make_shared<UnreachableCommunicator>(rank);
      auto kernels = TheBackend().make_kernels();
      ASSERT_TRUE(kernels.ok()) << kernels.status();
      const ScheduleCounts counts = RunSchedule(variant, universe, rank, *std::move(kernels));
      bytes_fetched += counts.bytes_fetched;
      exhausted += counts.exhausted;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(bytes_fetched > 0, !variant.is_reachable);
  if (variant.num_operations >= 1000) {
    EXPECT_GT(exhausted, 0);
  }
}

using Kind = reference::CompressorKind;
INSTANTIATE_TEST_SUITE_P(
    Caches, KvCacheTest,
    testing::Values(Variant{"Shared", DType::kF32, true, true, Kind::kMean, 1000},
                    Variant{"SharedMlp", DType::kBF16, true, true, Kind::kMlp, 300},
                    Variant{"OwnKvOfBranches", DType::kF32, false, true, Kind::kWeighted, 1000},
                    Variant{"Fetched", DType::kF32, true, false, Kind::kMean, 1000},
                    Variant{"FetchedOwnKv", DType::kF16, false, false, Kind::kLinear, 300}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nsa::test
