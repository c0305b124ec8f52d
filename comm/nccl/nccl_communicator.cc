#include "comm/nccl/nccl_communicator.h"

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/checks.h"
#include "comm/errors.h"
#include "comm/inbox.h"
#include "comm/nccl/collectives.h"
#include "comm/nccl/exchange_check.h"
#include "comm/nccl/group_health.h"
#include "comm/nccl/meeting.h"
#include "comm/nccl/nccl_handle.h"
#include "comm/nccl/nccl_version.h"
#include "comm/nccl/nccl_window.h"
#include "comm/nccl/operation_log.h"
#include "comm/nccl/packed_window.h"
#include "comm/nccl/peer_memory.h"
#include "comm/nccl/signals.h"
#include "comm/nccl/watchdog.h"
#include "comm/nccl/window_kernels.h"
#include "comm/wire.h"

namespace nsa::comm {
namespace nccl {
namespace {

constexpr int kOldestMajorCapability = 9;

class Impl final : public Communicator {
 public:
  Impl(std::unique_ptr<Bootstrap> bootstrap, const NcclOptions& options)
      : options_(options),
        bootstrap_(std::move(bootstrap)),
        rank_(bootstrap_->rank()),
        size_(bootstrap_->size()),
        health_(rank_, size_, options.timeout),
        watchdog_(new Watchdog(rank_, size_, options.timeout, &health_, &operations_)) {}
  ~Impl() override;

  absl::Status Start();

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  absl::Duration timeout() const override { return options_.timeout; }
  absl::Status AllGather(void* buffer, absl::Span<const GatherRun> runs, void* stream) override;
  absl::Status Exchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                        void* stream) override;
  absl::StatusOr<std::unique_ptr<Window>> CreateWindow(int64_t num_bytes) override;
  absl::StatusOr<std::vector<std::string>> HostAllGather(absl::string_view mine) override {
    return GatherBlobs(CallKind::kHostAllGather, mine);
  }
  absl::Status Barrier() override { return GatherBlobs(CallKind::kBarrier, "").status(); }
  absl::Status HealthCheck() override { return health_.Check(); }
  std::vector<int> LostRanks() override { return health_.lost_ranks(); }
  void Abort(absl::string_view reason) override;

 private:
  absl::Status Connect();
  // `call` is what errors name.
  absl::StatusOr<std::vector<std::string>> GatherBlobs(CallKind kind, absl::string_view mine,
                                                       absl::string_view call);
  absl::StatusOr<std::vector<std::string>> GatherBlobs(CallKind kind, absl::string_view mine) {
    return GatherBlobs(kind, mine, CallName(kind));
  }
  // True where all ranks say so.
  absl::StatusOr<bool> AllAgree(CallKind kind, bool mine);

  absl::StatusOr<std::unique_ptr<Window>> CreatePeerWindow(std::vector<int64_t> window_bytes);
  absl::StatusOr<std::unique_ptr<Window>> CreateOwnWindow(std::vector<int64_t> window_bytes);
  // The first error of the ranks' attempts at `num_bytes`, the same kind on all of them.
  absl::Status AgreeOnMemory(const absl::Status& mine, absl::Span<const int64_t> window_bytes);
  std::string RetiredIds();
  void FreeRetired(absl::Span<const std::vector<int64_t>> retired);

  void OnPeerEvent(const PeerEvent& event);
  bool load_store() const { return board_ != nullptr; }

  const NcclOptions options_;
  const std::unique_ptr<Bootstrap> bootstrap_;
  const int rank_;
  const int size_;
  GroupHealth health_;
  int device_ = 0;
  Stream stream_;  // of the host's own small work
  WindowContext window_context_;

  // Null for a group of one. Windows have a communicator of their own, because an abort unmaps them
  // while kernels may still be reading.
  std::unique_ptr<NcclHandle> nccl_;
  std::unique_ptr<NcclHandle> windows_;
  std::unique_ptr<PeerBuffer> board_;  // MeetingSignals; null without load/store
  OperationLog operations_;
  std::unique_ptr<Collectives> collectives_;

