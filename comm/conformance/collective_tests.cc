#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "comm/conformance/check.h"
#include "comm/conformance/conformance.h"

namespace nsa::comm::conformance {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(30);

// A byte that depends on who made it, for which purpose, and where it lies.
unsigned char Pattern(int64_t seed, int64_t position) {
  uint64_t x = static_cast<uint64_t>(seed) * 0x9E3779B97F4A7C15u + static_cast<uint64_t>(position);
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9u;
  return static_cast<unsigned char>(x >> 56);
}

void Fill(int64_t seed, int64_t begin, int64_t num_bytes, unsigned char* data) {
  for (int64_t i = 0; i < num_bytes; ++i) data[i] = Pattern(seed, begin + i);
}

// The first position that differs, or -1.
int64_t FirstDifference(int64_t seed, int64_t begin, int64_t num_bytes, const unsigned char* data) {
  for (int64_t i = 0; i < num_bytes; ++i) {
    if (data[i] != Pattern(seed, begin + i)) return i;
  }
  return -1;
}

// Sizes that cross the thresholds between protocols, zero among them.
int64_t RandomSize(std::mt19937_64& random) {
  constexpr int64_t kLimits[] = {1, 2, 64, 1000, 9000, 40000, 300000};
  return random() % kLimits[random() % std::size(kLimits)];
}

absl::Status CheckAllGatherOnce(Communicator& comm, const std::vector<GatherRun>& runs,
                                int64_t total_bytes, int64_t seed) {
  // Poison shows runs that were not filled, and writes between runs.
  std::vector<unsigned char> buffer(total_bytes, 0xEE);
  std::vector<unsigned char> want(total_bytes, 0xEE);
  for (const GatherRun& run : runs) {
    Fill(seed, run.offset_bytes, run.num_bytes, want.data() + run.offset_bytes);
    if (run.rank == comm.rank()) {
      std::copy_n(want.data() + run.offset_bytes, run.num_bytes, buffer.data() + run.offset_bytes);
    }
  }
  NSA_COMM_OK(comm.AllGather(buffer.data(), runs, nullptr));
  NSA_COMM_CHECK(buffer == want, "seed " + std::to_string(seed));
  return absl::OkStatus();
}

absl::Status AllGatherRandomRuns(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  for (int round = 0; round < 40; ++round) {
    std::mt19937_64 random(round);  // the same runs on all ranks
    std::vector<GatherRun> runs;
    int64_t end = 0;
    const int count = random() % 12;
    for (int i = 0; i < count; ++i) {
      if (random() % 2 == 0) end += random() % 100;  // a gap
      runs.push_back({static_cast<int32_t>(random() % context.size), end, RandomSize(random)});
      end += runs.back().num_bytes;
    }
    std::shuffle(runs.begin(), runs.end(), random);
    NSA_COMM_OK(CheckAllGatherOnce(**comm, runs, end + 10, round));
  }
  return absl::OkStatus();
}

absl::Status AllGatherEmptyRanks(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  NSA_COMM_OK((*comm)->AllGather(nullptr, {}, nullptr));
  for (int provider = 0; provider < context.size; ++provider) {
    NSA_COMM_OK(CheckAllGatherOnce(**comm, {{provider, 3, 1000}, {0, 0, 0}}, 1010, provider));
  }
  return absl::OkStatus();
}

absl::Status AllGatherLarge(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  constexpr int64_t kTotal = int64_t{64} << 20;
  std::vector<GatherRun> runs;
  // Zig-zag: rank r provides chunks r and 2P - 1 - r; the last takes the remainder.
  const int chunks = 2 * context.size;
  const int64_t chunk = kTotal / chunks;
  for (int i = 0; i < chunks; ++i) {
    const int64_t begin = i * chunk;
    runs.push_back(
        {i < context.size ? i : chunks - 1 - i, begin, i == chunks - 1 ? kTotal - begin : chunk});
  }
  return CheckAllGatherOnce(**comm, runs, kTotal, 7);
}

// Both ends compute the same plan: plan[a][b] are the sizes that a sends to b, in order.
std::vector<std::vector<std::vector<int64_t>>> RandomPlan(int size, int seed) {
  std::mt19937_64 random(seed);
  std::vector<std::vector<std::vector<int64_t>>> plan(size,
                                                      std::vector<std::vector<int64_t>>(size));
  for (auto& from : plan) {
    for (auto& to : from) {
      to.resize(random() % 4);
      for (int64_t& num_bytes : to) num_bytes = RandomSize(random);
    }
  }
  return plan;
}

int64_t MessageSeed(int round, int from, int to, size_t index) {
  return ((round * 64 + from) * 64 + to) * 64 + static_cast<int64_t>(index);
}

absl::Status ExchangeRandom(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  std::mt19937_64 local(context.rank + 1000);
  for (int round = 0; round < 40; ++round) {
    const auto plan = RandomPlan(context.size, round);
    std::vector<std::vector<unsigned char>> buffers;
    std::vector<SendOp> sends;
    std::vector<RecvOp> recvs;
    std::vector<int64_t> seeds;
    std::vector<int> peers(context.size);
    std::iota(peers.begin(), peers.end(), 0);
    std::shuffle(peers.begin(), peers.end(), local);  // order across peers is free
    for (int peer : peers) {
      const auto& outgoing = plan[context.rank][peer];
      for (size_t i = 0; i < outgoing.size(); ++i) {
        buffers.emplace_back(outgoing[i]);
        Fill(MessageSeed(round, context.rank, peer, i), 0, outgoing[i], buffers.back().data());
        sends.push_back({peer, buffers.back().data(), outgoing[i]});
      }
    }
    std::shuffle(peers.begin(), peers.end(), local);
    for (int peer : peers) {
      const auto& incoming = plan[peer][context.rank];
      for (size_t i = 0; i < incoming.size(); ++i) {
        buffers.emplace_back(incoming[i], 0xEE);
        recvs.push_back({peer, buffers.back().data(), incoming[i]});
        seeds.push_back(MessageSeed(round, peer, context.rank, i));
      }
    }
    NSA_COMM_OK((*comm)->Exchange(sends, recvs, nullptr));
    for (size_t i = 0; i < recvs.size(); ++i) {
      const int64_t at = FirstDifference(seeds[i], 0, recvs[i].num_bytes,
                                         static_cast<unsigned char*>(recvs[i].data));
      NSA_COMM_CHECK(at == -1, absl::StrCat("round ", round, " recv ", i, " byte ", at));
    }
  }
  return absl::OkStatus();
}

// As many as packed documents cause: more than a transport may take at a time.
absl::Status ManyMessages(const Context& context) {
  constexpr int kMessages = 1500, kMostBytes = 96;
  const auto size_of = [](int i) { return int64_t{i % kMostBytes}; };
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  const int64_t place = int64_t{kMessages} * kMostBytes;  // of a peer
  std::vector<unsigned char> out(context.size * place), in(context.size * place, 0xEE);
  std::vector<SendOp> sends;
  std::vector<RecvOp> recvs;
  for (int peer = 0; peer < context.size; ++peer) {
    if (peer == context.rank) continue;
    // The higher rank sends less.
    for (int i = 0; i < kMessages; ++i) {
      unsigned char* const to_send = out.data() + peer * place + i * kMostBytes;
      unsigned char* const received = in.data() + peer * place + i * kMostBytes;
      Fill(MessageSeed(0, context.rank, peer, i), 0, size_of(i), to_send);
      if (context.rank < peer || i < 10) sends.push_back({peer, to_send, size_of(i)});
      if (peer < context.rank || i < 10) recvs.push_back({peer, received, size_of(i)});
    }
  }
  NSA_COMM_OK((*comm)->Exchange(sends, recvs, nullptr));
  for (int peer = 0; peer < context.size; ++peer) {
    if (peer == context.rank) continue;
    for (int i = 0; i < (peer < context.rank ? kMessages : 10); ++i) {
      const unsigned char* const received = in.data() + peer * place + i * kMostBytes;
      NSA_COMM_CHECK(
          FirstDifference(MessageSeed(0, peer, context.rank, i), 0, size_of(i), received) == -1,
          absl::StrCat("message ", i, " of rank ", peer));
    }
  }
  std::vector<GatherRun> runs;
  for (int i = 0; i < kMessages * context.size; ++i) {
    runs.push_back({i * 7 % context.size, int64_t{i} * 16, 16});
  }
  return CheckAllGatherOnce(**comm, runs, kMessages * context.size * 16, 5);
}

absl::Status ExchangeLargeRing(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  constexpr int64_t kBytes = int64_t{64} << 20;
  const int next = (context.rank + 1) % context.size;
  const int previous = (context.rank + context.size - 1) % context.size;
  std::vector<unsigned char> out(kBytes);
  std::vector<unsigned char> in(kBytes);
  Fill(context.rank, 0, kBytes, out.data());
  NSA_COMM_OK((*comm)->Exchange({{SendOp{next, out.data(), kBytes}}},
                                {{RecvOp{previous, in.data(), kBytes}}}, nullptr));
  NSA_COMM_CHECK(FirstDifference(previous, 0, kBytes, in.data()) == -1, "ring data");
  return absl::OkStatus();
}

// Rank 0 alone sees the mismatch, and the group goes on working.
absl::Status ExchangeMismatch(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  for (const int64_t bytes : {int64_t{100}, int64_t{1} << 20}) {
    std::vector<unsigned char> a(bytes, 1);
    std::vector<unsigned char> b(bytes, 2);
    absl::Status status;
    // Sizes differ.
    if (context.rank == 0) {
      status =
          (*comm)->Exchange({}, {{RecvOp{1, a.data(), bytes - 1}, {1, b.data(), bytes}}}, nullptr);
      NSA_COMM_FAILS(status, absl::StatusCode::kInvalidArgument, absl::StrCat(bytes - 1));
      NSA_COMM_FAILS(status, absl::StatusCode::kInvalidArgument, absl::StrCat(bytes));
      NSA_COMM_FAILS(status, absl::StatusCode::kInvalidArgument, "rank 1");
      NSA_COMM_CHECK(b == std::vector<unsigned char>(bytes, 9), "the matching message arrives");
    } else if (context.rank == 1) {
      b.assign(bytes, 9);
      NSA_COMM_OK(
          (*comm)->Exchange({{SendOp{0, a.data(), bytes}, {0, b.data(), bytes}}}, {}, nullptr));
    } else {
      NSA_COMM_OK((*comm)->Exchange({}, {}, nullptr));
    }
    // Numbers differ.
    if (context.rank == 0) {
      status = (*comm)->Exchange({}, {{RecvOp{1, a.data(), bytes}}}, nullptr);
      NSA_COMM_FAILS(status, absl::StatusCode::kInvalidArgument, "2 messages");
    } else if (context.rank == 1) {
      NSA_COMM_OK(
          (*comm)->Exchange({{SendOp{0, a.data(), bytes}, {0, b.data(), bytes}}}, {}, nullptr));
    } else {
      NSA_COMM_OK((*comm)->Exchange({}, {}, nullptr));
    }
    NSA_COMM_OK((*comm)->Barrier());
    NSA_COMM_OK(CheckAllGatherOnce(**comm, {{0, 0, 100}, {1, 100, 77}}, 177, 3));
  }
  return (*comm)->HealthCheck();
}

absl::Status InvalidArguments(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  const auto invalid = absl::StatusCode::kInvalidArgument;
  char bytes[16] = {};
  Communicator& c = **comm;
  NSA_COMM_FAILS(c.AllGather(bytes, {{{context.size, 0, 1}}}, nullptr), invalid, "runs[0].rank");
  NSA_COMM_FAILS(c.AllGather(bytes, {{{0, -1, 1}}}, nullptr), invalid, "runs[0].offset_bytes");
  NSA_COMM_FAILS(c.AllGather(bytes, {{{0, 0, -1}}}, nullptr), invalid, "runs[0].num_bytes");
  NSA_COMM_FAILS(c.AllGather(bytes, {{{0, 4, 4}, {0, 0, 5}}}, nullptr), invalid, "overlap");
  NSA_COMM_FAILS(c.AllGather(nullptr, {{{0, 0, 1}}}, nullptr), invalid, "buffer");
  NSA_COMM_FAILS(c.Exchange({{SendOp{-1, bytes, 1}}}, {}, nullptr), invalid, "sends[0].peer");
  NSA_COMM_FAILS(c.Exchange({}, {{RecvOp{context.size, bytes, 1}}}, nullptr), invalid,
                 "recvs[0].peer");
  NSA_COMM_FAILS(c.Exchange({{SendOp{0, nullptr, 1}}}, {}, nullptr), invalid, "sends[0].data");
  NSA_COMM_FAILS(c.Exchange({{SendOp{0, bytes, -5}}}, {}, nullptr), invalid, "-5");
  NSA_COMM_FAILS(c.Exchange({{SendOp{context.rank, bytes, 2}}}, {}, nullptr), invalid, "itself");
  NSA_COMM_FAILS(
      c.Exchange({{SendOp{context.rank, bytes, 2}}}, {{RecvOp{context.rank, bytes, 3}}}, nullptr),
      invalid, "itself");
  NSA_COMM_FAILS(c.CreateWindow(-1).status(), invalid, "num_bytes");
  // Nothing was sent, nothing is broken.
  NSA_COMM_OK(c.HealthCheck());
  return c.Barrier();
}

absl::Status HostAllGatherSizes(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  NSA_COMM_CHECK((*comm)->rank() == context.rank && (*comm)->size() == context.size,
                 "rank and size");
  NSA_COMM_CHECK((*comm)->timeout() == kTimeout, "timeout");
  for (int round = 0; round < 30; ++round) {
    // Some big, some empty, in turn on each rank.
    const auto blob = [&](int rank) {
      std::mt19937_64 random(round * 100 + rank);
      const int64_t size = (round + rank) % 7 == 0 ? 5 << 20 : RandomSize(random);
      std::string bytes(size, '\0');
      Fill(round * 100 + rank, 0, size, reinterpret_cast<unsigned char*>(bytes.data()));
      return bytes;
    };
    auto all = (*comm)->HostAllGather(blob(context.rank));
    NSA_COMM_OK(all.status());
    NSA_COMM_CHECK(static_cast<int>(all->size()) == context.size, "size of the result");
    for (int rank = 0; rank < context.size; ++rank) {
      NSA_COMM_CHECK((*all)[rank] == blob(rank), absl::StrCat("round ", round, " rank ", rank));
    }
  }
  return absl::OkStatus();
}

// Nobody leaves a barrier before the last has come: clocks are those of one host.
absl::Status BarrierHolds(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  for (int round = 0; round < 8; ++round) {
    if (round % context.size == context.rank) absl::SleepFor(absl::Milliseconds(15));
    const int64_t came = absl::GetCurrentTimeNanos();
    NSA_COMM_OK((*comm)->Barrier());
    const int64_t left = absl::GetCurrentTimeNanos();
    auto all = (*comm)->HostAllGather(absl::StrCat(came));
    NSA_COMM_OK(all.status());
    for (const std::string& other : *all) {
      NSA_COMM_CHECK(std::stoll(other) <= left, absl::StrCat("round ", round));
    }
  }
  return absl::OkStatus();
}

absl::Status MixedCalls(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  std::mt19937_64 local(context.rank);
  for (int round = 0; round < 200; ++round) {
    // Ranks drift apart, so that messages come early.
    if (local() % 16 == 0) absl::SleepFor(absl::Microseconds(local() % 2000));
    switch ((round * 7) % 4) {
      case 0:
        NSA_COMM_OK((*comm)->Barrier());
        break;
      case 1:
        NSA_COMM_OK(CheckAllGatherOnce(**comm, {{round % context.size, 0, 100 + round * 100}},
                                       100 + round * 100, round));
        break;
      case 2: {
        auto all = (*comm)->HostAllGather(absl::StrCat(context.rank, ":", round));
        NSA_COMM_OK(all.status());
        NSA_COMM_CHECK(all->back() == absl::StrCat(context.size - 1, ":", round), all->back());
        break;
      }
      case 3: {
        // One way only: rank 0 runs ahead of the others.
        const int64_t value = round;
        int64_t got = -1;
        std::vector<SendOp> sends;
        std::vector<RecvOp> recvs;
        if (context.rank + 1 < context.size) sends.push_back({context.rank + 1, &value, 8});
        if (context.rank > 0) recvs.push_back({context.rank - 1, &got, 8});
        NSA_COMM_OK((*comm)->Exchange(sends, recvs, nullptr));
        NSA_COMM_CHECK(context.rank == 0 || got == round, got);
        break;
      }
    }
  }
  return absl::OkStatus();
}

absl::Status TwoCommunicators(const Context& context) {
  auto a = context.create(kTimeout);
  NSA_COMM_OK(a.status());
  auto b = context.create(kTimeout);
  NSA_COMM_OK(b.status());
  for (int round = 0; round < 10; ++round) {
    NSA_COMM_OK(CheckAllGatherOnce(round % 2 ? **a : **b, {{0, 0, 20000}}, 20000, round));
    NSA_COMM_OK(((round / 2) % 2 ? *a : *b)->Barrier());
  }
  a->reset();
  return (*b)->Barrier();
}

absl::Status CreateAndDestroy(const Context& context) {
  for (int round = 0; round < 8; ++round) {
    auto comm = context.create(kTimeout);
    NSA_COMM_OK(comm.status());
    // Destroyed right after its last call, used or not, while slower ranks are still in it.
    if (round % 2 == 0) NSA_COMM_OK(CheckAllGatherOnce(**comm, {{0, 0, 100000}}, 100000, round));
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<Test> CollectiveTests() {
  return {
      {"AllGatherRandomRuns", 1, AllGatherRandomRuns},
      {"AllGatherEmptyRanks", 1, AllGatherEmptyRanks},
      {"AllGatherLarge", 1, AllGatherLarge},
      {"ExchangeRandom", 1, ExchangeRandom},
      {"ExchangeLargeRing", 1, ExchangeLargeRing},
      {"ManyMessages", 1, ManyMessages},
      {"ExchangeMismatch", 2, ExchangeMismatch},
      {"InvalidArguments", 1, InvalidArguments},
      {"HostAllGatherSizes", 1, HostAllGatherSizes},
      {"BarrierHolds", 1, BarrierHolds},
      {"MixedCalls", 1, MixedCalls},
      {"TwoCommunicators", 1, TwoCommunicators},
      {"CreateAndDestroy", 1, CreateAndDestroy},
  };
}

std::vector<Test> AllTests() {
  std::vector<Test> all = CollectiveTests();
  for (auto tests : {WindowTests(), ErrorTests()}) {
    all.insert(all.end(), tests.begin(), tests.end());
  }
  return all;
}

}  // namespace nsa::comm::conformance
