#include "comm/bootstrap/tcp_bootstrap.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "comm/bootstrap/rendezvous.h"
#include "comm/bootstrap/socket.h"
#include "comm/conformance/launch.h"
#include "comm/errors.h"
#include "comm/wire.h"
#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

using conformance::FreePort;
using conformance::Notify;
using conformance::Processes;
using testing::Test;

TcpBootstrapOptions Options(int rank, int world_size, int port,
                            absl::Duration timeout = absl::Seconds(20)) {
  TcpBootstrapOptions options;
  options.rank = rank;
  options.world_size = world_size;
  options.master_addr = "127.0.0.1";
  options.master_port = port;
  options.timeout = timeout;
  options.port_offset = 0;
  return options;
}

// What every process gets, in the order of `all`.
std::vector<absl::Status> CreateAll(const std::vector<TcpBootstrapOptions>& all) {
  std::vector<absl::Status> statuses(all.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < all.size(); ++i) {
    threads.emplace_back([&, i] {
      auto bootstrap = CreateTcpBootstrap(all[i]);
      statuses[i] = bootstrap.status();
      // Nobody leaves before all have come, else the latter see the former go.
      if (bootstrap.ok()) {
        statuses[i] = (*bootstrap)->AllGather("", absl::Seconds(10), "test").status();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

void ExpectAll(const std::vector<absl::Status>& statuses, absl::StatusCode code,
               absl::string_view part) {
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), part)) << status;
  }
}

TEST(FreeRendezvousAddressTest, RanksMeetThere) {
  const absl::StatusOr<std::string> address = FreeRendezvousAddress("127.0.0.1");
  ASSERT_TRUE(address.ok()) << address.status();
  ASSERT_EQ(address->rfind("127.0.0.1:", 0), 0u) << *address;
  const int port = std::stoi(address->substr(10));
  EXPECT_EQ(CreateAll({Options(0, 2, port), Options(1, 2, port)}),
            std::vector<absl::Status>(2, absl::OkStatus()));
}

TEST(FreeRendezvousAddressTest, FindsAHostByItself) {
  const absl::StatusOr<std::string> address = FreeRendezvousAddress();
  ASSERT_TRUE(address.ok()) << address.status();
  EXPECT_GT(std::stoi(address->substr(address->rfind(':') + 1)), 0) << *address;
}

TEST(FreeRendezvousAddressTest, NamesAHostThatIsUnknown) {
  const absl::Status status = FreeRendezvousAddress("no-such-host.invalid").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(status.message(), "host: 'no-such-host.invalid'")) << status;
}

TEST(TcpBootstrapTest, GathersInRankOrder) {
  for (int size : {1, 2, 5}) {
    const int port = FreePort();
    EXPECT_EQ(conformance::RunOnThreads(
                  size,
                  [&](int rank) -> absl::Status {
                    auto bootstrap = CreateTcpBootstrap(Options(rank, size, port));
                    if (!bootstrap.ok()) return bootstrap.status();
                    for (int round = 0; round < 50; ++round) {
                      const std::string mine(round % 5 == rank ? 3 << 20 : rank, 'a' + rank);
                      auto all = (*bootstrap)->AllGather(mine, absl::Seconds(10), "test");
                      if (!all.ok()) return all.status();
                      for (int r = 0; r < size; ++r) {
                        const std::string want(round % 5 == r ? 3 << 20 : r, 'a' + r);
                        if ((*all)[r] != want) return absl::InternalError("wrong bytes");
                      }
                    }
                    return absl::OkStatus();
                  }),
              absl::OkStatus());
  }
}

TEST(TcpBootstrapTest, RetriesUntilRankZeroComes) {
  const int port = FreePort();
  std::thread late([&] {
    absl::SleepFor(absl::Milliseconds(300));
    EXPECT_TRUE(CreateTcpBootstrap(Options(0, 2, port)).ok());
  });
  EXPECT_TRUE(CreateTcpBootstrap(Options(1, 2, port)).ok());
  late.join();
}

TEST(TcpBootstrapTest, MissingRankIsNamed) {
  const int port = FreePort();
  const absl::Duration brief = absl::Milliseconds(400);
  ExpectAll(CreateAll({Options(0, 4, port, brief), Options(2, 4, port, brief)}),
            absl::StatusCode::kDeadlineExceeded,
            "rendezvous: rank 0 waited 400ms for ranks 1 and 3");
}