  int64_t num_windows_ = 0;                                 // ever made
  std::map<int64_t, std::unique_ptr<PeerBuffer>> retired_;  // by id; see PeerBuffer::Deregister

  std::unique_ptr<Watchdog> watchdog_;
};

absl::Status Impl::Start() {
  if (options_.device >= 0) {
    device_ = options_.device;
  } else {
    NSA_COMM_CUDA_OK(cudaGetDevice(&device_));
  }
  if (options_.adopt != nullptr) {
    nccl_ = NcclHandle::Adopt(options_.adopt, rank_, &health_);
  }
  bootstrap_->SetPeerHandler([this](const PeerEvent& event) { OnPeerEvent(event); });
  const ScopedDevice device(device_);
  absl::Status status = Connect();
  return status.ok() ? status : health_.Break(std::move(status));
}

absl::Status Impl::Connect() {
  // The device may not exist, and this is the call that says so.
  NSA_COMM_CUDA_OK(cudaSetDevice(device_));
  int major = 0;
  NSA_COMM_CUDA_OK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_));
  if (major < kOldestMajorCapability) {
    return absl::InvalidArgumentError(absl::StrCat("device: ", device_, " has compute capability ",
                                                   major, ".x; must have ", kOldestMajorCapability,
                                                   ".0 or later, for bulk copies"));
  }
  cudaStream_t stream = nullptr;
  NSA_COMM_CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  stream_.reset(stream);
  NSA_COMM_CUDA_OK(LoadWindowKernels());
  NSA_COMM_CUDA_OK(LoadMeetingKernels());
  if (absl::Status s = health_.Start(); !s.ok()) return s;
  window_context_ = {
      rank_,
      size_,
      device_,
      options_.timeout,
      options_.gather_ctas,
      options_.gather_warps,
      &health_,
      stream_.get(),
      [this](int64_t id, std::unique_ptr<PeerBuffer> buffer) { retired_[id] = std::move(buffer); },
      [this](absl::string_view call, absl::string_view mine) {
        return GatherBlobs(CallKind::kWindowRound, mine, call);
      },
      [this](absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs, cudaStream_t on) {
        return collectives_->Exchange(WaitingCall::kGather, sends, recvs, on);
      }};

  // All ranks learn who cannot start, what each runs, and what rank 0 calls the communicators.
  WireWriter mine;
  int version = 0;
  if (size_ > 1) {  // one rank does without NCCL
    if (ncclResult_t r = ncclGetVersion(&version); r != ncclSuccess) {
      return absl::InternalError(absl::StrCat("ncclGetVersion: ", ncclGetErrorString(r)));
    }
  }
  mine.PutInt64(version);
  for (int i = 0; i < 2; ++i) {
    absl::StatusOr<std::string> id = std::string();
    if (rank_ == 0 && size_ > 1) id = NcclHandle::NewId();
    if (!id.ok()) return id.status();
    mine.PutString(*id);
  }
  absl::StatusOr<std::vector<std::string>> all =
      bootstrap_->AllGather(mine.bytes(), options_.connect_timeout, "connecting");
  if (!all.ok()) return all.status();
  if (size_ > 1) {
    std::vector<int> versions;
    for (const std::string& theirs : *all) {
      versions.push_back(static_cast<int>(WireReader(theirs).GetInt64()));
    }
    if (absl::Status s = CheckNcclVersions(versions); !s.ok()) return s;
    WireReader reader((*all)[0]);
    (void)reader.GetInt64();
    const std::string collectives_id = reader.GetString();
    const std::string windows_id = reader.GetString();
    if (nccl_ == nullptr) {
      auto made =
          NcclHandle::Create(collectives_id, rank_, size_, options_.connect_timeout, &health_);
      if (!made.ok()) return made.status();
      nccl_ = *std::move(made);
    }
    if (options_.use_windows) {
      auto made = NcclHandle::Create(windows_id, rank_, size_, options_.connect_timeout, &health_);
      if (!made.ok()) return made.status();
      windows_ = *std::move(made);
      auto board = PeerBuffer::Allocate(kMeetingBytes, stream_.get());
      if (!board.ok()) return board.status();
      board_ = *std::move(board);
      absl::Status status =
          board_->Register(*windows_, rank_, size_, options_.connect_timeout, stream_.get());
      if (!status.ok()) return status;
    }
  }
  collectives_ = std::make_unique<Collectives>(rank_, size_, options_.timeout, &health_,
                                               &operations_, nccl_.get());
  watchdog_->Start(device_, nccl_.get());
  absl::StatusOr<bool> reachable =
      AllAgree(CallKind::kBarrier, board_ != nullptr && board_->reachable());
  if (!reachable.ok()) return reachable.status();
  if (*reachable) {
    collectives_->MeetBy({board_->bases(), 0, rank_, size_, health_.device_board(),
                          static_cast<uint64_t>(absl::ToInt64Nanoseconds(options_.timeout))});
    watchdog_->SetLimit(options_.timeout + kSlack);
  } else if (board_ != nullptr) {
    board_->Deregister(*windows_);
    board_ = nullptr;
  }
  return absl::OkStatus();
}

