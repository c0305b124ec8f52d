#include "benchmarks/in_place_communicator.h"

#include <array>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/engine.h"

namespace nsa::benchmarks {
namespace {

// Brings a byte of every rank to every rank, in the three ways of a forward.
class Mover {
 public:
  explicit Mover(InPlaceCommunicator& communicator)
      : communicator_(communicator), window_(*communicator.CreateWindow(1)) {}

  absl::Status Move(char mine) {
    const int rank = communicator_.rank();
    const int other = 1 - rank;
    gathered_[rank] = mine;
    const std::array<comm::GatherRun, 2> runs = {{{0, 0, 1}, {1, 1, 1}}};
    if (auto status = communicator_.AllGather(gathered_.data(), runs, nullptr); !status.ok()) {
      return status;
    }
    const comm::SendOp send = {other, &mine, 1};
    const comm::RecvOp receive = {other, &received_, 1};
    if (auto status = communicator_.Exchange({&send, 1}, {&receive, 1}, nullptr); !status.ok()) {
      return status;
    }
    if (auto status = window_->BeginWrite(nullptr); !status.ok()) return status;
    *static_cast<char*>(window_->data()) = mine;
    if (auto status = window_->Publish(nullptr); !status.ok()) return status;
    const int32_t peer = other, count = 1;
    const int64_t offset = 0;
    if (auto status = window_->Gather({&peer, &offset, &count, 1}, 1, &read_, nullptr);
        !status.ok()) {
      return status;
    }
    return window_->Release(nullptr);
  }

  // What came from the other rank.
  std::array<char, 3> Remote() const {
    return {gathered_[1 - communicator_.rank()], received_, read_};
  }

 private:
  InPlaceCommunicator& communicator_;
  const std::unique_ptr<comm::Window> window_;
  std::array<char, 2> gathered_ = {};
  char received_ = 0;
  char read_ = 0;
};

TEST(InPlaceCommunicatorTest, KeepsWhatTheCallBeforeBrought) {
  auto group = comm::LoopbackGroup::Create(2);
  ASSERT_TRUE(group.ok()) << group.status();
  std::vector<std::thread> threads;
  for (auto& loopback : *group) {
    threads.emplace_back([communicator = InPlaceCommunicator(std::move(loopback))]() mutable {
      Mover mover(communicator);
      const char mine = communicator.rank() == 0 ? 'a' : 'b';
      const char theirs = communicator.rank() == 0 ? 'b' : 'a';
      EXPECT_TRUE(mover.Move(mine).ok());
      EXPECT_EQ(mover.Remote(), (std::array<char, 3>{theirs, theirs, theirs}));

      ASSERT_TRUE(communicator.Barrier().ok());  // the other rank has read what it reads
      communicator.set_data_in_place(true);
      EXPECT_TRUE(mover.Move('x').ok());
      EXPECT_EQ(mover.Remote(), (std::array<char, 3>{theirs, theirs, theirs}));
      EXPECT_EQ(communicator.HostAllGather(std::string(1, mine))->size(), 2u);

      communicator.set_data_in_place(false);
      EXPECT_TRUE(mover.Move('y').ok());
      EXPECT_EQ(mover.Remote(), (std::array<char, 3>{'y', 'y', 'y'}));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// What the forward needs of other ranks is in place after a call, whatever it does to bring it.
TEST(InPlaceCommunicatorTest, AForwardGivesTheSameBits) {
  constexpr int kRanks = 2;
  const NsaConfig config = {
      .num_q_heads = 4, .num_kv_heads = 2, .head_dim_qk = 64, .head_dim_v = 64};
  const ShardPlan plan = *ShardPlan::Parse("zigzag", 4096, kRanks);
  auto group = comm::LoopbackGroup::Create(kRanks);
  ASSERT_TRUE(group.ok()) << group.status();
  std::vector<std::thread> threads;
  for (auto& loopback : *group) {
    threads.emplace_back([&config, &plan, &loopback] {
      auto communicator = std::make_shared<InPlaceCommunicator>(std::move(loopback));
      const int64_t tokens = plan.TokensOfRank(communicator->rank());
      std::mt19937 random(communicator->rank());
      std::normal_distribution<float> normal;
      const auto draw = [&](int64_t heads, int64_t dim) {
        std::vector<float> values(tokens * heads * dim);
        for (float& value : values) value = normal(random);
        return values;
      };
      const std::vector<float> q = draw(4, 64), k = draw(2, 64), v = draw(2, 64), gate = draw(4, 3);
      std::vector<float> o(q.size());
      ForwardInputs inputs;
      inputs.q = ConstTensor(q.data(), DType::kF32, {tokens, 4, 64});
      inputs.SetSharedKv(ConstTensor(k.data(), DType::kF32, {tokens, 2, 64}),
                         ConstTensor(v.data(), DType::kF32, {tokens, 2, 64}));
      inputs.gate = ConstTensor(gate.data(), DType::kF32, {tokens, 4, 3});
      ForwardOutputs outputs;
      outputs.o = Tensor(o.data(), DType::kF32, {tokens, 4, 64});
      auto engine = Engine::Create({.config = config, .dtype = DType::kF32}, plan, communicator,
                                   *kernels::CpuKernels::Create({}));
      ASSERT_TRUE(engine.ok()) << engine.status();

      std::vector<float> first;
      for (bool in_place : {false, true, false, true}) {
        o.assign(o.size(), std::numeric_limits<float>::quiet_NaN());
        ASSERT_TRUE(communicator->Barrier().ok());
        communicator->set_data_in_place(in_place);
        const absl::Status status = (*engine)->Forward(inputs, outputs);
        ASSERT_TRUE(status.ok()) << status;
        if (first.empty()) first = o;
        EXPECT_EQ(o, first) << in_place;
        EXPECT_GT((*engine)->LastStats()->records_fetched(), 0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace nsa::benchmarks
