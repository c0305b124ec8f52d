// A rank that dies: sequences with pages there are Unavailable, those whose pages and home are
// alive go on, wherever their pages lie.
#include <signal.h>

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/conformance/check.h"
#include "comm/conformance/launch.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/serving/kv_cache.h"
#include "tests/testing/ucx_ranks.h"

namespace nsa::test {
namespace {

using comm::conformance::FreePort;
using comm::conformance::Processes;
using comm::conformance::ProcessResult;
using serving::KvCache;
using serving::KvCacheOptions;
using serving::SequenceId;

constexpr int kRanks = 3;
constexpr int kVictim = 2;
constexpr int64_t kTokens = 300;

// Of the home, rank 0.
class Home {
 public:
  explicit Home(KvCache& cache) : cache_(cache) {
    for (size_t i = 0; i < values_.size(); ++i) values_[i] = 0.01f * static_cast<float>(i % 97);
  }

  absl::Status Append(SequenceId id, int64_t num_tokens) {
    return cache_.Append(id, KvOf(num_tokens));
  }
  // o of one more token.
  absl::StatusOr<std::vector<float>> Step(SequenceId id) {
    std::vector<float> o(4 * 64);
    const serving::StepSequence step = {id, 1};
    const absl::Status status =
        cache_.Step({&step, 1},
                    {.q = ConstTensor(values_.data(), DType::kF32, {1, 4, 64}),
                     .kv = KvOf(1),
                     .gate = ConstTensor(values_.data(), DType::kF32, {1, 4, 3})},
                    {.o = Tensor(o.data(), DType::kF32, {1, 4, 64})});
    if (!status.ok()) return status;
    return o;
  }

 private:
  serving::KvTokens KvOf(int64_t num_tokens) {
    serving::KvTokens kv;
    kv.k_slc = ConstTensor(values_.data(), DType::kF32, {num_tokens, 2, 64});
    kv.v_slc = ConstTensor(values_.data() + 50, DType::kF32, {num_tokens, 2, 64});
    return kv;
  }

  KvCache& cache_;
  std::vector<float> values_ = std::vector<float>(kTokens * 2 * 64 + 50);
};

absl::Status RunRank(int rank, int port) {
  auto made = MakeUcxRank(rank, kRanks, port, {.timeout = absl::Seconds(4)});
  if (!made.ok()) return made.status();
  const std::shared_ptr<comm::Communicator> communicator = *std::move(made);
  auto kernels = kernels::CpuKernels::Create({.num_threads = 1});
  if (!kernels.ok()) return kernels.status();
  KvCacheOptions options;
  options.config.num_q_heads = 4;
  options.config.num_kv_heads = 2;
  options.config.head_dim_qk = options.config.head_dim_v = 64;
  options.config.num_selected_blocks = 4;
  options.dtype = DType::kF32;
  options.num_pages = rank == 1 ? 10 : 5;  // 300 tokens need five
  options.home_shares = {1, 0, 0};
  options.max_tokens = 4096;
  auto created = KvCache::Create(options, communicator, *std::move(kernels));
  if (!created.ok()) return created.status();
  KvCache& cache = **created;
  if (rank == kVictim) {
    NSA_COMM_OK(communicator->Barrier());
    raise(SIGKILL);
  }
  NSA_COMM_CHECK(cache.is_reachable(), "by shared memory");
  if (rank != 0) {
    NSA_COMM_OK(communicator->Barrier());
    // Its memory serves the home until that is done.
    while (communicator->HealthCheck().ok()) absl::SleepFor(absl::Milliseconds(10));
    absl::SleepFor(absl::Seconds(2));
    return absl::OkStatus();
  }

  Home home(cache);
  // On this rank, on the next, and also on the one that dies.
  SequenceId ids[3];
  for (SequenceId& id : ids) {
    id = *cache.Open();
    NSA_COMM_OK(home.Append(id, kTokens));
  }
  const std::vector<int64_t> used = cache.Stats().pages_used_of_rank;
  NSA_COMM_CHECK(used == std::vector<int64_t>({5, 8, 2}), "most free comes first");
  const auto before = home.Step(ids[1]);
  if (!before.ok()) return before.status();
  NSA_COMM_OK(cache.Truncate(ids[1], kTokens));
  NSA_COMM_OK(communicator->Barrier());
  const absl::Time deadline = absl::Now() + absl::Seconds(20);
  while (communicator->LostRanks().empty() && absl::Now() < deadline) {
    absl::SleepFor(absl::Milliseconds(10));
  }

  const std::string victim = absl::StrCat("rank ", kVictim);
  NSA_COMM_FAILS(home.Step(ids[2]).status(), absl::StatusCode::kUnavailable, victim);
  NSA_COMM_FAILS(cache.Fork(ids[2]).status(), absl::StatusCode::kUnavailable, victim);
  NSA_COMM_CHECK(*cache.NumTokens(ids[2]) == kTokens, "it is as it was");
  const auto after = home.Step(ids[1]);
  NSA_COMM_OK(after.status());
  NSA_COMM_CHECK(*after == *before, "the pages of a live rank");
  NSA_COMM_OK(home.Step(ids[0]).status());

  // Its pages are not taken again; those of the living are.
  for (SequenceId id : ids) NSA_COMM_OK(cache.Close(id));
  NSA_COMM_CHECK(cache.Stats().pages_used == 0, cache.Stats().pages_used);
  const SequenceId next = *cache.Open();
  for (int i = 0; i < 3; ++i) NSA_COMM_OK(home.Append(next, kTokens));
  NSA_COMM_FAILS(home.Append(next, kTokens), absl::StatusCode::kResourceExhausted, "pages");
  NSA_COMM_CHECK(*cache.NumTokens(next) == 3 * kTokens, *cache.NumTokens(next));
  return absl::OkStatus();
}

TEST(LostRankTest, OthersSequencesGoOn) {
  const int port = FreePort();
  Processes processes(kRanks, [&](int rank) { return RunRank(rank, port); });
  const std::vector<ProcessResult> results = processes.Join();
  for (int rank = 0; rank < kRanks; ++rank) {
    if (rank == kVictim) continue;
    ASSERT_TRUE(results[rank].exited) << "rank " << rank << ": signal " << results[rank].signal;
    EXPECT_TRUE(results[rank].status.ok()) << "rank " << rank << ": " << results[rank].status;
  }
}

}  // namespace
}  // namespace nsa::test
