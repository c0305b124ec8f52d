// What fails on one rank in the middle of a call: the others do not wait for it. Where ranks fetch
// from each other, they go on with what lies with them.
#include <array>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/serving/kv_cache.h"
#include "tests/serving/take_over.h"
#include "tests/serving/unreachable.h"
#include "tests/testing/delegating_kernels.h"

namespace nsa::test {
namespace {

constexpr int kRanks = 2;

// Fail in the second step: when the other rank is known to have taken the first.
class FailingKernels final : public DelegatingKernels {
 public:
  using DelegatingKernels::DelegatingKernels;
  absl::Status DecodeSelect(const kernels::DecodeSelectParams& params, void* stream) override {
    if (++num_calls_ == 2) return absl::InternalError("the GPU fell off the bus");
    return DelegatingKernels::DecodeSelect(params, stream);
  }

 private:
  int num_calls_ = 0;
};

absl::Status Step(const std::shared_ptr<comm::Communicator>& communicator) {
  const int rank = communicator->rank();
  auto created = kernels::CpuKernels::Create({.num_threads = 1});
  if (!created.ok()) return created.status();
  std::shared_ptr<kernels::Kernels> kernels = *std::move(created);
  if (rank == 1) kernels = std::make_shared<FailingKernels>(std::move(kernels));
  auto cache = serving::KvCache::Create(SmallCache(), communicator, std::move(kernels));
  if (!cache.ok()) return cache.status();
  const auto sequence = (*cache)->Open();
  if (!sequence.ok()) return sequence.status();
  std::array<float, 64> row = {}, o;
  const ConstTensor one_row(row.data(), DType::kF32, {1, 1, 64});
  serving::KvTokens kv;
  kv.k_slc = kv.v_slc = one_row;
  const ConstTensor gate(row.data(), DType::kF32, {1, 1, 3});
  const serving::StepSequence step = {*sequence, 1};
  const auto take_step = [&] {
    return (*cache)->Step({&step, 1}, {.q = one_row, .kv = kv, .gate = gate},
                          {.o = Tensor(o.data(), DType::kF32, {1, 1, 64})});
  };
  if (rank == 1) {
    const absl::Status first = take_step();
    return first.ok() ? take_step() : first;
  }
  // The step during which the other rank aborts may end with that.
  while (communicator->HealthCheck().ok()) take_step().IgnoreError();
  return take_step();
}

// `run` on each rank, which must not take half of the deadline.
template <typename Run>
std::vector<absl::Status> OnRanks(Run run) {
  auto group = comm::LoopbackGroup::Create(kRanks, {.timeout = absl::Minutes(1)});
  EXPECT_TRUE(group.ok()) << group.status();
  const absl::Time begin = absl::Now();
  std::vector<absl::Status> status(kRanks);
  std::vector<std::thread> threads;
  for (int r = 0; r < kRanks; ++r) {
    threads.emplace_back([&, r] { status[r] = run(std::move((*group)[r])); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(30));
  return status;
}

TEST(FailedStepTest, HoldsUpNoOtherRank) {
  const std::vector<absl::Status> status =
      OnRanks([](std::unique_ptr<comm::Communicator> communicator) {
        return Step(std::make_shared<UnreachableCommunicator>(std::move(communicator)));
      });
  EXPECT_EQ(status[1], absl::InternalError("the GPU fell off the bus"));
  EXPECT_TRUE(status[0].ok()) << status[0];
}

// Fails where the last tokens of a forward leave their rank.
class FailingTail final : public DelegatingKernels {
 public:
  using DelegatingKernels::DelegatingKernels;
  absl::Status CopyRows(const kernels::CopyRowsParams& params, void* stream) override {
    if (fails) return absl::InternalError("the GPU fell off the bus");
    return DelegatingKernels::CopyRows(params, stream);
  }
  bool fails = false;
};

absl::Status TakeOverThatFails(const std::shared_ptr<comm::Communicator>& communicator) {
  auto created = kernels::CpuKernels::Create({.num_threads = 1});
  if (!created.ok()) return created.status();
  const auto kernels = std::make_shared<FailingTail>(*std::move(created));
  return TakeOver(communicator, kernels, [&] { kernels->fails = communicator->rank() == 1; });
}

TEST(FailedAppendTest, ReachesTheHomeAtOnce) {
  const std::vector<absl::Status> status = OnRanks(TakeOverThatFails);
  EXPECT_EQ(status[1], absl::InternalError("the GPU fell off the bus"));
  EXPECT_EQ(status[0].code(), absl::StatusCode::kAborted) << status[0];
}

// Fails where a take-over begins.
class FailingOrder final : public DelegatingKernels {
 public:
  using DelegatingKernels::DelegatingKernels;
  absl::StatusOr<bool> IsCapturing(void* stream) override {
    if (fails) return absl::InternalError("the GPU fell off the bus");
    return DelegatingKernels::IsCapturing(stream);
  }
  absl::Status WaitFor(kernels::Event& event, void* stream) override {
    if (fails) return absl::InternalError("the GPU fell off the bus");
    return DelegatingKernels::WaitFor(event, stream);
  }
  bool fails = false;
};

TEST(FailedAppendTest, IsAgreedOnWhenItDoesNotBegin) {
  // Kept, so that none hears of another that it has left.
  std::vector<std::shared_ptr<comm::Communicator>> ranks(kRanks);
  const std::vector<absl::Status> status =
      OnRanks([&](std::unique_ptr<comm::Communicator> communicator) {
        const int rank = communicator->rank();
        ranks[rank] = std::move(communicator);
        const auto kernels = std::make_shared<FailingOrder>(
            std::shared_ptr<kernels::Kernels>(*kernels::CpuKernels::Create({.num_threads = 1})));
        return TakeOver(ranks[rank], kernels, [&] { kernels->fails = rank == 1; });
      });
  for (const absl::Status& of_rank : status) {
    EXPECT_EQ(of_rank, absl::InternalError("rank 1: the GPU fell off the bus"));
  }
}

// Fails in one call of what the cache asks for, counted from when it is told so.
class FailingCall final : public DelegatingKernels {
 public:
  using DelegatingKernels::DelegatingKernels;
  absl::Status AppendTokens(const kernels::AppendTokensParams& params, void* stream) override {
    const absl::Status failed = Count(append);
    return failed.ok() ? DelegatingKernels::AppendTokens(params, stream) : failed;
  }
  absl::Status CopyFromHost(void* dst, const void* src, int64_t num_bytes, void* stream) override {
    const absl::Status failed = Count(copy);
    return failed.ok() ? DelegatingKernels::CopyFromHost(dst, src, num_bytes, stream) : failed;
  }
  int append = 0, copy = 0;  // which call from now fails; 0: none

 private:
  static absl::Status Count(int& call) {
    return call > 0 && --call == 0 ? absl::InternalError("the GPU fell off the bus")
                                   : absl::OkStatus();
  }
};

TEST(FailedCallTest, LeavesSequencesAsTheyWere) {
  const auto kernels = std::make_shared<FailingCall>(
      std::shared_ptr<kernels::Kernels>(*kernels::CpuKernels::Create({.num_threads = 1})));
  serving::KvCacheOptions options = SmallCache();
  options.num_pages = 64;
  options.max_tokens = 4096;
  auto cache = *serving::KvCache::Create(
      options, std::shared_ptr(std::move((*comm::LoopbackGroup::Create(1))[0])), kernels);
  const serving::SequenceId sequence = *cache->Open();
  const std::vector<float> zeros(2000 * 64);
  const auto rows = [&](int64_t count, int64_t dim) {
    return ConstTensor(zeros.data(), DType::kF32, {count, 1, dim});
  };
  serving::KvTokens kv;
  kv.k_slc = kv.v_slc = rows(100, 64);
  ASSERT_TRUE(cache->Append(sequence, kv).ok());
  const serving::KvCacheStats before = cache->Stats();
  const auto expect_as_before = [&](const absl::Status& status) {
    EXPECT_EQ(status, absl::InternalError("the GPU fell off the bus"));
    EXPECT_EQ(*cache->NumTokens(sequence), 100);
    EXPECT_EQ(cache->Stats().sequences, 1);
    EXPECT_EQ(cache->Stats().pages_used, before.pages_used);
  };

  kv.k_slc = kv.v_slc = rows(2000, 64);
  kernels->append = 2;  // of the two that so many tokens take
  expect_as_before(cache->Append(sequence, kv));

  const serving::StepSequence step = {sequence, 50};
  std::vector<float> o(50 * 64);
  kv.k_slc = kv.v_slc = rows(50, 64);
  for (int* call : {&kernels->append, &kernels->copy}) {
    *call = 1;
    expect_as_before(cache->Step({&step, 1}, {.q = rows(50, 64), .kv = kv, .gate = rows(50, 3)},
                                 {.o = Tensor(o.data(), DType::kF32, {50, 1, 64})}));
  }

  kernels->copy = 1;
  expect_as_before(cache->Fork(sequence).status());
}

}  // namespace
}  // namespace nsa::test