TEST(TcpBootstrapTest, MissingRankZeroIsNamed) {
  const absl::Status status =
      CreateTcpBootstrap(Options(1, 2, FreePort(), absl::Milliseconds(200))).status();
  ExpectAll({status}, absl::StatusCode::kDeadlineExceeded, "rank 1 waited 200ms for rank 0 at 127");
}

TEST(TcpBootstrapTest, DuplicateRankFailsAll) {
  const int port = FreePort();
  ExpectAll(CreateAll({Options(0, 3, port), Options(1, 3, port), Options(1, 3, port)}),
            absl::StatusCode::kInvalidArgument,
            "two processes of the group say that they are rank 1");
}

TEST(TcpBootstrapTest, DuplicateRankZeroFailsAll) {
  const int port = FreePort();
  ExpectAll(CreateAll({Options(0, 3, port), Options(0, 3, port), Options(1, 3, port)}),
            absl::StatusCode::kInvalidArgument,
            "two processes of the group say that they are rank 0");
}

TEST(TcpBootstrapTest, OtherWorldSizeFailsAllAlsoLatecomers) {
  const int port = FreePort();
  std::vector<absl::Status> late;
  std::thread latecomer([&] {
    absl::SleepFor(absl::Milliseconds(300));
    late.push_back(CreateTcpBootstrap(Options(3, 4, port)).status());
  });
  auto statuses = CreateAll({Options(0, 4, port), Options(1, 4, port), Options(2, 5, port)});
  latecomer.join();
  statuses.push_back(late.at(0));
  ExpectAll(statuses, absl::StatusCode::kInvalidArgument,
            "world_size (WORLD_SIZE): rank 2 says 5, rank 0 says 4");
}

TEST(TcpBootstrapTest, RankZeroThatCanOpenNoMoreTellsAll) {
  const int port = FreePort();
  const std::string part = "rendezvous: rank 0: accepting a connection: Too many open files";
  Processes processes(4, [&](int rank) -> absl::Status {
    if (rank == 0) {
      // Room for the listener and one connection.
      const int next = dup(STDERR_FILENO);
      close(next);
      const rlimit limit = {static_cast<rlim_t>(next) + 2, static_cast<rlim_t>(next) + 2};
      if (next < 0 || setrlimit(RLIMIT_NOFILE, &limit) != 0)
        return absl::InternalError("setrlimit");
    }
    return CreateTcpBootstrap(Options(rank, 4, port)).status();
  });
  for (const conformance::ProcessResult& result : processes.Join()) {
    ExpectAll({result.status}, absl::StatusCode::kResourceExhausted, part);
    EXPECT_LT(result.run_time, absl::Seconds(10));
  }
}

TEST(TcpBootstrapTest, OtherVersionFailsAll) {
  const int port = FreePort();
  std::thread other_build([&] {
    const SocketAddress server = Resolve("127.0.0.1", absl::InfiniteFuture())->front();
    const absl::Time deadline = absl::Now() + absl::Seconds(10);
    absl::StatusOr<Fd> socket = absl::NotFoundError("");
    while (!socket.ok()) socket = Connect(server.WithPort(port), deadline);
    WireWriter payload;
    payload.PutString(absl::StrCat(port, "/"));
    payload.PutInt64(kRendezvousVersion + 1);
    payload.PutInt64(3);
    payload.PutInt64(2);
    WireWriter length;
    length.PutInt64(payload.bytes().size());
    ASSERT_TRUE(
        SendAll(*socket, kRendezvousMagic + length.bytes() + payload.bytes(), deadline).ok());
    std::string end;
    ReceiveAll(*socket, 1 << 20, end, deadline).IgnoreError();  // until rank 0 closes
    EXPECT_TRUE(absl::StrContains(end, "must run the same build"));
  });
  ExpectAll(CreateAll({Options(0, 3, port), Options(1, 3, port)}),
            absl::StatusCode::kFailedPrecondition, "rank 2 speaks protocol version 2");
  other_build.join();
}

