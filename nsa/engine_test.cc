// What goes wrong on one rank is an error on all of them, and none is left waiting.
#include <cmath>

#include "nsa/engine_testlib.h"
#include "tests/testing/delegating_kernels.h"

namespace nsa {
namespace {

using ::testing::HasSubstr;

TEST_F(EngineTest, DifferentConfigsAreAnErrorOnEveryRank) {
  ranks_[2].options.config.num_selected_blocks = 4;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument,
                    "num_selected_blocks: rank 2 has 4, rank 0 has 3");
}

TEST_F(EngineTest, DifferentDTypesAreAnErrorOnEveryRank) {
  ranks_[0].options.dtype = DType::kF32;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument, "dtype: rank 1 has bf16, rank 0 has f32");
}

TEST_F(EngineTest, DifferentPlansAreAnErrorOnEveryRank) {
  ranks_[1].sharding = "100,50,50";
  ExpectCreateFails(absl::StatusCode::kInvalidArgument,
                    "chunks[0]: rank 1 has tokens [0, 100) on rank 0, rank 0 has tokens [0, 67)");
}

TEST_F(EngineTest, InvalidConfigOfOneRankIsAnErrorOnEveryRank) {
  ranks_[1].options.config.softmax_scale = std::nanf("");
  ExpectCreateFails(absl::StatusCode::kInvalidArgument, "rank 1: config: softmax_scale = nan");
}

TEST_F(EngineTest, PlanForAnotherNumberOfRanks) {
  auto group = comm::LoopbackGroup::Create(1);
  ASSERT_TRUE(group.ok());
  const auto engine =
      Engine::Create({.config = SmallConfig()}, *ShardPlan::Parse("contiguous", kTokens, 2),
                     std::move((*group)[0]), ranks_[0].kernels);
  EXPECT_THAT(std::string(engine.status().message()),
              HasSubstr("num_ranks = 2: must be the communicator's 1"));
}

TEST_F(EngineTest, FetchBudgetOfOneRankIsTooSmall) {
  ranks_[2].options.fetch_budget_bytes = 1000;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument, "rank 2: fetch_budget_bytes = 1000");
}

TEST_F(EngineTest, OutOfMemoryOfOneRankIsAnErrorOnEveryRank) {
  class NoMemory : public test::DelegatingKernels {
   public:
    using DelegatingKernels::DelegatingKernels;
    absl::StatusOr<std::unique_ptr<kernels::Memory>> Allocate(int64_t num_bytes) override {
      return DelegatingKernels::Allocate(num_bytes << 30);
    }
  };
  ranks_[1].kernels = std::make_shared<NoMemory>(ranks_[1].kernels);
  ExpectCreateFails(absl::StatusCode::kResourceExhausted, "rank 1: ");
}

TEST_F(EngineTest, WrongTensorsOfOneRankAreAnErrorOnEveryRankAndTheEngineGoesOn) {
  Create();
  for (Rank& rank : ranks_) ASSERT_TRUE(rank.create_status.ok()) << rank.create_status;
  ExpectForwardFails("rank 1: q.shape = [67,4,32]: must be [67,4,64]",
                     [](Rank& r) { r.inputs.q.shape[2] = 32; });
  ExpectForwardFails("rank 1: k_slc.dtype = f16: must be bf16",
                     [](Rank& r) { r.inputs.k_slc.dtype = DType::kF16; });
  ExpectForwardFails("rank 1: v_win.data = null", [](Rank& r) { r.inputs.v_win.data = nullptr; });
  ExpectForwardFails("rank 1: gate.shape", [](Rank& r) { r.inputs.gate.shape = {67, 4}; });
  ExpectForwardFails("rank 1: o.data = null", [](Rank& r) { r.outputs.o.data = nullptr; });
  ExpectForwardFails("rank 1: k_cmp.strides[2] = 2",
                     [](Rank& r) { r.inputs.k_cmp.strides[2] = 2; });
  ExpectForwardFails("rank 1: v_cmp.data: must be aligned", [](Rank& r) {
    r.inputs.v_cmp.data = static_cast<const char*>(r.inputs.v_cmp.data) + 1;
  });
  ExpectForwardFails("branches that share k and v: rank 1 has {cmp slc win}",
                     [](Rank& r) { r.inputs.SetSharedKv(r.inputs.k_cmp, r.inputs.v_cmp); });
}

