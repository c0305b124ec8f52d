// Engines that share memory: what is taken, what is refused, and what an error leaves. That results
// stay the same is tests/backward/shared_memory_test.cc's.
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "nsa/engine_testlib.h"
#include "tests/testing/delegating_kernels.h"

namespace nsa {
namespace {

using ::testing::HasSubstr;

class Counting : public test::DelegatingKernels {
 public:
  using DelegatingKernels::DelegatingKernels;
  absl::StatusOr<std::unique_ptr<kernels::Memory>> Allocate(int64_t num_bytes) override {
    ++num_allocated;
    return DelegatingKernels::Allocate(is_out ? num_bytes << 30 : num_bytes);
  }
  int num_allocated = 0;
  bool is_out = false;
};

class EngineMemoryTest : public EngineTest {
 protected:
  void SetUp() override {
    EngineTest::SetUp();
    for (Rank& rank : ranks_) {
      rank.options.has_backward = true;
      counting_.push_back(std::make_shared<Counting>(rank.kernels));
      rank.kernels = counting_.back();
    }
    Create();
    for (Rank& rank : ranks_) {
      ASSERT_TRUE(rank.create_status.ok()) << rank.create_status;
      first_.push_back(std::move(rank.engine));
      rank.memory_of = first_.back().get();
    }
  }
  int NumAllocated() const {
    int sum = 0;
    for (const auto& counting : counting_) sum += counting->num_allocated;
    return sum;
  }
  void CreateOf(int64_t num_tokens) {
    for (Rank& rank : ranks_) rank.num_tokens = num_tokens;
    Create();
  }
  // In which the first engines made the memory.
  std::vector<absl::Status> ForwardOfFirst() {
    return CallOnEachRank([&](Rank& rank) {
      return first_[rank.rank]->Forward(rank.inputs, rank.outputs, /*stream=*/nullptr);
    });
  }

  std::vector<std::shared_ptr<Counting>> counting_;
  std::vector<std::unique_ptr<Engine>> first_;
};

TEST_F(EngineMemoryTest, PlansThatNeedNoMoreTakeListsAlone) {
  int before = NumAllocated();
  CreateOf(kTokens / 2);
  EXPECT_EQ(NumAllocated(), before + kRanks);
  for (const absl::Status& status : Forward()) EXPECT_TRUE(status.ok()) << status;
  // Those of an engine that is gone serve the next.
  before = NumAllocated();
  for (Rank& rank : ranks_) rank.engine.reset();
  CreateOf(kTokens / 2 - 1);
  EXPECT_EQ(NumAllocated(), before);
  // More is taken once: with some to spare.
  CreateOf(2 * kTokens);
  EXPECT_GT(NumAllocated(), before);
  for (Rank& rank : ranks_) rank.engine.reset();
  before = NumAllocated();
  CreateOf(2 * kTokens + 3);
  EXPECT_EQ(NumAllocated(), before);
  for (const absl::Status& status : Forward()) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(EngineMemoryTest, MemoryOutlivesTheEngineThatTookIt) {
  CreateOf(kTokens - 1);
  first_.clear();
  for (const absl::Status& status : Forward()) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(EngineMemoryTest, MustBeTheSameOnAllRanks) {
  ranks_[1].memory_of = nullptr;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument, "memory_of: rank 1 has 0, rank 0 has ");
  // Another memory on one rank.
  for (Rank& rank : ranks_) rank.memory_of = nullptr;
  Create();
  for (Rank& rank : ranks_) {
    ASSERT_TRUE(rank.create_status.ok()) << rank.create_status;
    rank.memory_of = first_[rank.rank].get();
  }
  const std::unique_ptr<Engine> other = std::move(ranks_[2].engine);
  ranks_[2].memory_of = other.get();
  ExpectCreateFails(absl::StatusCode::kInvalidArgument, "memory_of: rank 2 has ");
}

TEST_F(EngineMemoryTest, MustBeOfTheSameKernels) {
  ranks_[1].kernels = std::make_shared<Counting>(ranks_[1].kernels);
  ExpectCreateFails(absl::StatusCode::kInvalidArgument,
                    "rank 1: memory_of: must be an engine of the same communicator and kernels");
}

TEST_F(EngineMemoryTest, LackOfMemoryLeavesTheOthersAsTheyWere) {
  CreateOf(kTokens);  // inputs
  counting_[1]->is_out = true;
  for (Rank& rank : ranks_) rank.num_tokens = 3 * kTokens;
  std::vector<std::unique_ptr<Engine>> engines;
  for (Rank& rank : ranks_) engines.push_back(std::move(rank.engine));
  ExpectCreateFails(absl::StatusCode::kResourceExhausted, "rank 1: ");
  counting_[1]->is_out = false;
  for (const absl::Status& status : ForwardOfFirst()) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(EngineMemoryTest, StatisticsAreOfTheLastCallInTheMemory) {
  EXPECT_EQ(first_[0]->LastStats().status().code(), absl::StatusCode::kFailedPrecondition);
  CreateOf(kTokens);
  for (const absl::Status& status : ForwardOfFirst()) ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(first_[0]->LastStats().ok());
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(ranks_[0].engine->LastStats().ok());
  const absl::Status status = first_[0]->LastStats().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("another in its memory"));
}

TEST_F(EngineMemoryTest, ARankWithoutBlocksCountsNothingThatOthersLeft) {
  CreateOf(4 * kTokens);
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  for (Rank& rank : ranks_) rank.sharding = "0,100,100";
  CreateOf(kTokens);
  const auto forward_and_backward = [](Rank& rank) -> absl::Status {
    const auto saved = rank.engine->CreateSavedForward();
    if (!saved.ok()) return saved.status();
    const absl::Status forward =
        rank.engine->Forward(rank.inputs, rank.outputs, /*stream=*/nullptr, saved->get());
    if (!forward.ok()) return forward;
    return rank.engine->Backward(rank.inputs, rank.d_o, **saved, rank.gradients);
  };
  for (const absl::Status& status : CallOnEachRank(forward_and_backward)) {
    ASSERT_TRUE(status.ok()) << status;
  }
  const absl::StatusOr<RankStats> stats = ranks_[0].engine->LastStats();
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(stats->block_gradients_received(), 0);
}

TEST_F(EngineMemoryTest, SavedForwardsInMemoryOfTheCaller) {
  Engine& engine = *first_[0];
  alignas(64) static char memory[1 << 20];
  ASSERT_LE(engine.SavedForwardBytes(), int64_t{sizeof(memory)});
  EXPECT_GT(engine.SavedForwardBytes({.keep_blocks = true}), engine.SavedForwardBytes());
  EXPECT_LT(engine.SavedForwardBytes({.keep_summaries = false}), engine.SavedForwardBytes());
  const int before = NumAllocated();
  // Of one rank alone.
  const auto saved = engine.CreateSavedForward({.memory = memory});
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_EQ((*saved)->num_bytes(), engine.SavedForwardBytes());
  EXPECT_EQ(NumAllocated(), before);
  EXPECT_THAT(engine.CreateSavedForward({.memory = memory + 8}).status().ToString(),
              HasSubstr("INVALID_ARGUMENT: memory: must be aligned to 64 bytes"));
}

}  // namespace
}  // namespace nsa
