#include "nsa/service.h"

#include <atomic>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "nsa/service_testlib.h"
#include "tests/serving/unreachable.h"
#include "tests/testing/delegating_kernels.h"

namespace nsa {
namespace {

using serving::SequenceId;
using testing::HasSubstr;

constexpr absl::Time kNever = absl::InfiniteFuture();
constexpr int64_t kMaxInt64 = std::numeric_limits<int64_t>::max();

absl::Time In(absl::Duration duration) { return absl::Now() + duration; }

std::vector<int64_t> Tokens(int64_t count, int64_t first = 0) {
  std::vector<int64_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

// CPU kernels whose attention, or whose copies, fail on demand.
class FailingKernels : public test::DelegatingKernels {
 public:
  using DelegatingKernels::DelegatingKernels;
  absl::Status CopyFromHost(void* dst, const void* src, int64_t num_bytes, void* stream) override {
    if (num_copies_that_fail > 0 && num_copies_that_fail-- > 0) {
      return absl::InternalError("CopyFromHost was told to fail");
    }
    return DelegatingKernels::CopyFromHost(dst, src, num_bytes, stream);
  }
  absl::Status CopyPieces(const kernels::CopyPiecesParams& params, void* stream) override {
    if (fails_to_gather.exchange(false)) return absl::InternalError("CopyPieces was told to fail");
    return DelegatingKernels::CopyPieces(params, stream);
  }
  absl::Status DecodeAttend(const kernels::DecodeAttendParams& params, void* stream) override {
    if (fails) return absl::InternalError("DecodeAttend was told to fail");
    return DelegatingKernels::DecodeAttend(params, stream);
  }
  std::atomic<bool> fails = false;
  std::atomic<int> num_copies_that_fail = 0;  // of those to come
  std::atomic<bool> fails_to_gather = false;  // once
};

std::shared_ptr<FailingKernels> MakeKernels() {
  return std::make_shared<FailingKernels>(
      std::shared_ptr<kernels::Kernels>(*kernels::CpuKernels::Create({.num_threads = 1})));
}

class ServiceTest : public testing::Test {
 protected:
  void Start(const ServiceOptions& options = SmallService()) {
    communicator_ = std::move((*comm::LoopbackGroup::Create(1))[0]);
    auto service = Service::Create(options, communicator_, kernels_);
    ASSERT_TRUE(service.ok()) << service.status();
    service_ = *std::move(service);
    client_ = Connect();
  }
  std::unique_ptr<Client> Connect(const ClientOptions& options = {}) {
    return *service_->Connect(options);
  }
  SequenceId OpenOne() { return client_->Control(Open(), kNever)->sequence(); }
  int64_t NumTokens(SequenceId sequence) {
    return client_->Control(Describe(sequence), kNever)->num_tokens();
  }
  // What became of the request.
  absl::Status Decode(TokensRequest& tokens) {
    const auto id = client_->Submit(tokens.request);
    if (!id.ok()) return id.status();
    const auto result = client_->Next(kNever);
    EXPECT_EQ(result->id, *id);
    return result->status;
  }

  // While it lives, the service does nothing.
  class Busy {
   public:
    explicit Busy(Service& service)
        : client_(*service.Connect()), thread_([this] {
            EXPECT_TRUE(client_
                            ->RunCollective([this](serving::KvCache&) {
                              begun_.Notify();
                              end_.WaitForNotification();
                              return absl::OkStatus();
                            })
                            .ok());
          }) {
      begun_.WaitForNotification();
    }
    ~Busy() {
      end_.Notify();
      thread_.join();
    }

   private:
    absl::Notification begun_, end_;
    std::unique_ptr<Client> client_;
    std::thread thread_;
  };

  std::shared_ptr<FailingKernels> kernels_ = MakeKernels();
  std::shared_ptr<comm::Communicator> communicator_;
  std::unique_ptr<Service> service_;
  std::unique_ptr<Client> client_;
};

TEST_F(ServiceTest, DecodesWhatOneCacheDoes) {
  Start();
  const SequenceId sequence = OpenOne();
  TokensRequest prompt(sequence, Tokens(200));
  ASSERT_TRUE(Decode(prompt.WithoutQueries()).ok());
  TokensRequest next(sequence, Tokens(3, 200));
  ASSERT_TRUE(Decode(next).ok());
  EXPECT_EQ(next.o, AloneCache().Decode(Tokens(203), 3));
  EXPECT_EQ(NumTokens(sequence), 203);
}

TEST_F(ServiceTest, BatchesWhatIsReadyInOrderOfEachSequence) {
  Start();
  std::vector<SequenceId> sequences;
  for (int i = 0; i < 4; ++i) sequences.push_back(OpenOne());
  std::vector<TokensRequest> requests;
  requests.reserve(8);
  {
    const Busy busy(*service_);
    for (int64_t i = 0; i < 8; ++i) {
      requests.emplace_back(sequences[i % 4], std::vector<int64_t>{i % 4 * 100 + i / 4});
      ASSERT_TRUE(client_->Submit(requests.back().request).ok());
    }
    EXPECT_EQ(service_->Stats().queue_depth(), 8);
  }
  RequestId last = 0;
  for (int64_t i = 0; i < 8; ++i) {
    const auto result = client_->Next(kNever);
    ASSERT_TRUE(result.ok() && result->status.ok());
    EXPECT_GT(result->id, last);
    last = result->id;
  }
  AloneCache alone;
  for (int64_t i = 0; i < 4; ++i) {
    EXPECT_EQ(requests[i].o, alone.Decode({i * 100}, 1));
    EXPECT_EQ(requests[i + 4].o, alone.Decode({i * 100, i * 100 + 1}, 1));
  }
  EXPECT_EQ(service_->Stats().steps(), 2);
  EXPECT_EQ(service_->Stats().step_rows(), 8);
}

TEST_F(ServiceTest, AStepHasAtMostTheCachesRows) {
  ServiceOptions options = SmallService();
  options.cache.max_step_rows = 5;
  Start(options);
  std::vector<TokensRequest> requests;
  requests.reserve(4);
  for (int i = 0; i < 4; ++i) requests.emplace_back(OpenOne(), Tokens(2));
  {
    const Busy busy(*service_);
    for (const TokensRequest& one : requests) ASSERT_TRUE(client_->Submit(one.request).ok());
  }
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(client_->Next(kNever)->status.ok());
  EXPECT_EQ(service_->Stats().steps(), 2);
  TokensRequest large(requests[0].request.sequence, Tokens(6));
  const absl::Status status = Decode(large);
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(status.message(), HasSubstr("k_slc.shape[0] = 6: new tokens must be 1 to 5"));
}

TEST_F(ServiceTest, ControlsSequences) {
  Start();
  const SequenceId sequence = OpenOne();
  TokensRequest prompt(sequence, Tokens(100));
  ASSERT_TRUE(Decode(prompt.WithoutQueries()).ok());
  const auto forked = client_->Control(Fork(sequence), kNever);
  ASSERT_TRUE(forked.ok());
  EXPECT_NE(forked->sequence(), sequence);
  EXPECT_EQ(forked->num_tokens(), 100);
  EXPECT_EQ(client_->Control(Truncate(sequence, 70), kNever)->num_tokens(), 70);
  TokensRequest next(forked->sequence(), {100});
  ASSERT_TRUE(Decode(next).ok());
  EXPECT_EQ(next.o, AloneCache().Decode(Tokens(101), 1));
  EXPECT_TRUE(client_->Control(Close(sequence), kNever).ok());
  EXPECT_TRUE(absl::IsNotFound(client_->Control(Close(sequence), kNever).status()));
  const absl::Status unset = client_->Control({}, kNever).status();
  EXPECT_TRUE(absl::IsInvalidArgument(unset));
  EXPECT_THAT(unset.message(), HasSubstr("operation"));
}

TEST_F(ServiceTest, RefusesTensorsThatAreWrong) {
  Start();
  const SequenceId sequence = OpenOne();
  const std::pair<std::function<void(DecodeRequest&)>, std::string> wrongs[] = {
      {[](DecodeRequest& r) { r.inputs.q.dtype = DType::kBF16; }, "q.dtype = bf16: must be f32"},
      {[](DecodeRequest& r) { r.inputs.gate.shape[2] = 4; }, "gate.shape = [2,4,4]"},
      {[](DecodeRequest& r) { r.inputs.kv.v_slc.strides[1] = 128; }, "v_slc.strides[1] = 128"},
      {[](DecodeRequest& r) { r.inputs.kv.v_slc.strides[0] = 129; }, "v_slc.strides[0] = 129"},
      {[](DecodeRequest& r) { r.inputs.kv.k_slc = {}; }, "k_slc.shape[0] = 0"},
      {[](DecodeRequest& r) { r.o = {}; }, "o.shape = []"},
      {[](DecodeRequest& r) { r.o.data = static_cast<float*>(r.o.data) + 1; }, "o.data"},
  };
  for (const auto& [spoil, message] : wrongs) {
    TokensRequest tokens(sequence, Tokens(2));
    spoil(tokens.request);
    const absl::Status status = client_->Submit(tokens.request).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(status.message(), HasSubstr(message));
  }
  EXPECT_EQ(service_->Stats().requests_by_code().at("INVALID_ARGUMENT"), 7);
}

TEST_F(ServiceTest, AnUnknownSequenceFailsAlone) {
  Start();
  TokensRequest good(OpenOne(), Tokens(2)), bad(4711, Tokens(2));
  RequestId bad_id;
  {
    const Busy busy(*service_);
    bad_id = *client_->Submit(bad.request);
    ASSERT_TRUE(client_->Submit(good.request).ok());
  }
  for (int i = 0; i < 2; ++i) {
    const auto result = client_->Next(kNever);
    EXPECT_EQ(result->status.code(),
              result->id == bad_id ? absl::StatusCode::kNotFound : absl::StatusCode::kOk);
  }
  EXPECT_TRUE(bad.is_untouched());
  EXPECT_EQ(good.o, AloneCache().Decode(Tokens(2), 2));
}

TEST_F(ServiceTest, OnlyThoseThatFindNoPagesFail) {
  ServiceOptions options = SmallService();
  options.cache.num_pages = 3;
  Start(options);
  // Each of four has room by itself; three have.
  std::vector<TokensRequest> requests;
  requests.reserve(4);
  for (int i = 0; i < 4; ++i) requests.emplace_back(OpenOne(), Tokens(2, 10 * i));
  {
    const Busy busy(*service_);
    for (const TokensRequest& one : requests) ASSERT_TRUE(client_->Submit(one.request).ok());
  }
  for (int i = 0; i < 4; ++i) {
    const auto result = client_->Next(kNever);
    if (result->status.ok()) continue;
    EXPECT_EQ(i, 3);
    EXPECT_TRUE(absl::IsResourceExhausted(result->status));
    EXPECT_THAT(result->status.message(), HasSubstr("pages: 1 asked, 0 free of the 3"));
  }
  EXPECT_TRUE(requests[3].is_untouched());
  EXPECT_EQ(requests[2].o, AloneCache().Decode(Tokens(2, 20), 2));
  EXPECT_EQ(NumTokens(requests[3].request.sequence), 0);
}

TEST_F(ServiceTest, ManySequencesAreRefused) {
  Start();
  for (int i = 0; i < 8; ++i) OpenOne();
  const absl::Status status = client_->Control(Open(), kNever).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(status.message(), HasSubstr("8"));
}

TEST_F(ServiceTest, AStepThatFailsChangesNothing) {
  Start();
  TokensRequest first(OpenOne(), Tokens(2)), second(OpenOne(), Tokens(2));
  kernels_->fails = true;
  {
    const Busy busy(*service_);
    ASSERT_TRUE(client_->Submit(first.request).ok());
    ASSERT_TRUE(client_->Submit(second.request).ok());
  }
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(client_->Next(kNever)->status.code(), absl::StatusCode::kInternal);
  }
  EXPECT_EQ(NumTokens(first.request.sequence), 0);
  kernels_->fails = false;
  ASSERT_TRUE(Decode(first).ok());
  EXPECT_EQ(first.o, AloneCache().Decode(Tokens(2), 2));
}

TEST_F(ServiceTest, AFullQueueRefuses) {
  ServiceOptions options = SmallService();
  options.max_queued = 3;
  Start(options);
  const SequenceId sequence = OpenOne();
  std::vector<TokensRequest> requests;
  requests.reserve(4);
  for (int64_t i = 0; i < 4; ++i) requests.emplace_back(sequence, Tokens(1, i));
  std::thread collective;  // which no limit holds off
  {
    const Busy busy(*service_);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(client_->Submit(requests[i].request).ok());
    const absl::Status status = client_->Submit(requests[3].request).status();
    EXPECT_TRUE(absl::IsResourceExhausted(status));
    EXPECT_THAT(status.message(), HasSubstr("max_queued = 3"));
    EXPECT_TRUE(absl::IsResourceExhausted(client_->Control(Open(), kNever).status()));
    collective = std::thread([this] {
      EXPECT_TRUE(client_->RunCollective([](serving::KvCache&) { return absl::OkStatus(); }).ok());
    });
    while (service_->Stats().queue_depth() < 4) absl::SleepFor(absl::Milliseconds(1));
  }
  collective.join();
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(client_->Next(kNever)->status.ok());
  EXPECT_TRUE(requests[3].is_untouched());
}

TEST_F(ServiceTest, AClientThatDoesNotReadIsRefusedAndNoOther) {
  ServiceOptions options = SmallService();
  options.max_unread = 2;
  Start(options);
  const SequenceId sequence = OpenOne();
  TokensRequest a(sequence, {0}), b(sequence, {1}), c(sequence, {2});
  ASSERT_TRUE(client_->Submit(a.request).ok());
  ASSERT_TRUE(client_->Submit(b.request).ok());
  const absl::Status status = client_->Submit(c.request).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  EXPECT_THAT(status.message(), HasSubstr("max_unread = 2"));
  const auto other = Connect();
  ASSERT_TRUE(other->Submit(c.request).ok());
  EXPECT_TRUE(other->Next(kNever)->status.ok());
  EXPECT_EQ(NumTokens(sequence), 3);  // control requests have no results to read
  EXPECT_TRUE(client_->Next(kNever)->status.ok());
  EXPECT_TRUE(client_->Submit(a.request).ok());
  client_.reset();  // before what the request refers to
}

TEST_F(ServiceTest, DeadlinesPassInTheQueue) {
  Start();
  const SequenceId sequence = OpenOne();
  TokensRequest late(sequence, {0}), good(sequence, {1});
  late.request.deadline = In(absl::Milliseconds(5));
  RequestId late_id;
  {
    const Busy busy(*service_);
    late_id = *client_->Submit(late.request);
    ASSERT_TRUE(client_->Submit(good.request).ok());
    // A caller does not wait for a service that is busy.
    const absl::Status status =
        client_->Control(Describe(sequence), In(absl::Milliseconds(10))).status();
    EXPECT_TRUE(absl::IsDeadlineExceeded(status));
    EXPECT_TRUE(absl::IsDeadlineExceeded(client_->Next(In(absl::Milliseconds(5))).status()));
  }
  const auto first = client_->Next(kNever);
  EXPECT_EQ(first->id, late_id);
  EXPECT_TRUE(absl::IsDeadlineExceeded(first->status));
  EXPECT_TRUE(client_->Next(kNever)->status.ok());
  EXPECT_TRUE(late.is_untouched());
  EXPECT_EQ(good.o, AloneCache().Decode({1}, 1));
}

TEST_F(ServiceTest, CancelsWhatHasNotBegun) {
  Start();
  const SequenceId sequence = OpenOne();
  TokensRequest first(sequence, {0}), second(sequence, {1});
  RequestId id;
  {
    const Busy busy(*service_);
    id = *client_->Submit(first.request);
    ASSERT_TRUE(client_->Submit(second.request).ok());
    EXPECT_FALSE(Connect()->Cancel(id));  // another client's
    EXPECT_TRUE(client_->Cancel(id));
    EXPECT_FALSE(client_->Cancel(id));
    const auto result = client_->Next(kNever);
    EXPECT_EQ(result->id, id);
    EXPECT_TRUE(absl::IsCancelled(result->status));
  }
  EXPECT_TRUE(client_->Next(kNever)->status.ok());
  EXPECT_TRUE(first.is_untouched());
  EXPECT_EQ(second.o, AloneCache().Decode({1}, 1));
}

TEST_F(ServiceTest, AClientTakesItsRequestsAndSequencesAlong) {
  Start();
  TokensRequest prompt(OpenOne(), Tokens(64));
  ASSERT_TRUE(Decode(prompt.WithoutQueries()).ok());
  auto keeper = Connect({.keeps_sequences = true});
  const SequenceId kept = keeper->Control(Fork(prompt.request.sequence), kNever)->sequence();
  keeper.reset();
  TokensRequest next(prompt.request.sequence, {64});
  {
    // The client's end waits for the service, which it finds busy.
    std::thread end;
    {
      const Busy busy(*service_);
      ASSERT_TRUE(client_->Submit(next.request).ok());
      end = std::thread([&] { client_.reset(); });
      while (!service_->Stats().requests_by_code().contains("CANCELLED")) {
        absl::SleepFor(absl::Milliseconds(1));
      }
    }
    end.join();
  }
  EXPECT_TRUE(next.is_untouched());
  client_ = Connect();
  const ServiceStats stats = service_->Stats();
  EXPECT_EQ(stats.sequences(), 1);
  EXPECT_EQ(stats.clients(), 1);
  EXPECT_EQ(NumTokens(kept), 64);
  EXPECT_TRUE(client_->Control(Close(kept), kNever).ok());
  EXPECT_EQ(service_->Stats().pages_used(), 0);
}

TEST_F(ServiceTest, DrainsAndShutsDown) {
  Start();
  const SequenceId sequence = OpenOne();
  TokensRequest first(sequence, {0}), second(sequence, {1});
  {
    const Busy busy(*service_);
    ASSERT_TRUE(client_->Submit(first.request).ok());
    const absl::Status status = service_->Drain(In(absl::Milliseconds(5)));
    EXPECT_TRUE(absl::IsDeadlineExceeded(status));
    EXPECT_THAT(status.message(), HasSubstr("1 in the queue, 1 in work"));
    const absl::Status refused = client_->Submit(second.request).status();
    EXPECT_TRUE(absl::IsUnavailable(refused));
    EXPECT_THAT(refused.message(), HasSubstr("draining"));
    EXPECT_TRUE(absl::IsUnavailable(service_->Connect().status()));
    EXPECT_EQ(service_->Health().state(), ServiceHealth::DRAINING);
  }
  EXPECT_TRUE(service_->Drain(kNever).ok());
  EXPECT_TRUE(client_->Next(kNever)->status.ok());
  EXPECT_TRUE(service_->Shutdown(kNever).ok());
  EXPECT_EQ(service_->Health().state(), ServiceHealth::STOPPED);
  EXPECT_TRUE(absl::IsUnavailable(client_->Next(kNever).status()));
  EXPECT_TRUE(absl::IsUnavailable(client_->Control(Open(), kNever).status()));
  service_ = nullptr;  // the client lives on
  EXPECT_TRUE(absl::IsUnavailable(client_->Submit(second.request).status()));
}

TEST_F(ServiceTest, ShutdownCancelsTheQueue) {
  Start();
  TokensRequest request(OpenOne(), {0});
  std::thread shutdown;
  {
    const Busy busy(*service_);
    ASSERT_TRUE(client_->Submit(request.request).ok());
    shutdown = std::thread([&] { EXPECT_TRUE(service_->Shutdown(kNever).ok()); });
    while (service_->Health().state() != ServiceHealth::STOPPED) {
      absl::SleepFor(absl::Milliseconds(1));
    }
  }
  shutdown.join();
  EXPECT_TRUE(absl::IsCancelled(client_->Next(kNever)->status));
  EXPECT_TRUE(absl::IsUnavailable(client_->Next(kNever).status()));
  EXPECT_TRUE(request.is_untouched());
}

TEST_F(ServiceTest, ChecksItsOptions) {
  const std::pair<std::function<void(ServiceOptions&)>, std::string> wrongs[] = {
      {[](ServiceOptions& o) { o.max_queued = 0; }, "max_queued = 0"},
      {[](ServiceOptions& o) { o.max_unread = -1; }, "max_unread = -1"},
      {[](ServiceOptions& o) { o.gate_dtype = DType::kF16; }, "gate_dtype = f16"},
      {[](ServiceOptions& o) { o.cache.config.num_q_heads = 2; }, "num_q_heads = 2"},
      {[](ServiceOptions& o) { o.cache.max_tokens = 0; }, "max_tokens = 0"},
      {[](ServiceOptions& o) { o.cache.max_tokens = kMaxInt64; },
       "max_tokens = 9223372036854775807"},
      {[](ServiceOptions& o) { o.cache.max_sequences = 1 << 30; }, "max_sequences = 1073741824"},
      {[](ServiceOptions& o) { o.cache.max_step_rows = 1 << 30; }, "max_step_rows = 1073741824"},
      {[](ServiceOptions& o) { o.cache.summary_tokens = kMaxInt64; }, "summary_tokens = 92"},
      {[](ServiceOptions& o) { o.cache.max_rollback_tokens = kMaxInt64; }, "rollback_tokens = 92"},
      {[](ServiceOptions& o) { o.cache.num_pages = -1; }, "num_pages = -1"},
      {[](ServiceOptions& o) { o.cache.max_rollback_tokens = 63; }, "max_rollback_tokens = 63"},
  };
  for (const auto& [spoil, message] : wrongs) {
    ServiceOptions options = SmallService();
    spoil(options);
    const absl::Status status =
        Service::Create(options, std::move((*comm::LoopbackGroup::Create(1))[0]), kernels_)
            .status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(status.message(), HasSubstr(message));
  }
}

// Two ranks, each with a client, as threads.
void OnTwoRanks(bool is_reachable,
                const std::function<void(int rank, Service&, comm::Communicator&)>& run,
                const std::shared_ptr<FailingKernels>& kernels_of_rank_0 = MakeKernels(),
                absl::Duration timeout = absl::Minutes(1)) {
  auto group = *comm::LoopbackGroup::Create(2, {.timeout = timeout});
  std::vector<std::thread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([&, rank] {
      std::shared_ptr<comm::Communicator> communicator = std::move(group[rank]);
      if (!is_reachable) {
        communicator = std::make_shared<test::UnreachableCommunicator>(communicator);
      }
      auto service = Service::Create(SmallService(), communicator,
                                     rank == 0 ? kernels_of_rank_0 : MakeKernels());
      ASSERT_TRUE(service.ok()) << service.status();
      run(rank, **service, *communicator);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

class TwoRanks : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Caches, TwoRanks, testing::Bool(),
                         [](const auto& info) { return info.param ? "Reachable" : "Fetched"; });

TEST(TwoRanksShares, MustHaveAFiniteSum) {
  auto group = *comm::LoopbackGroup::Create(2);
  std::vector<std::thread> threads;
  for (auto& communicator : group) {
    threads.emplace_back([&communicator] {
      serving::KvCacheOptions options = SmallService().cache;
      options.home_shares = {1e308, 1e308};
      const absl::Status status =
          serving::KvCache::Create(
              options, std::move(communicator),
              std::shared_ptr<kernels::Kernels>(*kernels::CpuKernels::Create({.num_threads = 1})))
              .status();
      EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
      EXPECT_THAT(status.message(), HasSubstr("home_shares = {1e+308, 1e+308}"));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_P(TwoRanks, ServeOneOfThemAlone) {
  OnTwoRanks(GetParam(), [](int rank, Service& service, comm::Communicator&) {
    if (rank == 1) return;  // destroys it, while the other has work
    auto client = *service.Connect();
    const SequenceId sequence = client->Control(Open(), kNever)->sequence();
    for (int64_t i = 0; i < 20; ++i) {
      TokensRequest request(sequence, Tokens(10, 10 * i));
      ASSERT_TRUE(client->Submit(request.request).ok());
      ASSERT_TRUE(client->Next(kNever)->status.ok());
      if (i < 19) continue;
      EXPECT_EQ(request.o, AloneCache().Decode(Tokens(200), 10));
    }
  });
}

TEST_P(TwoRanks, TakeAShardedForward) {
  OnTwoRanks(GetParam(), [](int rank, Service& service, comm::Communicator& communicator) {
    auto client = *service.Connect();
    const std::vector<int64_t> tokens = Tokens(150);
    const SequenceId sequence = client->Control(Open(), kNever)->sequence();
    const TokensRequest own(sequence,
                            {tokens.begin() + 75 * rank, tokens.begin() + 75 * rank + 75});
    // Meanwhile each decodes what is its own.
    TokensRequest beside(client->Control(Open(), kNever)->sequence(), Tokens(3));
    ASSERT_TRUE(client->Submit(beside.request).ok());
    const absl::Status status = client->RunCollective([&](serving::KvCache& cache) {
      EngineOptions options;
      options.config = SmallConfig();
      options.dtype = DType::kF32;
      // The communicator outlives the engine; the kernels are the cache's own kind.
      auto engine = Engine::Create(
          options, *ShardPlan::Parse("contiguous", 150, 2),
          std::shared_ptr<comm::Communicator>(&communicator, [](comm::Communicator*) {}),
          std::shared_ptr<kernels::Kernels>(*kernels::CpuKernels::Create({.num_threads = 1})));
      if (!engine.ok()) return engine.status();
      ForwardInputs inputs;
      inputs.q = own.request.inputs.q;
      inputs.gate = own.request.inputs.gate;
      inputs.SetSharedKv(own.request.inputs.kv.k_slc, own.request.inputs.kv.v_slc);
      ForwardOutputs outputs;
      outputs.o = own.request.o;
      if (absl::Status ran = (*engine)->Forward(inputs, outputs); !ran.ok()) return ran;
      return cache.AppendForward(/*home=*/1, sequence, **engine, inputs, /*document=*/0);
    });
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_TRUE(client->Next(kNever)->status.ok());
    EXPECT_EQ(beside.o, AloneCache().Decode(Tokens(3), 3));
    if (rank == 0) return;
    TokensRequest next(sequence, {150});
    ASSERT_TRUE(client->Submit(next.request).ok());
    const auto result = client->Next(kNever);
    ASSERT_TRUE(result->status.ok()) << result->status;
    EXPECT_EQ(next.o, AloneCache().Decode(Tokens(151), 1));
  });
}

TEST(TwoRanksFetching, GoOnWithoutEachOther) {
  absl::Notification has_begun;
  OnTwoRanks(/*is_reachable=*/false,
             [&](int rank, Service& service, comm::Communicator& communicator) {
               auto client = *service.Connect();
               TokensRequest before(client->Control(Open(), kNever)->sequence(), Tokens(40));
               ASSERT_TRUE(client->Submit(before.request).ok());
               ASSERT_TRUE(client->Next(kNever)->status.ok());
               if (rank == 1) {
                 has_begun.WaitForNotification();
                 return communicator.Abort("tired");
               }
               has_begun.Notify();
               while (service.Health().state() == ServiceHealth::SERVING) {
                 absl::SleepFor(absl::Milliseconds(1));
               }
               EXPECT_EQ(service.Health().state(), ServiceHealth::DEGRADED);
               EXPECT_THAT(service.Health().reason(), HasSubstr("tired"));
               TokensRequest after(before.request.sequence, {40});
               ASSERT_TRUE(client->Submit(after.request).ok());
               const auto result = client->Next(kNever);
               ASSERT_TRUE(result->status.ok()) << result->status;
               EXPECT_EQ(after.o, AloneCache().Decode(Tokens(41), 1));
             });
}

TEST(TwoRanksFetching, AStepThatDoesNotBeginHarmsNoOther) {
  const auto kernels = MakeKernels();
  absl::Notification has_failed;
  OnTwoRanks(
      /*is_reachable=*/false,
      [&](int rank, Service& service, comm::Communicator& communicator) {
        auto client = *service.Connect();
        TokensRequest request(client->Control(Open(), kNever)->sequence(), Tokens(3));
        const auto decode = [&] {
          EXPECT_TRUE(client->Submit(request.request).ok());
          return client->Next(kNever)->status;
        };
        if (rank == 0) {
          kernels->fails_to_gather = true;
          EXPECT_EQ(decode(), absl::InternalError("CopyPieces was told to fail"));
          kernels->num_copies_that_fail = 2;  // of the plan, and of the empty one in its place
          EXPECT_EQ(decode(), absl::InternalError("CopyFromHost was told to fail"));
          has_failed.Notify();
        } else {
          has_failed.WaitForNotification();
        }
        EXPECT_TRUE(decode().ok());
        EXPECT_EQ(request.o, AloneCache().Decode(Tokens(3), 3));
        EXPECT_TRUE(communicator.HealthCheck().ok()) << communicator.HealthCheck();
        EXPECT_TRUE(
            client->RunCollective([&](serving::KvCache&) { return communicator.Barrier(); }).ok());
      },
      kernels);
}

TEST(TwoRanksFetching, ACollectiveThatOneRankMissesEnds) {
  absl::Notification is_missed;
  OnTwoRanks(
      /*is_reachable=*/false,
      [&](int rank, Service& service, comm::Communicator& communicator) {
        auto client = *service.Connect();
        const auto meet = [&] {
          return client->RunCollective([&](serving::KvCache&) { return communicator.Barrier(); });
        };
        if (rank == 0) {
          EXPECT_EQ(meet(),
                    absl::DeadlineExceededError("RunCollective: rank 0 waited 1s for rank 1"));
          is_missed.Notify();
        } else {
          is_missed.WaitForNotification();
        }
        EXPECT_TRUE(meet().ok());
      },
      MakeKernels(), absl::Seconds(1));
}

TEST(TwoRanksFetching, AreShutDownTogetherOrAtTheDeadline) {
  absl::Notification is_down;
  OnTwoRanks(/*is_reachable=*/false, [&](int rank, Service& service, comm::Communicator&) {
    if (rank == 1) return is_down.WaitForNotification();
    EXPECT_TRUE(absl::IsDeadlineExceeded(service.Shutdown(In(absl::Milliseconds(20)))));
    is_down.Notify();
  });
}

}  // namespace
}  // namespace nsa
