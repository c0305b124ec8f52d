#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <memory>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/workers.h"

namespace nsa::kernels::cpu {
namespace {

TEST(ThreadPoolTest, RunsEachItemOnce) {
  for (int num_threads : {1, 2, 5}) {
    auto pool = ThreadPool::Create(num_threads);
    ASSERT_TRUE(pool.ok());
    EXPECT_EQ((*pool)->num_threads(), num_threads);
    for (int64_t count : {0, 1, 2, 3, 100}) {
      std::vector<std::atomic<int>> runs(count);
      (*pool)->ParallelFor(count, [&](int64_t item, int worker) {
        EXPECT_GE(worker, 0);
        EXPECT_LT(worker, std::min<int64_t>(num_threads, count));
        ++runs[item];
      });
      for (const auto& run : runs) EXPECT_EQ(run, 1);
    }
  }
}

// Short loops, so that threads wake when the loop that woke them is long over.
TEST(ThreadPoolTest, ManyShortLoops) {
  auto pool = ThreadPool::Create(4);
  ASSERT_TRUE(pool.ok());
  int64_t sum = 0;
  std::vector<int64_t> items(3);
  for (int i = 0; i < 3000; ++i) {
    (*pool)->ParallelFor(3, [&](int64_t item, int) { items[item] = item + i; });
    for (int64_t item : items) sum += item;
  }
  EXPECT_EQ(sum, 3000 * 3 + 3 * (2999 * 3000 / 2));
}

TEST(ThreadPoolTest, WorkersAreNeverShared) {
  auto pool = ThreadPool::Create(4);
  ASSERT_TRUE(pool.ok());
  std::vector<std::atomic<bool>> busy(4);
  (*pool)->ParallelFor(200, [&](int64_t, int worker) {
    EXPECT_FALSE(busy[worker].exchange(true));
    std::this_thread::yield();
    busy[worker] = false;
  });
}

TEST(WorkersTest, ScratchIsOfOneItemAtATime) {
  auto workers = Workers::Create(3);
  ASSERT_TRUE(workers.ok());
  for (int64_t count : {1, 2, 50}) {
    const int64_t bytes = 1000 * count;
    const absl::Status status = (*workers)->Run(count, bytes, [&](int64_t item, char* scratch) {
      std::fill(scratch, scratch + bytes, static_cast<char>(item));
      std::this_thread::yield();
      for (int64_t i = 0; i < bytes; ++i) ASSERT_EQ(scratch[i], static_cast<char>(item));
    });
    EXPECT_TRUE(status.ok());
  }
}

TEST(WorkersTest, ScratchThatCannotBeHad) {
  auto workers = Workers::Create(2);
  ASSERT_TRUE(workers.ok());
  const auto fail = [](int64_t, char*) { FAIL(); };
  EXPECT_EQ((*workers)->Run(2, int64_t{1} << 50, fail).code(),
            absl::StatusCode::kResourceExhausted);
  int runs = 0;
  EXPECT_TRUE((*workers)->Run(1, 64, [&](int64_t, char*) { ++runs; }).ok());
  EXPECT_EQ(runs, 1);
}

TEST(CarverTest, CountsWhatItCuts) {
  alignas(64) char memory[1024];
  Carver counting(nullptr), cutting(memory);
  EXPECT_EQ(counting.Take<float>(3), nullptr);
  EXPECT_EQ(counting.Take<char>(65), nullptr);
  EXPECT_EQ(counting.num_bytes(), 64 + 128);
  EXPECT_EQ(reinterpret_cast<char*>(cutting.Take<float>(3)), memory);
  EXPECT_EQ(cutting.Take<char>(65), memory + 64);
  EXPECT_EQ(cutting.num_bytes(), 64 + 128);
}

}  // namespace
}  // namespace nsa::kernels::cpu