// They send a part of a hello, and no more.
TEST(TcpBootstrapTest, StrangersThatFallSilentHoldNobodyUp) {
  const int port = FreePort();
  const absl::Duration timeout = absl::Seconds(4);
  absl::Status rank_zero;
  std::thread server(
      [&] { rank_zero = CreateTcpBootstrap(Options(0, 2, port, timeout)).status(); });
  const SocketAddress address = Resolve("127.0.0.1", absl::InfiniteFuture())->front();
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  std::vector<Fd> strangers;
  while (strangers.size() < 6 && absl::Now() < deadline) {
    absl::StatusOr<Fd> socket = Connect(address.WithPort(port), deadline);
    if (!socket.ok()) continue;
    EXPECT_TRUE(SendAll(*socket, "NSA-", deadline).ok());
    strangers.push_back(*std::move(socket));
  }
  EXPECT_TRUE(CreateTcpBootstrap(Options(1, 2, port, timeout)).ok());
  server.join();
  EXPECT_TRUE(rank_zero.ok()) << rank_zero;
}

// As torchrun's own store does, somebody else holds the first ports: one silent, one talking.
TEST(TcpBootstrapTest, PassesByForeignListeners) {
  const SocketAddress loopback = Resolve("127.0.0.1", absl::InfiniteFuture())->front();
  const int port = FreePort();
  absl::StatusOr<Fd> silent = Listen(loopback.WithPort(port));
  absl::StatusOr<Fd> talking = Listen(loopback.WithPort(port + 1));
  if (!silent.ok() || !talking.ok()) GTEST_SKIP() << "the ports are in use";
  absl::Notification done;
  std::thread talker([&] {
    while (!done.HasBeenNotified()) {
      for (auto guest = Accept(*talking); guest.ok() && guest->valid(); guest = Accept(*talking)) {
        SendAll(*guest, "220 mail.example.org ESMTP ready when you are\r\n", absl::Now())
            .IgnoreError();
      }
      absl::SleepFor(absl::Milliseconds(1));
    }
  });
  ExpectAll(CreateAll({Options(0, 2, port), Options(1, 2, port)}), absl::StatusCode::kOk, "");
  // The foreign server was sent nothing.
  const absl::StatusOr<Fd> guest = Accept(*silent);
  ASSERT_TRUE(guest.ok() && guest->valid());
  char byte;
  EXPECT_LE(recv(guest->get(), &byte, 1, MSG_DONTWAIT), 0);
  done.Notify();
  talker.join();
}

TEST(TcpBootstrapTest, GroupsOfOtherNamesDoNotMeet) {
  const int port = FreePort();
  auto a0 = Options(0, 2, port), a1 = Options(1, 2, port);
  auto b0 = a0, b1 = a1;
  b0.group = b1.group = "second";
  ExpectAll(CreateAll({a0, b0, b1, a1}), absl::StatusCode::kOk, "");
}

