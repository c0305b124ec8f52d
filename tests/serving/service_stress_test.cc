// Two ranks' services under load, for as long as --seconds says: eight clients do whatever comes to
// mind, one of them reads no results. No result may be lost or come twice, every page must come
// back, and what is decoded must be, bit for bit, what one cache makes of the same tokens.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "nsa/service_testlib.h"
#include "tests/serving/unreachable.h"
#include "tests/testing/random.h"

ABSL_FLAG(double, seconds, 15, "how long each test runs");

namespace nsa::test {
namespace {

using serving::SequenceId;

constexpr int kRanks = 2;
constexpr int kClientsPerRank = 4;
constexpr absl::Time kNever = absl::InfiniteFuture();

ServiceOptions StressedService() {
  ServiceOptions options = SmallService();
  options.cache.num_pages = 40;  // they run out
  options.cache.max_sequences = 12;
  options.cache.max_tokens = 600;
  options.cache.max_step_rows = 24;
  options.max_queued = 24;
  options.max_unread = 16;
  return options;
}

// One caller and what it knows of its sequences.
class Caller {
 public:
  Caller(Service& service, uint64_t seed)
      : service_(service), random_(seed), client_(*service.Connect()) {}

  void Run(absl::Time end) {
    while (absl::Now() < end && !testing::Test::HasFailure()) {
      const int64_t kind = random_.Int(0, 19);
      if (sequences_.empty() || kind == 0) {
        OpenOne();
      } else if (kind <= 11) {
        Submit();
      } else if (kind <= 14) {
        ReadSome(random_.Int(1, 8));
      } else if (kind == 15) {
        CancelOne();
      } else if (kind == 16) {
        TruncateOne();
      } else if (kind == 17) {
        ForkOne();
      } else if (kind == 18) {
        CloseOne();
      } else if (random_.OneIn(20)) {
        ComeAgain();
      }
    }
    ReadSome(static_cast<int64_t>(pending_.size()));
    EXPECT_TRUE(absl::IsDeadlineExceeded(client_->Next(absl::Now()).status()));
    client_.reset();
  }

  // Never reads, yet is the only one to learn of it.
  void RunWithoutReading(absl::Time end) {
    OpenOne();
    int64_t num_refused = 0;
    while (absl::Now() < end && !testing::Test::HasFailure()) {
      if (sequences_.empty()) {
        OpenOne();
        continue;
      }
      Submit();
      num_refused += was_refused_;
      absl::SleepFor(absl::Milliseconds(1));
    }
    EXPECT_LE(pending_.size(), static_cast<size_t>(StressedService().max_unread));
    EXPECT_GT(num_refused, 0);
    client_.reset();  // with requests and results in it
  }

  int64_t num_compared() const { return num_compared_; }
  int64_t num_ended(absl::StatusCode code) const {
    const auto found = num_ended_.find(code);
    return found == num_ended_.end() ? 0 : found->second;
  }

 private:
  struct Pending {
    SequenceId sequence;
    std::vector<int64_t> tokens;
    bool appends_only;
    bool has_deadline;
    bool is_cancelled;
    std::unique_ptr<TokensRequest> request;
  };

  SequenceId PickSequence() {
    auto at = sequences_.begin();
    std::advance(at, random_.Int(0, static_cast<int64_t>(sequences_.size()) - 1));
    return at->first;
  }

  // Whether it was done; else it was for want of room.
  bool Did(const absl::Status& status) {
    EXPECT_TRUE(status.ok() || absl::IsResourceExhausted(status)) << status;
    return status.ok();
  }

  void OpenOne() {
    const auto opened = client_->Control(Open(), kNever);
    if (Did(opened.status())) sequences_[opened->sequence()];
  }