TEST_F(EngineTest, ARefusedCallLeavesNothingAndTakesNothing) {
  Create();
  const auto refused = [this] {
    const Arguments arguments = ranks_[1];
    ranks_[1].inputs.q = ConstTensor();
    for (const absl::Status& status : Forward()) {
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    }
    static_cast<Arguments&>(ranks_[1]) = arguments;
  };
  const Engine& engine = *ranks_[0].engine;
  refused();
  EXPECT_FALSE(engine.LastBlocks().is_there);
  EXPECT_EQ(ranks_[0].engine->LastStats().status().code(), absl::StatusCode::kFailedPrecondition);
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  refused();
  EXPECT_TRUE(engine.LastBlocks().is_there);
  const absl::StatusOr<RankStats> stats = ranks_[2].engine->LastStats();
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_GT(stats->records_fetched(), 0);
}

TEST_F(EngineTest, MissingAndWrongCompressorParameters) {
  for (Rank& rank : ranks_) rank.options.config.compressor = Compressor::kMlp;
  Create();
  std::vector<float> weights(1 << 20);
  auto params = [&weights](int64_t hidden) {
    auto tensor = [&weights](Dims shape) {
      return ConstTensor(weights.data(), DType::kF32, std::move(shape));
    };
    CompressorParams p;
    p.w1 = tensor({1, hidden, 32 * 64});
    p.b1 = tensor({1, hidden});
    p.w2 = tensor({1, 64, hidden});
    p.b2 = tensor({1, 64});
    return p;
  };
  for (Rank& rank : ranks_) rank.inputs.compress_k = rank.inputs.compress_v = params(8);
  ExpectForwardFails("rank 1: compress_k.w1.data = null",
                     [](Rank& r) { r.inputs.compress_k = {}; });
  ExpectForwardFails("rank 1: compress_v.b1.shape = [1,9]: must be [1,8]",
                     [&](Rank& r) { r.inputs.compress_v.b1 = params(9).b1; });
  ExpectForwardFails("rank 1: compress_v.w2.dtype = f16: must be f32",
                     [](Rank& r) { r.inputs.compress_v.w2.dtype = DType::kF16; });
  ExpectForwardFails("rank 1: compress_k.w1.shape[0] = 3: must be 1 or num_kv_heads = 2",
                     [](Rank& r) { r.inputs.compress_k.w1.shape[0] = 3; });
  ExpectForwardFails("rank 1: compress_k.weight: must be unset, the compressor does not use it",
                     [](Rank& r) { r.inputs.compress_k.weight = r.inputs.compress_k.b1; });
  ExpectForwardFails(
      "compress_k: rank 1 has shape[0] = 1, hidden width 16, no pe, "
      "rank 0 has shape[0] = 1, hidden width 8, no pe",
      [&](Rank& r) { r.inputs.compress_k = params(16); });
  ExpectForwardFails(
      "compress_v: rank 1 has shape[0] = 1, hidden width 8, pe, rank 0", [&](Rank& r) {
        r.inputs.compress_v.pe = ConstTensor(weights.data(), DType::kF32, {1, 32, 64});
      });
  ExpectForwardFails("compress_k: rank 1 has shape[0] = 2, ", [](Rank& r) {
    CompressorParams& p = r.inputs.compress_k;
    for (ConstTensor* tensor : {&p.w1, &p.b1, &p.w2, &p.b2}) {
      Dims shape = tensor->shape;
      shape[0] = 2;
      *tensor = ConstTensor(tensor->data, tensor->dtype, std::move(shape));
    }
  });
}

TEST_F(EngineTest, FailureOfOneRankInTheMiddleReachesTheOthersAtOnce) {
  class FailingWindow : public test::DelegatingKernels {
   public:
    using DelegatingKernels::DelegatingKernels;
    absl::Status AttendWindow(const kernels::AttendWindowParams&, void*) override {
      return absl::InternalError("the window kernel failed");
    }
  };
  ranks_[2].kernels = std::make_shared<FailingWindow>(ranks_[2].kernels);
  Create();
  const absl::Time begin = absl::Now();
  const std::vector<absl::Status> statuses = Forward();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  EXPECT_EQ(statuses[2].code(), absl::StatusCode::kInternal);
  // A rank may have finished before the failure; the next call tells it.
  const std::vector<absl::Status> next = Forward();
  for (int r : {0, 1}) {
    const absl::Status& status = statuses[r].ok() ? next[r] : statuses[r];
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("the window kernel failed"));
  }
}