Impl::~Impl() {
  const ScopedDevice device(device_);
  // Operations end, or the watchdog's deadlines break the communicator.
  while (!health_.broken()) {
    const absl::StatusOr<int> running = operations_.Poll();
    if (!running.ok() || *running == 0) break;
    absl::SleepFor(absl::Microseconds(50));
  }
  const absl::Status status = health_.Check();
  bootstrap_->SetPeerHandler(nullptr);
  bootstrap_->Leave(status);
  watchdog_ = nullptr;
  nccl_ = nullptr;
  if (windows_ == nullptr) return;
  if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_.get());
  if (board_ != nullptr) retired_[-1] = std::move(board_);
  for (auto& [id, buffer] : retired_) buffer->Deregister(*windows_);
}

void Impl::Abort(absl::string_view reason) {
  health_.Break(AbortedBy(rank_, reason)).IgnoreError();
  bootstrap_->Abort(reason);
  watchdog_->Wake();
}

void Impl::OnPeerEvent(const PeerEvent& event) {
  if (event.kind == PeerEvent::Kind::kLeft) {
    health_.MarkLeft(event.rank);
    watchdog_->OnLeft(event.rank);
  } else {
    if (event.kind == PeerEvent::Kind::kDied) health_.MarkLost(event.rank);
    health_.Break(event.error).IgnoreError();
    watchdog_->Wake();
  }
}

// Calls on the host.

absl::StatusOr<std::vector<std::string>> Impl::GatherBlobs(CallKind kind, absl::string_view mine,
                                                           absl::string_view call) {
  if (absl::Status s = health_.Check(); !s.ok()) return s;
  WireWriter writer;
  writer.PutInt64(static_cast<int64_t>(kind));
  writer.PutString(mine);
  absl::StatusOr<std::vector<std::string>> all =
      bootstrap_->AllGather(writer.bytes(), options_.timeout, call);
  if (!all.ok()) return health_.Break(all.status());
  for (int peer = 0; peer < size_; ++peer) {
    WireReader reader((*all)[peer]);
    const auto theirs = static_cast<CallKind>(reader.GetInt64());
    (*all)[peer] = reader.GetString();
    if (!reader.ok() || theirs != kind) {
      return health_.Break(absl::FailedPreconditionError(absl::StrCat(
          "rank ", rank_, " is in ", CallName(kind), ", rank ", peer, " in ", CallName(theirs),
          "; every rank must make the same calls in the same order")));
    }
  }
  return all;
}

absl::StatusOr<bool> Impl::AllAgree(CallKind kind, bool mine) {
  absl::StatusOr<std::vector<std::string>> all = GatherBlobs(kind, mine ? "yes" : "no");
  if (!all.ok()) return all.status();
  return std::all_of(all->begin(), all->end(), [](const std::string& s) { return s == "yes"; });
}

// Calls on streams.