  void Submit() {
    const SequenceId sequence = PickSequence();
    Pending one = {sequence, {}, random_.OneIn(4), random_.OneIn(12), false, nullptr};
    const int64_t count = one.appends_only   ? random_.Int(1, 120)
                          : random_.OneIn(5) ? random_.Int(1, 20)
                                             : 1;
    for (int64_t i = 0; i < count; ++i) one.tokens.push_back(random_.Int(0, 100000));
    one.request = std::make_unique<TokensRequest>(sequence, one.tokens);
    if (one.appends_only) one.request->WithoutQueries();
    if (one.has_deadline) {
      one.request->request.deadline = absl::Now() + absl::Microseconds(random_.Int(0, 300));
    }
    const auto id = client_->Submit(one.request->request);
    was_refused_ = !Did(id.status());
    if (was_refused_) return;
    EXPECT_TRUE(pending_.emplace(*id, std::move(one)).second);
  }

  void ReadSome(int64_t count) {
    for (; count > 0 && !pending_.empty(); --count) Read();
  }

  void Read() {
    const auto result = client_->Next(absl::Now() + absl::Seconds(60));
    ASSERT_TRUE(result.ok()) << result.status() << ", of " << pending_.size();
    const auto found = pending_.find(result->id);
    ASSERT_TRUE(found != pending_.end()) << "result " << result->id;
    const Pending one = std::move(found->second);
    pending_.erase(found);
    ++num_ended_[result->status.code()];
    std::vector<int64_t>& tokens = sequences_[one.sequence];
    const auto room = 600 - static_cast<int64_t>(tokens.size());
    const bool fits = static_cast<int64_t>(one.tokens.size()) <= room;
    switch (result->status.code()) {
      case absl::StatusCode::kOk:
        EXPECT_TRUE(fits && !one.is_cancelled);
        tokens.insert(tokens.end(), one.tokens.begin(), one.tokens.end());
        if (!one.appends_only && random_.OneIn(10)) Compare(one, tokens);
        return;
      case absl::StatusCode::kResourceExhausted:
        break;
      case absl::StatusCode::kInvalidArgument:
        EXPECT_FALSE(fits) << result->status;
        break;
      case absl::StatusCode::kDeadlineExceeded:
        EXPECT_TRUE(one.has_deadline);
        break;
      case absl::StatusCode::kCancelled:
        EXPECT_TRUE(one.is_cancelled);
        break;
      default:
        FAIL() << result->status;
    }
    EXPECT_TRUE(one.appends_only || one.request->is_untouched());
  }

  void Compare(const Pending& one, const std::vector<int64_t>& tokens) {
    EXPECT_EQ(one.request->o, alone_.Decode(tokens, static_cast<int64_t>(one.tokens.size())))
        << tokens.size() << " tokens";
    ++num_compared_;
  }

  void CancelOne() {
    if (pending_.empty()) return;
    auto at = pending_.begin();
    std::advance(at, random_.Int(0, static_cast<int64_t>(pending_.size()) - 1));
    if (client_->Cancel(at->first)) at->second.is_cancelled = true;
  }

  // A control request comes behind all that was submitted before: its results are there then.
  void TruncateOne() {
    const SequenceId sequence = PickSequence();
    const auto length = static_cast<int64_t>(sequences_[sequence].size());
    const int64_t to = random_.Int(std::max<int64_t>(0, length - 40), length);
    const auto truncated = client_->Control(Truncate(sequence, to), kNever);
    ReadSome(static_cast<int64_t>(pending_.size()));
    if (truncated.ok()) {
      EXPECT_EQ(truncated->num_tokens(), to);
      sequences_[sequence].resize(to);
    } else {
      // Pages of the past are kept only so far where they are not read in place; see
      // KvCacheOptions.
      EXPECT_TRUE(absl::IsFailedPrecondition(truncated.status()) ||
                  absl::IsResourceExhausted(truncated.status()))
          << truncated.status();
    }
  }

  void ForkOne() {
    const SequenceId sequence = PickSequence();
    const auto forked = client_->Control(Fork(sequence), kNever);
    ReadSome(static_cast<int64_t>(pending_.size()));
    if (!Did(forked.status())) return;
    const std::vector<int64_t> tokens = sequences_[sequence];
    EXPECT_EQ(forked->num_tokens(), static_cast<int64_t>(tokens.size()));
    sequences_[forked->sequence()] = tokens;
  }