// Waits and allocations would stop a GPU's host, and could not be captured in a graph.
TEST_F(EngineTest, AForwardNeitherWaitsNorAllocates) {
  class Counting : public test::DelegatingKernels {
   public:
    using DelegatingKernels::DelegatingKernels;
    absl::StatusOr<std::unique_ptr<kernels::Memory>> Allocate(int64_t num_bytes) override {
      ++num_calls;
      return DelegatingKernels::Allocate(num_bytes);
    }
    absl::Status Synchronize(void* stream) override {
      ++num_calls;
      return DelegatingKernels::Synchronize(stream);
    }
    absl::Status CopyToHost(void* dst, const void* src, int64_t num_bytes, void* stream) override {
      ++num_calls;
      return DelegatingKernels::CopyToHost(dst, src, num_bytes, stream);
    }
    int num_calls = 0;
  };
  const auto counting = std::make_shared<Counting>(ranks_[2].kernels);
  ranks_[2].kernels = counting;
  Create();
  const int before = counting->num_calls;
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(counting->num_calls, before);
  const absl::StatusOr<RankStats> stats = ranks_[2].engine->LastStats();
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_GT(counting->num_calls, before);
  EXPECT_GT(stats->records_fetched(), 0);
  EXPECT_EQ(stats->stages_size(), 0);
}

TEST_F(EngineTest, ArgumentsAreComparedOnceIfSoAsked) {
  std::vector<std::string> stages;
  for (Rank& rank : ranks_) rank.options.agree_in_every_call = false;
  ranks_[0].options.on_stage = [&stages](absl::string_view stage) {
    stages.push_back(std::string(stage));
  };
  Create();
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(stages.front(), "agree");
  stages.clear();
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(stages.front(), "halo");
  // Now a mistake of one rank alone ends in an error of all, and nobody waits for long.
  ranks_[1].inputs.q = ConstTensor();
  const absl::Time begin = absl::Now();
  const std::vector<absl::Status> statuses = Forward();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  EXPECT_EQ(statuses[1].code(), absl::StatusCode::kInvalidArgument);
  for (int r : {0, 2}) EXPECT_EQ(statuses[r].code(), absl::StatusCode::kAborted) << statuses[r];
}

TEST_F(EngineTest, WhenArgumentsAreComparedIsTheSameOnEveryRank) {
  ranks_[2].options.agree_in_every_call = false;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument,
                    "agree_in_every_call: rank 2 has false, rank 0 has true");
  // A rank without tokens does not see that the others go over to shared keys and values.
  for (Rank& rank : ranks_) {
    rank.options.agree_in_every_call = false;
    rank.sharding = "100,0,100";
  }
  Create();
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  for (Rank& rank : ranks_) rank.inputs.SetSharedKv(rank.inputs.k_cmp, rank.inputs.v_cmp);
  for (const absl::Status& status : Forward()) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(EngineTest, StagesAreAnnouncedInOrder) {
  std::vector<std::string> stages;
  ranks_[1].options.time_stages = true;
  ranks_[1].options.on_stage = [&stages](absl::string_view stage) {
    stages.push_back(std::string(stage));
  };
  Create();
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  EXPECT_THAT(stages, ::testing::ElementsAre("agree", "halo", "compress", "all-gather", "pack",
                                             "score+select", "fetch", "window", "attend+gate"));
  const absl::StatusOr<RankStats> stats = ranks_[1].engine->LastStats();
  ASSERT_TRUE(stats.ok()) << stats.status();
  ASSERT_EQ(stats->stages_size(), static_cast<int>(stages.size()));
  double end = 0;
  for (int i = 0; i < stats->stages_size(); ++i) {
    const StageSpan& span = stats->stages(i);
    EXPECT_EQ(span.stage(), stages[i]);
    EXPECT_GE(span.begin_seconds(), end);  // on a host, one after another
    EXPECT_GE(span.end_seconds(), span.begin_seconds());
    end = span.end_seconds();
  }
}

}  // namespace
}  // namespace nsa
