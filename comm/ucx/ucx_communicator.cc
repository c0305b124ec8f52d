#include "comm/ucx/ucx_communicator.h"

#include <ucs/config/global_opts.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "comm/errors.h"
#include "comm/host_communicator.h"
#include "comm/staged_communicator.h"
#include "comm/ucx/context.h"
#include "comm/ucx/post_office.h"
#include "comm/ucx/remote_reads.h"
#include "comm/ucx/ucx_window.h"
#include "comm/ucx/window_board.h"
#include "comm/ucx/worker.h"
#include "comm/wire.h"

namespace nsa::comm {
namespace ucx {
namespace {

// How long peers may take to confirm a farewell; their progress threads answer at once.
constexpr absl::Duration kFarewellTime = absl::Seconds(3);

class Impl final : public HostCommunicator, private MessageHandler {
 public:
  Impl(std::unique_ptr<Bootstrap> bootstrap, const UcxOptions& options)
      : HostCommunicator(bootstrap->rank(), bootstrap->size(), options.timeout),
        options_(options),
        bootstrap_(std::move(bootstrap)),
        farewells_seen_(size(), false) {}
  ~Impl() override;

  absl::Status Start();
  // Windows lie in device memory, and peers read them there.
  bool windows_on_device() const { return windows_on_device_; }

  void Abort(absl::string_view reason) override;

 private:
  absl::Status Transfer(CallKind kind, absl::Span<const SendOp> sends,
                        absl::Span<const Incoming> receives) override {
    return post_office_->Transfer(kind, sends, receives);
  }
  absl::StatusOr<std::unique_ptr<HostWindow>> AllocateWindow(int64_t num_bytes) override;

  void OnMessage(const WireHeader& header, const void* data, size_t num_bytes) override;
  void OnChunkSent(int64_t memory, int64_t num_bytes) override {
    reads_->OnChunkSent(memory, num_bytes);
  }
  void AfterProgress() override;
  void OnAbandon() override { reads_->Abandon(); }

  void OnPeerEvent(const PeerEvent& event);
  // Waits for what peers still need of this rank. True when all have it.
  bool SayFarewell();

