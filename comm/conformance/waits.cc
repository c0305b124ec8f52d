#include "comm/conformance/waits.h"

#include <utility>

namespace nsa::comm::conformance {
namespace {

// A wait that needs nothing but the communicator.
class CallWait final : public PreparedWait {
 public:
  using Call = std::function<absl::Status(Communicator&, int absent)>;
  CallWait(Communicator& comm, Call call) : comm_(comm), call_(std::move(call)) {}
  absl::Status Run(int absent) override { return call_(comm_, absent); }

 private:
  Communicator& comm_;
  const Call call_;
};

Wait Simple(std::string name, std::string call_name, CallWait::Call call) {
  return {std::move(name), std::move(call_name), false,
          [call](Communicator& comm) -> absl::StatusOr<std::unique_ptr<PreparedWait>> {
            return std::make_unique<CallWait>(comm, call);
          }};
}

class WindowWait : public PreparedWait {
 public:
  explicit WindowWait(std::unique_ptr<Window> window) : window_(std::move(window)) {}

 protected:
  const std::unique_ptr<Window> window_;
};

class GatherWait final : public WindowWait {
 public:
  using WindowWait::WindowWait;
  absl::Status Run(int absent) override {
    if (absl::Status s = window_->BeginWrite(nullptr); !s.ok()) return s;
    if (absl::Status s = window_->Publish(nullptr); !s.ok()) return s;
    const int32_t peer = absent;
    const int64_t offset = 0;
    const int32_t count = 1;
    char dst[64];
    return window_->Gather({&peer, &offset, &count, 1}, 64, dst, nullptr);
  }
};

// Prepared up to the Publish of the first epoch; the absent rank does not release it.
class BeginWriteWait final : public WindowWait {
 public:
  using WindowWait::WindowWait;
  absl::Status Run(int /*absent*/) override {
    if (absl::Status s = window_->Release(nullptr); !s.ok()) return s;
    return window_->BeginWrite(nullptr);
  }
};

absl::StatusOr<std::unique_ptr<PreparedWait>> PrepareGather(Communicator& comm) {
  auto window = comm.CreateWindow(4096);
  if (!window.ok()) return window.status();
  return std::make_unique<GatherWait>(*std::move(window));
}

absl::StatusOr<std::unique_ptr<PreparedWait>> PrepareBeginWrite(Communicator& comm) {
  auto window = comm.CreateWindow(4096);
  if (!window.ok()) return window.status();
  if (absl::Status s = (*window)->BeginWrite(nullptr); !s.ok()) return s;
  if (absl::Status s = (*window)->Publish(nullptr); !s.ok()) return s;
  return std::make_unique<BeginWriteWait>(*std::move(window));
}

absl::Status AllGatherFrom(Communicator& comm, int64_t num_bytes) {
  std::vector<char> buffer(num_bytes * comm.size());
  std::vector<GatherRun> runs;
  for (int rank = 0; rank < comm.size(); ++rank)
    runs.push_back({rank, rank * num_bytes, num_bytes});
  return comm.AllGather(buffer.data(), runs, nullptr);
}

absl::Status ExchangeWith(Communicator& comm, int peer, int64_t num_bytes) {
  std::vector<char> out(num_bytes);
  std::vector<char> in(num_bytes);
  return comm.Exchange({{SendOp{peer, out.data(), num_bytes}}},
                       {{RecvOp{peer, in.data(), num_bytes}}}, nullptr);
}

}  // namespace

std::vector<Wait> Waits() {
  constexpr int64_t kBig = 4 << 20;
  return {
      Simple("Barrier", "Barrier", [](Communicator& comm, int) { return comm.Barrier(); }),
      Simple("HostAllGather", "HostAllGather",
             [](Communicator& comm, int) { return comm.HostAllGather("mine").status(); }),
      Simple("SmallAllGather", "AllGather",
             [](Communicator& comm, int) { return AllGatherFrom(comm, 100); }),
      Simple("BigAllGather", "AllGather",
             [](Communicator& comm, int) { return AllGatherFrom(comm, kBig); }),
      Simple("SmallExchange", "Exchange",
             [](Communicator& comm, int absent) { return ExchangeWith(comm, absent, 100); }),
      Simple("BigExchange", "Exchange",
             [](Communicator& comm, int absent) { return ExchangeWith(comm, absent, kBig); }),
      {"Gather", "Gather", false, PrepareGather},
      {"BeginWrite", "BeginWrite", true, PrepareBeginWrite},
  };
}

}  // namespace nsa::comm::conformance