  void CloseOne() {
    const SequenceId sequence = PickSequence();
    const auto closed = client_->Control(Close(sequence), kNever);
    ReadSome(static_cast<int64_t>(pending_.size()));
    if (Did(closed.status())) sequences_.erase(sequence);
  }

  // Leaves with whatever it has, and is a new client.
  void ComeAgain() {
    client_.reset();
    pending_.clear();
    sequences_.clear();
    client_ = *service_.Connect();
  }

  Service& service_;
  Random random_;
  std::unique_ptr<Client> client_;
  std::map<SequenceId, std::vector<int64_t>> sequences_;
  std::map<RequestId, Pending> pending_;
  std::map<absl::StatusCode, int64_t> num_ended_;
  AloneCache alone_;
  int64_t num_compared_ = 0;
  bool was_refused_ = false;
};

void RunRank(int rank, std::shared_ptr<comm::Communicator> communicator) {
  auto made = Service::Create(
      StressedService(), communicator,
      std::shared_ptr<kernels::Kernels>(*kernels::CpuKernels::Create({.num_threads = 1})));
  ASSERT_TRUE(made.ok()) << made.status();
  Service& service = **made;
  const absl::Time end = absl::Now() + absl::Seconds(absl::GetFlag(FLAGS_seconds));
  std::vector<std::unique_ptr<Caller>> callers;
  for (int i = 0; i < kClientsPerRank; ++i) {
    callers.push_back(std::make_unique<Caller>(service, rank * kClientsPerRank + i));
  }
  std::vector<std::thread> threads;
  for (auto& caller : callers) {
    const bool reads = rank > 0 || caller != callers.front();
    threads.emplace_back(
        [&caller, reads, end] { reads ? caller->Run(end) : caller->RunWithoutReading(end); });
  }
  for (std::thread& thread : threads) thread.join();

  const ServiceStats stats = service.Stats();
  std::cout << "rank " << rank << ": " << stats.steps() << " steps, " << stats.step_rows()
            << " rows;";
  for (const auto& [code, count] : stats.requests_by_code())
    std::cout << " " << code << " " << count;
  int64_t num_compared = 0;
  std::map<absl::StatusCode, int64_t> num_ended;
  for (const auto& caller : callers) {
    num_compared += caller->num_compared();
    for (const auto code :
         {absl::StatusCode::kOk, absl::StatusCode::kCancelled, absl::StatusCode::kDeadlineExceeded,
          absl::StatusCode::kResourceExhausted}) {
      num_ended[code] += caller->num_ended(code);
    }
  }
  std::cout << "; compared " << num_compared << std::endl;
  for (const auto& [code, count] : num_ended) {
    // Under a sanitizer there may be too little time for everything.
    EXPECT_TRUE(count > 0 || stats.steps() < 2000) << absl::StatusCodeToString(code);
  }
  EXPECT_GT(num_compared, 0);
  EXPECT_GT(stats.step_rows(), stats.steps());
  EXPECT_EQ(stats.pages_used(), 0);
  EXPECT_EQ(stats.summary_pages_used(), 0);
  EXPECT_EQ(stats.sequences(), 0);
  EXPECT_EQ(stats.queue_depth(), 0);
  EXPECT_EQ(stats.clients(), 0);
  EXPECT_TRUE(service.Drain(kNever).ok());
  EXPECT_TRUE(service.Shutdown(absl::Now() + absl::Seconds(60)).ok());
}

class ServiceStressTest : public testing::TestWithParam<bool> {};

TEST_P(ServiceStressTest, ClientsDoWhateverComesToMind) {
  auto group = *comm::LoopbackGroup::Create(kRanks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < kRanks; ++rank) {
    std::shared_ptr<comm::Communicator> communicator = std::move(group[rank]);
    if (!GetParam()) communicator = std::make_shared<UnreachableCommunicator>(communicator);
    threads.emplace_back([rank, communicator] { RunRank(rank, communicator); });
  }
  for (std::thread& thread : threads) thread.join();
}

INSTANTIATE_TEST_SUITE_P(Caches, ServiceStressTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "Reachable" : "Fetched"; });

}  // namespace
}  // namespace nsa::test

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  absl::ParseCommandLine(argc, argv);
  return RUN_ALL_TESTS();
}
