// A small group of ranks, each on a thread, whose arguments a test may spoil one by one.
#ifndef NSA_ENGINE_TESTLIB_H_
#define NSA_ENGINE_TESTLIB_H_

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/loopback/loopback.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/engine.h"

namespace nsa {

inline constexpr int kRanks = 3;
inline constexpr int64_t kTokens = 200;

inline NsaConfig SmallConfig() {
  NsaConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = config.head_dim_v = 64;
  config.num_selected_blocks = 3;
  config.window_tokens = 40;
  return config;
}

// What a rank passes to its calls.
struct Arguments {
  ForwardInputs inputs;
  ForwardOutputs outputs;
  SaveOptions save_options;
  SavedForward* saved = nullptr;
  ConstTensor d_o;
  Gradients gradients;
};

// What one rank does, with its own copies of everything that a test may spoil.
struct Rank : Arguments {
  explicit Rank(int rank) : rank(rank) { options.config = SmallConfig(); }

  int rank;
  EngineOptions options;
  std::string sharding = "contiguous";
  std::shared_ptr<comm::Communicator> communicator;
  std::shared_ptr<kernels::Kernels> kernels;
  int64_t num_tokens = kTokens;
  const Engine* memory_of = nullptr;
  absl::Status create_status;
  std::unique_ptr<Engine> engine;
  // Behind the arguments: dense, of the right shapes, once the engine exists.
  std::vector<std::vector<uint16_t>> memory;
  std::vector<float> gate;
  std::vector<std::vector<float>> gradient_memory;
  std::unique_ptr<SavedForward> own_saved;

  void Create() {
    auto plan = ShardPlan::Parse(sharding, num_tokens, kRanks);
    auto created = Engine::Create(options, *plan, communicator, kernels, memory_of);
    create_status = created.status();
    if (!created.ok()) return;
    engine = *std::move(created);
    const int64_t tokens = engine->shard_plan().TokensOfRank(rank);
    auto make = [&](int64_t heads) {
      memory.emplace_back(tokens * heads * 64, uint16_t{0x3c00});
      return Tensor(memory.back().data(), DType::kBF16, {tokens, heads, 64});
    };
    inputs.q = make(4);
    for (ConstTensor* t : {&inputs.k_cmp, &inputs.v_cmp, &inputs.k_slc, &inputs.v_slc,
                           &inputs.k_win, &inputs.v_win}) {
      *t = make(2);
    }
    gate.resize(tokens * 4 * 3, 0.5f);
    inputs.gate = ConstTensor(gate.data(), DType::kF32, {tokens, 4, 3});
    outputs.o = make(4);
    d_o = make(4);
    auto make_gradient = [&](int64_t heads, int64_t dim) {
      gradient_memory.emplace_back(tokens * heads * dim);
      return Tensor(gradient_memory.back().data(), DType::kF32, {tokens, heads, dim});
    };
    gradients.dq = make_gradient(4, 64);
    for (Tensor* t : {&gradients.dk_cmp, &gradients.dv_cmp, &gradients.dk_slc, &gradients.dv_slc,
                      &gradients.dk_win, &gradients.dv_win}) {
      *t = make_gradient(2, 64);
    }
    gradients.dgate = make_gradient(4, 3);
  }
};

class EngineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto group = comm::LoopbackGroup::Create(kRanks, {.timeout = absl::Seconds(20)});
    ASSERT_TRUE(group.ok()) << group.status();
    for (int r = 0; r < kRanks; ++r) {
      ranks_.emplace_back(r);
      ranks_.back().communicator = std::move((*group)[r]);
      ranks_.back().kernels = *kernels::CpuKernels::Create({.num_threads = 1});
    }
  }

  template <typename Do>
  void OnEachRank(Do action) {
    std::vector<std::thread> threads;
    for (Rank& rank : ranks_) threads.emplace_back([&rank, &action] { action(rank); });
    for (std::thread& thread : threads) thread.join();
  }
  void Create() {
    OnEachRank([](Rank& rank) { rank.Create(); });
  }
  template <typename Call>
  std::vector<absl::Status> CallOnEachRank(Call call) {
    std::vector<absl::Status> statuses(kRanks);
    OnEachRank([&](Rank& rank) { statuses[rank.rank] = call(rank); });
    return statuses;
  }
  std::vector<absl::Status> Forward() {
    return CallOnEachRank([](Rank& rank) {
      return rank.engine->Forward(rank.inputs, rank.outputs, /*stream=*/nullptr, rank.saved);
    });
  }
  void ExpectCreateFails(absl::StatusCode code, const std::string& part) {
    Create();
    for (const Rank& rank : ranks_) {
      EXPECT_EQ(rank.create_status.code(), code) << rank.create_status;
      EXPECT_THAT(std::string(rank.create_status.message()), ::testing::HasSubstr(part));
      EXPECT_EQ(rank.create_status, ranks_[0].create_status) << "the same on every rank";
    }
  }
  // Spoils the arguments of rank 1, expects that `call` fails everywhere alike, and that the engine
  // goes on afterwards.
  template <typename Call, typename Spoil>
  void ExpectFails(absl::StatusCode code, const std::string& part, Call call, Spoil spoil) {
    SCOPED_TRACE(part);
    const Arguments arguments = ranks_[1];
    spoil(ranks_[1]);
    const std::vector<absl::Status> statuses = call();
    for (const absl::Status& status : statuses) {
      EXPECT_EQ(status.code(), code) << status;
      EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr(part));
      EXPECT_EQ(status, statuses[0]) << "the same on every rank";
    }
    static_cast<Arguments&>(ranks_[1]) = arguments;
    for (const absl::Status& status : call()) EXPECT_TRUE(status.ok()) << status;
  }
  template <typename Spoil>
  void ExpectForwardFails(const std::string& part, Spoil spoil) {
    ExpectFails(
        absl::StatusCode::kInvalidArgument, part, [this] { return Forward(); }, spoil);
  }

  std::vector<Rank> ranks_;
};

}  // namespace nsa

#endif  // NSA_ENGINE_TESTLIB_H_
