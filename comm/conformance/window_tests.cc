#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/conformance/check.h"
#include "comm/conformance/conformance.h"

namespace nsa::comm::conformance {
namespace {

constexpr absl::Duration kTimeout = absl::Seconds(30);

// What word `index` of the window of `rank` holds in `epoch`.
uint64_t Word(int rank, int64_t epoch, int64_t index) {
  return (static_cast<uint64_t>(rank) << 56) ^ (static_cast<uint64_t>(epoch) << 32) ^
         static_cast<uint64_t>(index);
}

void FillWindow(Window& window, int rank, int64_t epoch) {
  auto* words = static_cast<uint64_t*>(window.data());
  for (int64_t i = 0; i < window.num_bytes() / 8; ++i) words[i] = Word(rank, epoch, i);
}

// A record list that owns its arrays.
struct Records {
  std::vector<int32_t> peers;
  std::vector<int64_t> offsets;
  int32_t count = 0;

  void Add(int32_t peer, int64_t offset) {
    peers.push_back(peer);
    offsets.push_back(offset);
    ++count;
  }
  GatherList list() const {
    return {peers.data(), offsets.data(), &count, static_cast<int64_t>(peers.size())};
  }
};

absl::Status CheckGathered(const Records& records, int64_t record_words, int64_t epoch,
                           const std::vector<uint64_t>& got) {
  for (int32_t i = 0; i < records.count; ++i) {
    for (int64_t w = 0; w < record_words; ++w) {
      const uint64_t want = Word(records.peers[i], epoch, records.offsets[i] / 8 + w);
      NSA_COMM_CHECK(
          got[i * record_words + w] == want,
          absl::StrCat("epoch ", epoch, " record ", i, " of rank ", records.peers[i], ": ",
                       absl::Hex(got[i * record_words + w]), " not ", absl::Hex(want)));
    }
  }
  return absl::OkStatus();
}

absl::Status GatherRandomRecords(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  // Sizes differ, and the last rank of several has none.
  const auto words_of = [&](int rank) -> int64_t {
    return rank > 0 && rank == context.size - 1 ? 0 : 20000 + 1000 * rank;
  };
  auto window = (*comm)->CreateWindow(words_of(context.rank) * 8);
  NSA_COMM_OK(window.status());
  NSA_COMM_CHECK((*window)->num_bytes() == words_of(context.rank) * 8, "num_bytes");
  NSA_COMM_CHECK(reinterpret_cast<uintptr_t>((*window)->data()) % 256 == 0, "alignment");
  const auto* words = static_cast<const uint64_t*>((*window)->data());
  for (int64_t i = 0; i < words_of(context.rank); ++i) NSA_COMM_CHECK(words[i] == 0, "zeroed");

  std::mt19937_64 random(context.rank);
  for (int64_t epoch = 1; epoch <= 20; ++epoch) {
    NSA_COMM_OK((*window)->BeginWrite(nullptr));
    FillWindow(**window, context.rank, epoch);
    NSA_COMM_OK((*window)->Publish(nullptr));
    const int gathers = random() % 3;
    for (int g = 0; g < gathers; ++g) {
      const int64_t record_words = 1 + random() % 3000;
      Records records;
      const int count = random() % 60;
      while (records.count < count) {
        const int peer = random() % context.size;
        if (words_of(peer) < record_words) continue;
        int64_t offset = random() % (words_of(peer) - record_words + 1);
        // Often several in a row, which may travel as one.
        const int row = 1 + random() % 4;
        for (int i = 0; i < row && offset + record_words <= words_of(peer); ++i) {
          records.Add(peer, offset * 8);
          offset += record_words;
        }
      }
      std::vector<uint64_t> got(records.count * record_words + 1, ~uint64_t{0});
      NSA_COMM_OK((*window)->Gather(records.list(), record_words * 8, got.data(), nullptr));
      NSA_COMM_OK(CheckGathered(records, record_words, epoch, got));
      NSA_COMM_CHECK(got.back() == ~uint64_t{0}, "nothing is written past the records");
    }
    NSA_COMM_OK((*window)->Release(nullptr));
  }
  return absl::OkStatus();
}

// Hundreds of epochs in which ranks are late in turn. A rank that does not wait for the releases
// overwrites what others still read; one that does not wait for a publish reads the epoch before.
absl::Status EpochStress(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  constexpr int64_t kWords = 512;
  auto window = (*comm)->CreateWindow(kWords * 8);
  NSA_COMM_OK(window.status());
  std::mt19937_64 random(context.rank + 77);
  const auto stumble = [&] {
    if (random() % 8 == 0) absl::SleepFor(absl::Microseconds(random() % 1500));
  };
  for (int64_t epoch = 1; epoch <= 300; ++epoch) {
    NSA_COMM_OK((*window)->BeginWrite(nullptr));
    stumble();
    FillWindow(**window, context.rank, epoch);
    stumble();
    NSA_COMM_OK((*window)->Publish(nullptr));
    stumble();
    Records records;
    for (int peer = 0; peer < context.size; ++peer) {
      // Now and then a rank is not read at all.
      if (random() % 4 != 0) records.Add(peer, (random() % (kWords - 15)) * 8);
    }
    std::vector<uint64_t> got(records.count * 16);
    NSA_COMM_OK((*window)->Gather(records.list(), 128, got.data(), nullptr));
    NSA_COMM_OK(CheckGathered(records, 16, epoch, got));
    stumble();
    NSA_COMM_OK((*window)->Release(nullptr));
  }
  return absl::OkStatus();
}

absl::Status GatherLarge(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  constexpr int64_t kBytes = int64_t{64} << 20;
  constexpr int64_t kRecord = 16 << 10;
  auto window = (*comm)->CreateWindow(kBytes);
  NSA_COMM_OK(window.status());
  NSA_COMM_OK((*window)->BeginWrite(nullptr));
  FillWindow(**window, context.rank, 1);
  NSA_COMM_OK((*window)->Publish(nullptr));
  Records records;
  const int peer = (context.rank + 1) % context.size;
  // Backwards, so that no two records are neighbours.
  for (int64_t offset = kBytes - kRecord; offset >= 0; offset -= kRecord) {
    records.Add(peer, offset);
  }
  std::vector<uint64_t> got(kBytes / 8);
  NSA_COMM_OK((*window)->Gather(records.list(), kRecord, got.data(), nullptr));
  NSA_COMM_OK(CheckGathered(records, kRecord / 8, 1, got));
  return (*window)->Release(nullptr);
}

absl::Status GatherBounds(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  auto window = (*comm)->CreateWindow(1024 + 256 * context.rank);
  NSA_COMM_OK(window.status());
  NSA_COMM_OK((*window)->BeginWrite(nullptr));
  NSA_COMM_OK((*window)->Publish(nullptr));
  const int last = context.size - 1;
  const int64_t last_bytes = 1024 + 256 * last;
  std::vector<char> dst(4096);
  const auto gather = [&](int32_t peer, int64_t offset, int64_t record_bytes) {
    Records records;
    records.Add(0, 0);
    records.Add(peer, offset);
    return (*window)->Gather(records.list(), record_bytes, dst.data(), nullptr);
  };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  NSA_COMM_OK(gather(last, last_bytes - 64, 64));
  NSA_COMM_FAILS(gather(last, last_bytes - 63, 64), invalid, absl::StrCat(last_bytes));
  NSA_COMM_FAILS(gather(last, int64_t{1} << 62, 64), invalid, "list.offsets[1]");
  NSA_COMM_FAILS(gather(last, -1, 64), invalid, "list.offsets[1]: -1");
  NSA_COMM_FAILS(gather(context.size, 0, 64), invalid, "list.peers[1]");
  NSA_COMM_FAILS(gather(-1, 0, 64), invalid, "list.peers[1]: -1");
  NSA_COMM_FAILS(gather(0, 0, 0), invalid, "record_bytes");
  Records records;
  records.Add(0, 0);
  records.count = 2;
  NSA_COMM_FAILS(
      (*window)->Gather({records.peers.data(), records.offsets.data(), &records.count, 1}, 64,
                        dst.data(), nullptr),
      invalid, "max_count");
  // Only the first *count records are looked at.
  records.Add(-7, -7);
  records.count = 1;
  NSA_COMM_OK((*window)->Gather(records.list(), 64, dst.data(), nullptr));
  records.count = 0;
  NSA_COMM_OK((*window)->Gather(records.list(), 64, nullptr, nullptr));
  NSA_COMM_OK((*window)->Release(nullptr));
  NSA_COMM_OK((*comm)->HealthCheck());
  return (*comm)->Barrier();
}

absl::Status CallOrder(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  auto window = (*comm)->CreateWindow(64);
  NSA_COMM_OK(window.status());
  const auto invalid = absl::StatusCode::kInvalidArgument;
  Records none;
  char dst[8];
  NSA_COMM_FAILS((*window)->Publish(nullptr), invalid, "Publish");
  NSA_COMM_FAILS((*window)->Gather(none.list(), 8, dst, nullptr), invalid, "Gather");
  NSA_COMM_FAILS((*window)->Release(nullptr), invalid, "Release");
  NSA_COMM_OK((*window)->BeginWrite(nullptr));
  NSA_COMM_FAILS((*window)->BeginWrite(nullptr), invalid, "BeginWrite");
  NSA_COMM_FAILS((*window)->Gather(none.list(), 8, dst, nullptr), invalid, "Gather");
  NSA_COMM_OK((*window)->Publish(nullptr));
  NSA_COMM_FAILS((*window)->BeginWrite(nullptr), invalid, "BeginWrite");
  NSA_COMM_OK((*window)->Gather(none.list(), 8, dst, nullptr));
  NSA_COMM_OK((*window)->Release(nullptr));
  return (*comm)->Barrier();
}

// All ranks fail when one has no memory, and the group goes on.
absl::Status TooLarge(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  const int64_t bytes = context.rank == context.size - 1 ? int64_t{1} << 52 : 4096;
  NSA_COMM_FAILS((*comm)->CreateWindow(bytes).status(), absl::StatusCode::kResourceExhausted,
                 absl::StrCat(int64_t{1} << 52));
  auto window = (*comm)->CreateWindow(4096);
  NSA_COMM_OK(window.status());
  NSA_COMM_OK((*window)->BeginWrite(nullptr));
  NSA_COMM_OK((*window)->Publish(nullptr));
  NSA_COMM_OK((*window)->Release(nullptr));
  return (*comm)->Barrier();
}

// Windows are destroyed by each rank as it likes, also while others still read them.
absl::Status SeveralWindows(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  constexpr int64_t kWords = 40000;
  for (int round = 0; round < 6; ++round) {
    std::vector<std::unique_ptr<Window>> windows;
    for (int w = 0; w < 3; ++w) {
      auto window = (*comm)->CreateWindow(kWords * 8);
      NSA_COMM_OK(window.status());
      windows.push_back(*std::move(window));
      NSA_COMM_OK(windows[w]->BeginWrite(nullptr));
      FillWindow(*windows[w], context.rank, 10 * round + w);
      NSA_COMM_OK(windows[w]->Publish(nullptr));
    }
    for (int w : {2, 0, 1}) {
      if ((round + context.rank) % 3 == w) absl::SleepFor(absl::Milliseconds(5));
      Records records;
      for (int peer = 0; peer < context.size; ++peer) records.Add(peer, 8 * peer);
      std::vector<uint64_t> got(records.count * 30000);
      NSA_COMM_OK(windows[w]->Gather(records.list(), 30000 * 8, got.data(), nullptr));
      NSA_COMM_OK(CheckGathered(records, 30000, 10 * round + w, got));
      NSA_COMM_OK(windows[w]->Release(nullptr));
      windows[w].reset();
    }
  }
  // The communicator goes too, with no barrier after the last read.
  return absl::OkStatus();
}

// A rank that destroys its window without Release does not keep the others from their next epoch.
absl::Status DestroyedIsReleased(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  constexpr int64_t kWords = 1000;
  auto window = (*comm)->CreateWindow(kWords * 8);
  NSA_COMM_OK(window.status());
  NSA_COMM_OK((*window)->BeginWrite(nullptr));
  FillWindow(**window, context.rank, 1);
  NSA_COMM_OK((*window)->Publish(nullptr));
  if (context.rank == context.size - 1) {
    window->reset();
  } else {
    Records records;
    records.Add(0, 0);
    std::vector<uint64_t> got(kWords);
    NSA_COMM_OK((*window)->Gather(records.list(), kWords * 8, got.data(), nullptr));
    NSA_COMM_OK(CheckGathered(records, kWords, 1, got));
    NSA_COMM_OK((*window)->Release(nullptr));
    NSA_COMM_OK((*window)->BeginWrite(nullptr));
  }
  return (*comm)->Barrier();
}

// A rank that computes and makes no call serves the reads of others all the same.
absl::Status ReadsNeedNoCallAtTheOwner(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  constexpr int64_t kWords = 1 << 17;
  auto window = (*comm)->CreateWindow(kWords * 8);
  NSA_COMM_OK(window.status());
  NSA_COMM_OK((*window)->BeginWrite(nullptr));
  FillWindow(**window, context.rank, 1);
  NSA_COMM_OK((*window)->Publish(nullptr));
  constexpr absl::Duration kBusy = absl::Milliseconds(800);
  if (context.rank == 0) {
    absl::SleepFor(kBusy);
  } else {
    const absl::Time start = absl::Now();
    Records records;
    records.Add(0, 0);
    std::vector<uint64_t> got(kWords);
    NSA_COMM_OK((*window)->Gather(records.list(), kWords * 8, got.data(), nullptr));
    NSA_COMM_OK(CheckGathered(records, kWords, 1, got));
    NSA_COMM_CHECK(absl::Now() - start < kBusy * 3 / 4, absl::FormatDuration(absl::Now() - start));
  }
  NSA_COMM_OK((*window)->Release(nullptr));
  return (*comm)->Barrier();
}

// What a rank reaches of its peers' windows is their memory, outside of epochs and after the peers
// have destroyed them.
absl::Status PeerDataIsTheirs(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  const int64_t num_words = 1000 + context.size;
  auto window = (*comm)->CreateWindow(num_words * 8);
  NSA_COMM_OK(window.status());
  NSA_COMM_CHECK((*window)->PeerData(context.rank) == (*window)->data(), "of the own rank");
  FillWindow(**window, context.rank, 1);
  NSA_COMM_OK((*comm)->Barrier());
  const auto words_of = [&](int peer) { return static_cast<uint64_t*>((*window)->PeerData(peer)); };
  const auto holds_first = [&](int peer, int64_t end) -> absl::Status {
    for (int64_t i = 0; i < end; ++i) {
      NSA_COMM_CHECK(words_of(peer)[i] == Word(peer, 1, i),
                     absl::StrCat("word ", i, " of rank ", peer));
    }
    return absl::OkStatus();
  };
  for (int peer = 0; peer < context.size; ++peer) {
    if (words_of(peer) != nullptr) NSA_COMM_OK(holds_first(peer, num_words));
  }
  NSA_COMM_OK((*comm)->Barrier());
  // Each rank has a word in every window.
  for (int peer = 0; peer < context.size; ++peer) {
    if (words_of(peer) != nullptr)
      words_of(peer)[1000 + context.rank] = Word(context.rank, 2, peer);
  }
  NSA_COMM_OK((*comm)->Barrier());
  for (int peer = 0; peer < context.size; ++peer) {
    // Who is reached reaches back.
    const uint64_t want = words_of(peer) != nullptr ? Word(peer, 2, context.rank)
                                                    : Word(context.rank, 1, 1000 + peer);
    NSA_COMM_CHECK(words_of(context.rank)[1000 + peer] == want, absl::StrCat("from rank ", peer));
  }
  NSA_COMM_CHECK((*comm)->LostRanks().empty(), "all are well");
  if (context.rank == context.size - 1) window->reset();
  NSA_COMM_OK((*comm)->Barrier());
  if (*window != nullptr && words_of(context.size - 1) != nullptr) {
    NSA_COMM_OK(holds_first(context.size - 1, 1000));
  }
  return (*comm)->Barrier();
}

// A window may go as soon as it is made, though others have just learned of it.
absl::Status DestroyedAtOnce(const Context& context) {
  auto comm = context.create(kTimeout);
  NSA_COMM_OK(comm.status());
  for (int round = 0; round < 50; ++round) {
    auto window = (*comm)->CreateWindow(100000);
    NSA_COMM_OK(window.status());
    if (context.rank != round % context.size) window->reset();
  }
  return (*comm)->Barrier();
}

}  // namespace

std::vector<Test> WindowTests() {
  return {
      {"GatherRandomRecords", 1, GatherRandomRecords},
      {"EpochStress", 1, EpochStress},
      {"GatherLarge", 1, GatherLarge},
      {"GatherBounds", 1, GatherBounds},
      {"CallOrder", 1, CallOrder},
      {"TooLarge", 1, TooLarge},
      {"SeveralWindows", 1, SeveralWindows},
      {"DestroyedIsReleased", 1, DestroyedIsReleased},
      {"ReadsNeedNoCallAtTheOwner", 2, ReadsNeedNoCallAtTheOwner},
      {"PeerDataIsTheirs", 1, PeerDataIsTheirs},
      {"DestroyedAtOnce", 2, DestroyedAtOnce},
  };
}

}  // namespace nsa::comm::conformance