TEST(TcpBootstrapTest, ChecksOptions) {
  const auto message = [](auto change) {
    TcpBootstrapOptions options = Options(0, 2, 29500);
    change(options);
    const absl::Status status = CreateTcpBootstrap(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  };
  EXPECT_EQ(message([](auto& o) { o.rank = 2; }),
            "rank (RANK): 2; must be in [0, world_size), which is 2");
  EXPECT_EQ(message([](auto& o) { o.world_size = 0; }), "world_size (WORLD_SIZE): 0; must be >= 1");
  EXPECT_EQ(message([](auto& o) { o.master_port = 65536; }),
            "master_port (MASTER_PORT): 65536; must be in [1, 65535]");
  EXPECT_EQ(message([](auto& o) { o.timeout = absl::ZeroDuration(); }),
            "timeout: 0; must be positive and finite");
  EXPECT_TRUE(absl::StrContains(message([](auto& o) { o.master_addr = "no such host"; }),
                                "master_addr (MASTER_ADDR): 'no such host'"));
}

TEST(TcpBootstrapOptionsFromTest, ReadsTorchrunVariables) {
  std::map<std::string, std::string> env = {
      {"RANK", "3"}, {"WORLD_SIZE", "8"}, {"MASTER_ADDR", "node0"}, {"MASTER_PORT", "29500"}};
  const auto lookup = [&](const char* name) -> const char* {
    const auto it = env.find(name);
    return it == env.end() ? nullptr : it->second.c_str();
  };
  auto options = TcpBootstrapOptionsFrom(lookup);
  ASSERT_TRUE(options.ok()) << options.status();
  EXPECT_EQ(options->rank, 3);
  EXPECT_EQ(options->world_size, 8);
  EXPECT_EQ(options->master_addr, "node0");
  EXPECT_EQ(options->master_port, 29500);

  env["RANK"] = "3x";
  EXPECT_EQ(TcpBootstrapOptionsFrom(lookup).status().message(), "RANK: '3x'; must be an integer");
  env["RANK"] = "8";
  EXPECT_EQ(TcpBootstrapOptionsFrom(lookup).status().message(),
            "rank (RANK): 8; must be in [0, world_size), which is 8");
  env["RANK"] = "0";
  env.erase("MASTER_ADDR");
  EXPECT_EQ(TcpBootstrapOptionsFrom(lookup).status().message(),
            "MASTER_ADDR: not set; must name the host of rank 0");
  env.erase("WORLD_SIZE");
  EXPECT_EQ(TcpBootstrapOptionsFrom(lookup).status().message(),
            "WORLD_SIZE: not set; must be an integer");
}

// Collects events until a number of them has come.
class Events {
 public:
  explicit Events(Bootstrap& bootstrap) : bootstrap_(bootstrap) {
    bootstrap_.SetPeerHandler([this](const PeerEvent& event) {
      absl::MutexLock lock(&mu_);
      events_.push_back(event);
    });
  }
  ~Events() { bootstrap_.SetPeerHandler(nullptr); }
  // The first event; an empty kLeft of rank -1 if none comes.
  PeerEvent First() {
    absl::MutexLock lock(&mu_);
    const auto any = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !events_.empty(); };
    if (!mu_.AwaitWithTimeout(absl::Condition(&any), absl::Seconds(10))) {
      return {PeerEvent::Kind::kLeft, -1, absl::OkStatus()};
    }
    return events_.front();
  }

 private:
  Bootstrap& bootstrap_;
  absl::Mutex mu_;
  std::vector<PeerEvent> events_ ABSL_GUARDED_BY(mu_);
};

// Runs three processes; rank `victim` runs `leave`, the others must see it as their first event.
void ExpectFirstEvent(int victim, PeerEvent::Kind kind, absl::string_view text,
                      const std::function<void(std::unique_ptr<Bootstrap>)>& leave) {
  const int port = FreePort();
  Processes processes(3, [&](int rank) -> absl::Status {
    auto bootstrap = CreateTcpBootstrap(Options(rank, 3, port));
    if (!bootstrap.ok()) return bootstrap.status();
    if (auto all = (*bootstrap)->AllGather("", absl::Seconds(10), "test"); !all.ok()) {
      return all.status();
    }
    if (rank == victim) {
      // What rank 0 has still to send on shall be sent.
      absl::SleepFor(absl::Milliseconds(50));
      leave(*std::move(bootstrap));
      return absl::OkStatus();
    }
    Events events(**bootstrap);
    const PeerEvent first = events.First();
    if (first.rank != victim || first.kind != kind ||
        !absl::StrContains(first.error.message(), text)) {
      return absl::InternalError(absl::StrCat("first event: kind ", static_cast<int>(first.kind),
                                              " rank ", first.rank, ": ", first.error.ToString()));
    }
    const absl::Status after = (*bootstrap)->AllGather("", absl::Seconds(5), "later call").status();
    if (after.ok() || absl::IsDeadlineExceeded(after)) return absl::InternalError("late call");
    return absl::OkStatus();
  });
  const auto results = processes.Join();
  for (int rank = 0; rank < 3; ++rank) {
    if (rank != victim) {
      EXPECT_EQ(results[rank].status, absl::OkStatus());
      EXPECT_LT(results[rank].run_time, absl::Seconds(4));
    }
  }
}

TEST(ControlPlaneTest, TellsAllOfADeath) {
  for (int victim : {0, 2}) {
    ExpectFirstEvent(victim, PeerEvent::Kind::kDied, absl::StrCat("rank ", victim, " died"),
                     [](std::unique_ptr<Bootstrap>) { kill(getpid(), SIGKILL); });
  }
}

TEST(ControlPlaneTest, TellsAllOfAnAbort) {
  for (int victim : {0, 2}) {
    ExpectFirstEvent(victim, PeerEvent::Kind::kAborted,
                     absl::StrCat("rank ", victim, " aborted: out of luck"),
                     [](std::unique_ptr<Bootstrap> bootstrap) { bootstrap->Abort("out of luck"); });
  }
}

