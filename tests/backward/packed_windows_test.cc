// Where ranks cannot load each other's memory, a rank serves what others gather only in its own
// Gather and Release (comm/communicator.h). So no other collective may come in between, on any
// rank, however many records each of them gathers. A communicator that insists on it.
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/testing/gradient_check.h"
#include "tests/testing/sharded_backward.h"

namespace nsa::test {
namespace {

// Every Gather of some records, and every Release, is one or more rounds that all ranks take part
// in by the one or the other.
class RoundsCommunicator final : public comm::Communicator {
 public:
  explicit RoundsCommunicator(std::shared_ptr<comm::Communicator> to) : to_(std::move(to)) {}

  int rank() const override { return to_->rank(); }
  int size() const override { return to_->size(); }
  absl::Duration timeout() const override { return to_->timeout(); }
  absl::Status AllGather(void* buffer, absl::Span<const comm::GatherRun> runs,
                         void* stream) override {
    return to_->AllGather(buffer, runs, stream);
  }
  absl::Status Exchange(absl::Span<const comm::SendOp> sends, absl::Span<const comm::RecvOp> recvs,
                        void* stream) override {
    return to_->Exchange(sends, recvs, stream);
  }
  absl::StatusOr<std::unique_ptr<comm::Window>> CreateWindow(int64_t num_bytes) override {
    auto window = to_->CreateWindow(num_bytes);
    if (!window.ok()) return window.status();
    return std::make_unique<RoundsWindow>(*to_, num_windows_++, *std::move(window));
  }
  absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) override {
    return to_->HostAllGather(mine);
  }
  absl::Status Barrier() override { return to_->Barrier(); }
  absl::Status HealthCheck() override { return to_->HealthCheck(); }
  std::vector<int> LostRanks() override { return to_->LostRanks(); }
  void Abort(absl::string_view reason) override { to_->Abort(reason); }

 private:
  class RoundsWindow final : public comm::Window {
   public:
    RoundsWindow(comm::Communicator& ranks, int id, std::unique_ptr<comm::Window> to)
        : ranks_(ranks), id_(id), to_(std::move(to)) {}

    void* data() override { return to_->data(); }
    int64_t num_bytes() const override { return to_->num_bytes(); }
    void* PeerData(int rank) override { return rank == ranks_.rank() ? data() : nullptr; }
    absl::Status BeginWrite(void* stream) override { return to_->BeginWrite(stream); }
    absl::Status Publish(void* stream) override { return to_->Publish(stream); }
    absl::Status Gather(const comm::GatherList& list, int64_t record_bytes, void* dst,
                        void* stream) override {
      if (*list.count > 0) {
        const absl::StatusOr<bool> round = Round(/*is_release=*/false);
        if (!round.ok()) return round.status();
      }
      return to_->Gather(list, record_bytes, dst, stream);
    }
    absl::Status Release(void* stream) override {
      for (bool all_release = false; !all_release;) {
        const absl::StatusOr<bool> round = Round(/*is_release=*/true);
        if (!round.ok()) return round.status();
        all_release = *round;
      }
      return to_->Release(stream);
    }

   private:
    // Whether all ranks release.
    absl::StatusOr<bool> Round(bool is_release) {
      const std::string release = absl::StrCat("release of window ", id_);
      const std::string gather = absl::StrCat("gather from window ", id_);
      auto all = ranks_.HostAllGather(is_release ? release : gather);
      if (!all.ok()) return all.status();
      bool all_release = true;
      for (const std::string& theirs : *all) {
        if (theirs != release && theirs != gather) {
          return absl::InternalError(absl::StrCat("a rank is at \"", theirs, "\""));
        }
        all_release &= theirs == release;
      }
      return all_release;
    }

    comm::Communicator& ranks_;
    const int id_;
    const std::unique_ptr<comm::Window> to_;
  };

  const std::shared_ptr<comm::Communicator> to_;
  int num_windows_ = 0;
};

TEST(PackedWindowsTest, NoCollectiveComesBetweenGatherAndRelease) {
  const Problem problem = RandomProblem({.num_q_heads = 4,
                                         .num_kv_heads = 2,
                                         .head_dim_qk = 64,
                                         .head_dim_v = 64,
                                         .num_selected_blocks = 6,
                                         .window_tokens = 100},
                                        {0, 1200}, {.dtype = DType::kBF16}, 7);
  Random random(8);
  const Bytes d_o = Encode(DType::kBF16, RandomOutputGradients(problem, &random));
  const int64_t record = 64 * (64 + 64) * 2;
  const auto run = [&](const std::string& sharding, int num_ranks, const RunOptions& options,
                       const BackwardRun& backward, GlobalGradients* gradients) {
    GlobalOutputs outputs(problem);
    const ShardPlan plan = *ShardPlan::Parse(sharding, problem.num_tokens(), num_ranks);
    return OnLoopbackRanks(num_ranks, [&](std::shared_ptr<comm::Communicator> communicator,
                                          std::shared_ptr<kernels::Kernels> kernels) {
      return RunRankBackward(problem, d_o, plan, options, backward,
                             std::make_shared<RoundsCommunicator>(std::move(communicator)),
                             std::move(kernels), &outputs, gradients);
    });
  };
  GlobalGradients one(problem, 1, DType::kF32);
  ASSERT_TRUE(run("contiguous", 1, {}, {}, &one).ok());
  // In contiguous chunks the first rank gathers nothing, and of others more the later they are.
  for (const char* sharding : {"contiguous", "zigzag", "600,0,600"}) {
    for (bool keep_blocks : {false, true}) {
      SCOPED_TRACE(testing::Message() << sharding << " keep_blocks " << keep_blocks);
      GlobalGradients gradients(problem, 3, DType::kF32);
      const absl::Status status = run(sharding, 3, {.fetch_budget_bytes = 20 * record},
                                      {.keep_blocks = keep_blocks}, &gradients);
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(one.Values(GlobalGradients::kDq), gradients.Values(GlobalGradients::kDq));
    }
  }
}

}  // namespace
}  // namespace nsa::test