absl::Status Impl::AllGather(void* buffer, absl::Span<const GatherRun> runs, void* stream) {
  if (absl::Status s = health_.Check(); !s.ok()) return s;
  if (absl::Status s = CheckAllGather(buffer, runs, size_); !s.ok()) return s;
  const ScopedDevice device(device_);
  return collectives_->AllGather(buffer, runs, static_cast<cudaStream_t>(stream));
}

absl::Status Impl::Exchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                            void* stream) {
  if (absl::Status s = health_.Check(); !s.ok()) return s;
  if (absl::Status s = CheckExchange(sends, recvs, rank_, size_); !s.ok()) return s;
  const ScopedDevice device(device_);
  const auto on = static_cast<cudaStream_t>(stream);
  if (!options_.check_exchange || size_ == 1) {
    return collectives_->Exchange(WaitingCall::kExchange, sends, recvs, on);
  }

  absl::StatusOr<std::vector<std::string>> plans =
      GatherBlobs(CallKind::kExchange, EncodePlan(sends, recvs));
  if (!plans.ok()) return plans.status();
  const MatchedExchange matched = MatchExchange(sends, recvs, rank_, *plans);
  // What matches is moved: its other end moves it too.
  absl::Status moved =
      collectives_->Exchange(WaitingCall::kExchange, matched.sends, matched.recvs, on);
  if (!moved.ok()) return moved;
  return matched.mismatch;
}

// Windows.

std::string Impl::RetiredIds() {
  WireWriter writer;
  for (const auto& [id, buffer] : retired_) writer.PutInt64(id);
  return writer.bytes();
}

void Impl::FreeRetired(absl::Span<const std::vector<int64_t>> retired) {
  for (auto it = retired_.begin(); it != retired_.end();) {
    const bool by_all = std::all_of(retired.begin(), retired.end(), [&](const auto& ids) {
      return std::find(ids.begin(), ids.end(), it->first) != ids.end();
    });
    if (!by_all) {
      ++it;
      continue;
    }
    it->second->Deregister(*windows_);
    it = retired_.erase(it);
  }
}

absl::StatusOr<std::unique_ptr<Window>> Impl::CreateWindow(int64_t num_bytes) {
  if (absl::Status s = health_.Check(); !s.ok()) return s;
  if (absl::Status s = CheckWindowBytes(num_bytes); !s.ok()) return s;
  const ScopedDevice device(device_);
  WireWriter mine;
  mine.PutInt64(num_bytes);
  mine.PutString(RetiredIds());
  absl::StatusOr<std::vector<std::string>> all = GatherBlobs(CallKind::kCreateWindow, mine.bytes());
  if (!all.ok()) return all.status();
  std::vector<int64_t> window_bytes;
  std::vector<std::vector<int64_t>> retired(size_);
  for (int peer = 0; peer < size_; ++peer) {
    WireReader reader((*all)[peer]);
    window_bytes.push_back(reader.GetInt64());
    const std::string ids = reader.GetString();
    WireReader id_reader(ids);
    for (int64_t id = id_reader.GetInt64(); id_reader.ok(); id = id_reader.GetInt64()) {
      retired[peer].push_back(id);
    }
  }
  if (load_store()) FreeRetired(retired);
  return load_store() ? CreatePeerWindow(std::move(window_bytes))
                      : CreateOwnWindow(std::move(window_bytes));
}

absl::Status Impl::AgreeOnMemory(const absl::Status& mine, absl::Span<const int64_t> window_bytes) {
  absl::StatusOr<bool> all = AllAgree(CallKind::kCreateWindow, mine.ok());
  if (!all.ok()) return all.status();
  if (*all) return absl::OkStatus();
  if (!mine.ok() && !absl::IsResourceExhausted(mine)) return health_.Break(mine);
  const auto largest = std::max_element(window_bytes.begin(), window_bytes.end());
  return absl::ResourceExhaustedError(absl::StrCat(
      "CreateWindow: num_bytes: ", window_bytes[rank_], "; rank ", largest - window_bytes.begin(),
      " asks for ", *largest, ", which not every rank can allocate",
      mine.ok() ? "" : absl::StrCat(": ", mine.message())));
}