TEST(ControlPlaneTest, AbortEndsTheOwnAllGather) {
  const int port = FreePort();
  const absl::Status status = conformance::RunOnThreads(2, [&](int rank) -> absl::Status {
    auto bootstrap = CreateTcpBootstrap(Options(rank, 2, port));
    if (!bootstrap.ok()) return bootstrap.status();
    if (rank == 1) {
      absl::SleepFor(absl::Milliseconds(500));
      return absl::OkStatus();
    }
    std::thread aborter([&] {
      absl::SleepFor(absl::Milliseconds(50));
      (*bootstrap)->Abort("out of luck");
    });
    const absl::Time start = absl::Now();
    const absl::Status gathered =
        (*bootstrap)->AllGather("mine", absl::Seconds(10), "a call").status();
    aborter.join();
    EXPECT_EQ(gathered, AbortedBy(0, "out of luck"));
    EXPECT_LT(absl::Now() - start, absl::Milliseconds(400));
    return absl::OkStatus();
  });
  EXPECT_EQ(status, absl::OkStatus());
}

TEST(ControlPlaneTest, TellsAllOfALeave) {
  for (int victim : {0, 2}) {
    ExpectFirstEvent(victim, PeerEvent::Kind::kLeft, "",
                     [](std::unique_ptr<Bootstrap> bootstrap) { bootstrap.reset(); });
    ExpectFirstEvent(victim, PeerEvent::Kind::kFailed,
                     absl::StrCat("rank ", victim, " left the group after: INTERNAL: a fault"),
                     [](std::unique_ptr<Bootstrap> bootstrap) {
                       bootstrap->Leave(absl::InternalError("a fault"));
                     });
  }
}

TEST(ControlPlaneTest, LateAllGatherNamesWhoIsMissing) {
  const int port = FreePort();
  EXPECT_EQ(conformance::RunOnThreads(
                3,
                [&](int rank) -> absl::Status {
                  auto bootstrap = CreateTcpBootstrap(Options(rank, 3, port));
                  if (!bootstrap.ok()) return bootstrap.status();
                  if (rank == 1) {
                    absl::SleepFor(absl::Milliseconds(900));
                    return absl::OkStatus();
                  }
                  const absl::Status late =
                      (*bootstrap)->AllGather("", absl::Milliseconds(300), "Barrier").status();
                  absl::SleepFor(absl::Milliseconds(300));
                  const std::string want =
                      absl::StrCat("Barrier: rank ", rank, " waited 300ms for rank 1");
                  return late == absl::DeadlineExceededError(want) ? absl::OkStatus() : late;
                }),
            absl::OkStatus());
}

// A stopped process keeps its connection, so nobody hears of it; its peers end in time all the
// same.
TEST(ControlPlaneTest, StoppedRankDoesNotHoldUpTheOthersEnd) {
  for (int victim : {0, 1}) {
    const int port = FreePort();
    Processes processes(2, [&](int rank) -> absl::Status {
      auto bootstrap = CreateTcpBootstrap(Options(rank, 2, port));
      if (!bootstrap.ok()) return bootstrap.status();
      Notify();
      if (rank == victim) absl::SleepFor(absl::Seconds(60));
      absl::SleepFor(absl::Milliseconds(100));
      const absl::Status late =
          (*bootstrap)->AllGather("", absl::Milliseconds(300), "Barrier").status();
      if (!absl::StrContains(late.message(), absl::StrCat("for rank ", victim))) return late;
      const absl::Time start = absl::Now();
      bootstrap->reset();
      return absl::Now() - start < absl::Seconds(3) ? absl::OkStatus()
                                                    : absl::InternalError("slow to end");
    });
    ASSERT_TRUE(processes.AwaitNotify(0, absl::Seconds(10)));
    ASSERT_TRUE(processes.AwaitNotify(1, absl::Seconds(10)));
    processes.Signal(victim, SIGSTOP);
    absl::SleepFor(absl::Seconds(3));
    processes.Signal(victim, SIGKILL);
    EXPECT_EQ(processes.Join()[1 - victim].status, absl::OkStatus());
  }
}

}  // namespace
}  // namespace nsa::comm