  const UcxOptions options_;
  const std::unique_ptr<Bootstrap> bootstrap_;
  bool windows_on_device_ = false;
  std::unique_ptr<Worker> worker_;
  // Guarded by the worker's mutex, as is all below.
  std::unique_ptr<RemoteReads> reads_;
  std::unique_ptr<PostOffice> post_office_;
  std::unique_ptr<WindowBoard> board_;
  std::vector<bool> farewells_seen_;  // [size] of ours, by that rank
  std::vector<int> to_answer_;        // whose farewell came
};

absl::Status Impl::Start() {
  const WorkerOptions worker_options = {ChooseTransports(options_.tls), options_.net_devices,
                                        options_.poll_time, options_.device_memory != nullptr};
  absl::StatusOr<std::unique_ptr<Worker>> worker =
      Worker::Create(rank(), size(), worker_options, &health());
  // A rank that cannot start leaves, and the others hear why.
  if (!worker.ok()) return health().Break(worker.status());
  worker_ = *std::move(worker);
  worker_->SetTimeout(options_.connect_timeout);
  reads_ = std::make_unique<RemoteReads>(rank(), options_.max_reads_in_flight, worker_.get());
  post_office_ =
      std::make_unique<PostOffice>(rank(), size(), worker_.get(), reads_.get(), &health());
  board_ = std::make_unique<WindowBoard>(rank(), size(), worker_.get(), reads_.get());

  absl::StatusOr<std::string> address = worker_->Address();
  if (!address.ok()) return health().Break(address.status());
  WireWriter mine;
  mine.PutInt64(worker_->moves_cuda_memory() ? 1 : 0);
  mine.PutString(*address);
  absl::StatusOr<std::vector<std::string>> addresses =
      bootstrap_->AllGather(mine.bytes(), options_.connect_timeout, "connecting");
  if (!addresses.ok()) return health().Break(addresses.status());
  windows_on_device_ = true;
  for (std::string& theirs : *addresses) {
    WireReader reader(theirs);
    windows_on_device_ &= reader.GetInt64() == 1;
    theirs = reader.GetString();
  }
  if (absl::Status s = worker_->Connect(*addresses, this); !s.ok()) return health().Break(s);
  bootstrap_->SetPeerHandler([this](const PeerEvent& event) { OnPeerEvent(event); });
  // Makes the connections, and shows now what would fail later.
  if (absl::Status s = Barrier(); !s.ok()) return s;
  worker_->SetTimeout(options_.timeout);
  return absl::OkStatus();
}

Impl::~Impl() {
  const bool gracefully = worker_ != nullptr && !health().broken() && SayFarewell();
  bootstrap_->SetPeerHandler(nullptr);
  bootstrap_->Leave(health().status());
  if (worker_ == nullptr) return;
  worker_->Stop(gracefully);
  board_->Clear();
}

bool Impl::SayFarewell() {
  absl::MutexLock lock(&worker_->mu());
  const absl::Time start = absl::Now();
  if (!worker_->WaitUntil(start + timeout(), [this] { return !board_->has_retired(); })) {
    return false;
  }
  for (int peer = 0; peer < size(); ++peer) {
    if (peer != rank() && !worker_->has_left(peer)) {
      worker_->Post(peer, {MessageType::kFarewell, rank()});
    }
  }
  return worker_->WaitUntil(absl::Now() + std::min(kFarewellTime, timeout()), [this] {
    for (int peer = 0; peer < size(); ++peer) {
      if (peer != rank() && !farewells_seen_[peer] && !worker_->has_left(peer)) return false;
    }
    return true;
  });
}

void Impl::Abort(absl::string_view reason) {
  health().Break(AbortedBy(rank(), reason)).IgnoreError();
  bootstrap_->Abort(reason);
  absl::MutexLock lock(&worker_->mu());
  worker_->WakeAll();
}

void Impl::OnPeerEvent(const PeerEvent& event) {
  if (event.kind == PeerEvent::Kind::kDied) health().MarkLost(event.rank);
  if (event.kind != PeerEvent::Kind::kLeft) health().Break(event.error).IgnoreError();
  absl::MutexLock lock(&worker_->mu());
  if (event.kind == PeerEvent::Kind::kLeft) {
    worker_->MarkLeft(event.rank);
    board_->OnLeft(event.rank);
  }
  worker_->WakeAll();
}

void Impl::OnMessage(const WireHeader& header, const void* data, size_t num_bytes) {
  switch (header.type) {
    case MessageType::kData:
    case MessageType::kOffer:
      post_office_->OnMessage(header, data);
      return;
    case MessageType::kRefusal:
    case MessageType::kReadRequest:
    case MessageType::kReadChunk:
      reads_->OnMessage(header, data, num_bytes);
      return;
    case MessageType::kPublished:
    case MessageType::kReleased:
      board_->OnMessage(header);
      return;
    case MessageType::kFarewell:
      to_answer_.push_back(header.sender);
      return;
    case MessageType::kFarewellSeen:
      farewells_seen_[header.sender] = true;
      return;
  }
}

void Impl::AfterProgress() {
  post_office_->AfterProgress();
  reads_->AfterProgress();
  for (int peer : std::exchange(to_answer_, {})) {
    worker_->Post(peer, {MessageType::kFarewellSeen, rank()});
    worker_->MarkLeft(peer);
    board_->OnLeft(peer);
  }
  board_->AfterProgress();
}

absl::StatusOr<std::unique_ptr<HostWindow>> Impl::AllocateWindow(int64_t num_bytes) {
  absl::MutexLock lock(&worker_->mu());
  const int64_t id = board_->Add();
  absl::StatusOr<std::unique_ptr<MappedMemory>> memory =
      windows_on_device_
          ? MappedMemory::AllocateCuda(worker_->context(), num_bytes, *options_.device_memory)
          : MappedMemory::Allocate(worker_->context(), num_bytes);
  if (!memory.ok()) {
    board_->Retire(id, 0, nullptr, /*tell=*/true);
    return memory.status();
  }
  return std::make_unique<UcxWindow>(rank(), size(), &health(), worker_.get(), board_.get(),
                                     reads_.get(), options_.max_reads_in_flight, id,
                                     *std::move(memory));
}

absl::Status CheckOptions(const UcxOptions& options) {
  for (absl::Duration timeout : {options.timeout, options.connect_timeout}) {
    if (absl::Status s = CheckTimeout(timeout); !s.ok()) return s;
  }
  if (options.max_reads_in_flight < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_reads_in_flight: ", options.max_reads_in_flight, "; must be >= 1"));
  }
  if (options.poll_time < absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("poll_time: ", absl::FormatDuration(options.poll_time), "; must be >= 0"));
  }
  return absl::OkStatus();
}

// Unless the user has set UCX's log level. Asked by name, as the place of the level in UCX's
// options differs between its versions.
void BeQuiet() {
  char level[16] = "";
  if (ucs_global_opts_get_value("LOG_LEVEL", level, sizeof(level)) == UCS_OK &&
      absl::EqualsIgnoreCase(level, "warn")) {
    ucs_global_opts_set_value("LOG_LEVEL", "fatal");
  }
}

}  // namespace
}  // namespace ucx

absl::StatusOr<std::unique_ptr<Communicator>> UcxCommunicator::Create(
    std::unique_ptr<Bootstrap> bootstrap, const UcxOptions& options) {
  if (bootstrap == nullptr) {
    return absl::InvalidArgumentError("bootstrap: null; must be connected");
  }
  if (absl::Status s = ucx::CheckOptions(options); !s.ok()) {
    bootstrap->Leave(s);
    return s;
  }
  if (options.quiet) ucx::BeQuiet();
  auto communicator = std::make_unique<ucx::Impl>(std::move(bootstrap), options);
  if (absl::Status s = communicator->Start(); !s.ok()) return s;
  if (options.device_memory == nullptr) return communicator;
  const bool windows_on_device = communicator->windows_on_device();
  return StageThroughHost(std::move(communicator), options.device_memory, windows_on_device);
}

}  // namespace nsa::comm