absl::StatusOr<std::unique_ptr<Window>> Impl::CreatePeerWindow(std::vector<int64_t> window_bytes) {
  // NCCL's windows are of equal size on all ranks.
  const int64_t largest = *std::max_element(window_bytes.begin(), window_bytes.end());
  const int64_t signals_offset = (largest + 255) / 256 * 256;
  absl::StatusOr<std::unique_ptr<PeerBuffer>> buffer =
      PeerBuffer::Allocate(signals_offset + sizeof(WindowSignals), stream_.get());
  if (absl::Status s = AgreeOnMemory(buffer.status(), window_bytes); !s.ok()) return s;
  absl::Status status =
      (*buffer)->Register(*windows_, rank_, size_, options_.timeout, stream_.get());
  if (status.ok() && !(*buffer)->reachable()) {
    status = absl::InternalError("CreateWindow: NCCL does not map what it mapped before");
  }
  if (!status.ok()) return health_.Break(std::move(status));
  // Nobody signals before every rank's signals are there.
  if (absl::Status s = AgreeOnMemory(absl::OkStatus(), window_bytes); !s.ok()) return s;
  absl::StatusOr<std::unique_ptr<Window>> window =
      NcclWindow::Create(&window_context_, ++num_windows_, std::move(window_bytes),
                         *std::move(buffer), signals_offset);
  if (!window.ok()) return health_.Break(window.status());
  return window;
}

absl::StatusOr<std::unique_ptr<Window>> Impl::CreateOwnWindow(std::vector<int64_t> window_bytes) {
  const int64_t num_bytes = std::max<int64_t>(window_bytes[rank_], 1);
  absl::Status status = CheckDeviceMemoryFor(num_bytes);
  void* data = nullptr;
  if (status.ok()) status = CudaStatus(cudaMalloc(&data, num_bytes), "cudaMalloc");
  DevicePtr<char> memory(static_cast<char*>(data));
  if (status.ok()) {
    status = CudaStatus(cudaMemsetAsync(data, 0, num_bytes, stream_.get()), "cudaMemsetAsync");
  }
  if (status.ok()) status = CudaStatus(cudaStreamSynchronize(stream_.get()), "cudaMemsetAsync");
  if (absl::Status s = AgreeOnMemory(status, window_bytes); !s.ok()) return s;
  absl::StatusOr<std::unique_ptr<Window>> window =
      size_ == 1 ? NcclWindow::CreateAlone(&window_context_, window_bytes[0], std::move(memory))
                 : PackedWindow::Create(&window_context_, ++num_windows_, std::move(window_bytes),
                                        std::move(memory));
  if (!window.ok()) return health_.Break(window.status());
  return window;
}

absl::Status CheckOptions(const NcclOptions& options) {
  for (absl::Duration timeout : {options.timeout, options.connect_timeout}) {
    if (absl::Status s = CheckTimeout(timeout); !s.ok()) return s;
  }
  if (options.gather_ctas < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("gather_ctas: ", options.gather_ctas, "; must be >= 1"));
  }
  if (options.gather_warps < 1 || options.gather_warps > kMaxGatherWarps) {
    return absl::InvalidArgumentError(absl::StrCat("gather_warps: ", options.gather_warps,
                                                   "; must be in [1, ", kMaxGatherWarps, "]"));
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace nccl

absl::StatusOr<std::unique_ptr<Communicator>> NcclCommunicator::Create(
    std::unique_ptr<Bootstrap> bootstrap, const NcclOptions& options) {
  if (bootstrap == nullptr) {
    return absl::InvalidArgumentError("bootstrap: null; must be connected");
  }
  if (absl::Status s = nccl::CheckOptions(options); !s.ok()) {
    bootstrap->Leave(s);
    return s;
  }
  auto communicator = std::make_unique<nccl::Impl>(std::move(bootstrap), options);
  if (absl::Status s = communicator->Start(); !s.ok()) return s;
  return communicator;
}

}  // namespace nsa::comm
