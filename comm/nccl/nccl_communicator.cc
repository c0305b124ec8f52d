#include "comm/nccl/nccl_communicator.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "comm/checks.h"
#include "comm/errors.h"
#include "comm/inbox.h"
#include "comm/nccl/exchange_check.h"
#include "comm/nccl/group_health.h"
#include "comm/nccl/nccl_handle.h"
#include "comm/nccl/nccl_window.h"
#include "comm/nccl/operation_log.h"
#include "comm/nccl/peer_memory.h"
#include "comm/nccl/signals.h"
#include "comm/nccl/window_kernels.h"
#include "comm/wire.h"

namespace nsa::comm {
namespace nccl {
namespace {

// How often the watchdog looks.
constexpr absl::Duration kPollTime = absl::Milliseconds(1);
constexpr absl::Duration kAsyncErrorTime = absl::Milliseconds(20);
// By how much a kernel's own deadline, which can name the ranks it waits for, comes before the
// host's.
constexpr absl::Duration kSlack = absl::Seconds(1);
// How long the control plane may take to name the rank behind an error of NCCL's, and how long what
// a rank did before it left in good order may take to finish.
constexpr absl::Duration kNewsTime = absl::Milliseconds(500);
constexpr absl::Duration kLeaveTime = absl::Seconds(1);

class Impl final : public Communicator {
 public:
  Impl(std::unique_ptr<Bootstrap> bootstrap, const NcclOptions& options)
      : options_(options),
        bootstrap_(std::move(bootstrap)),
        rank_(bootstrap_->rank()),
        size_(bootstrap_->size()),
        health_(rank_, size_, options.timeout) {}
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
  void Abort(absl::string_view reason) override;

 private:
  absl::Status Connect();
  absl::StatusOr<std::vector<std::string>> GatherBlobs(CallKind kind, absl::string_view mine);
  // True where all ranks say so.
  absl::StatusOr<bool> AllAgree(CallKind kind, bool mine);

  // Enqueues what `enqueue` does to NCCL, between the meeting of the ranks and the deadline.
  absl::Status Collective(WaitingCall call, cudaStream_t stream,
                          absl::FunctionRef<ncclResult_t(ncclComm_t)> enqueue);
  absl::Status EnqueueAllGather(WaitingCall call, void* buffer, absl::Span<const GatherRun> runs,
                                cudaStream_t stream);
  absl::Status EnqueueExchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                               cudaStream_t stream);

  absl::StatusOr<std::unique_ptr<Window>> CreatePeerWindow(std::vector<int64_t> window_bytes);
  absl::StatusOr<std::unique_ptr<Window>> CreateMirroredWindow(std::vector<int64_t> window_bytes);
  // The first error of the ranks' attempts at `num_bytes`, the same kind on all of them.
  absl::Status AgreeOnMemory(const absl::Status& mine, absl::Span<const int64_t> window_bytes);
  std::string RetiredIds();
  void FreeRetired(absl::Span<const std::vector<int64_t>> retired);

  void OnPeerEvent(const PeerEvent& event);
  void Watch();
  void WatchOnce();
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
  std::unique_ptr<NcclHandle> collectives_;
  std::unique_ptr<NcclHandle> windows_;
  std::unique_ptr<PeerBuffer> board_;  // ArrivalSignals; null without load/store
  PeerMemory arrivals_ = {};
  OperationLog operations_;

  int64_t num_windows_ = 0;                                 // ever made
  std::map<int64_t, std::unique_ptr<PeerBuffer>> retired_;  // by id; see PeerBuffer::Deregister

  std::atomic<int64_t> left_at_{0};  // in nanoseconds, when the first rank left
  std::atomic<int> left_rank_{-1};
  absl::Mutex watch_mu_;
  bool stop_ ABSL_GUARDED_BY(watch_mu_) = false;
  bool look_ ABSL_GUARDED_BY(watch_mu_) = false;
  bool aborted_ = false;  // of the watchdog alone, as is all below
  absl::Time next_async_check_;
  absl::Time async_error_at_ = absl::InfiniteFuture();
  std::thread watchdog_;
};

absl::Status Impl::Start() {
  if (options_.device >= 0) {
    device_ = options_.device;
  } else {
    NSA_NCCL_CUDA_OK(cudaGetDevice(&device_));
  }
  if (options_.adopt != nullptr) {
    collectives_ = NcclHandle::Adopt(options_.adopt, rank_, &health_);
  }
  bootstrap_->SetPeerHandler([this](const PeerEvent& event) { OnPeerEvent(event); });
  absl::Status status = Connect();
  return status.ok() ? status : health_.Break(std::move(status));
}

absl::Status Impl::Connect() {
  // The device may not exist, and this is the call that says so.
  NSA_NCCL_CUDA_OK(cudaSetDevice(device_));
  cudaStream_t stream = nullptr;
  NSA_NCCL_CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  stream_.reset(stream);
  NSA_NCCL_CUDA_OK(LoadKernels());
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
      [this](void* buffer, absl::Span<const GatherRun> runs, cudaStream_t on) {
        return EnqueueAllGather(WaitingCall::kPublish, buffer, runs, on);
      },
      [this](int64_t id, std::unique_ptr<PeerBuffer> buffer) { retired_[id] = std::move(buffer); }};

  // All ranks learn who cannot start, and what rank 0 calls the communicators.
  WireWriter mine;
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
    WireReader reader((*all)[0]);
    const std::string collectives_id = reader.GetString();
    const std::string windows_id = reader.GetString();
    if (collectives_ == nullptr) {
      auto made =
          NcclHandle::Create(collectives_id, rank_, size_, options_.connect_timeout, &health_);
      if (!made.ok()) return made.status();
      collectives_ = *std::move(made);
    }
    if (options_.use_windows) {
      auto made = NcclHandle::Create(windows_id, rank_, size_, options_.connect_timeout, &health_);
      if (!made.ok()) return made.status();
      windows_ = *std::move(made);
      auto board = PeerBuffer::Allocate(sizeof(ArrivalSignals), stream_.get());
      if (!board.ok()) return board.status();
      board_ = *std::move(board);
      absl::Status status =
          board_->Register(*windows_, rank_, size_, options_.connect_timeout, stream_.get());
      if (!status.ok()) return status;
    }
  }
  watchdog_ = std::thread([this] { Watch(); });
  absl::StatusOr<bool> reachable =
      AllAgree(CallKind::kBarrier, board_ != nullptr && board_->reachable());
  if (!reachable.ok()) return reachable.status();
  if (*reachable) {
    arrivals_ = {board_->bases(),
                 0,
                 rank_,
                 size_,
                 health_.device_board(),
                 static_cast<uint64_t>(absl::ToInt64Nanoseconds(options_.timeout))};
  } else if (board_ != nullptr) {
    board_->Deregister(*windows_);
    board_ = nullptr;
  }
  return absl::OkStatus();
}

Impl::~Impl() {
  const ScopedDevice device(device_);
  // Operations end, or the watchdog's deadlines break the communicator.
  while (watchdog_.joinable() && !health_.broken()) {
    const absl::StatusOr<int> running = operations_.Poll();
    if (!running.ok() || *running == 0) break;
    absl::SleepFor(absl::Microseconds(50));
  }
  const absl::Status status = health_.Check();
  bootstrap_->SetPeerHandler(nullptr);
  bootstrap_->Leave(status);
  if (watchdog_.joinable()) {
    {
      absl::MutexLock lock(&watch_mu_);
      stop_ = true;
    }
    watchdog_.join();
  }
  collectives_ = nullptr;
  if (windows_ == nullptr) return;
  if (stream_ != nullptr) (void)cudaStreamSynchronize(stream_.get());
  if (board_ != nullptr) retired_[-1] = std::move(board_);
  for (auto& [id, buffer] : retired_) buffer->Deregister(*windows_);
}

void Impl::Abort(absl::string_view reason) {
  health_.Break(AbortedBy(rank_, reason)).IgnoreError();
  bootstrap_->Abort(reason);
  absl::MutexLock lock(&watch_mu_);
  look_ = true;
}

void Impl::OnPeerEvent(const PeerEvent& event) {
  if (event.kind == PeerEvent::Kind::kLeft) {
    int nobody = -1;
    if (left_rank_.compare_exchange_strong(nobody, event.rank)) {
      left_at_.store(absl::GetCurrentTimeNanos());
    }
    health_.MarkLeft(event.rank);
  } else {
    health_.Break(event.error).IgnoreError();
  }
  absl::MutexLock lock(&watch_mu_);
  look_ = true;
}

// The watchdog.

void Impl::Watch() {
  (void)cudaSetDevice(device_);
  // Asking events must not spoil what another thread captures.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  next_async_check_ = absl::Now();
  while (true) {
    WatchOnce();
    absl::MutexLock lock(&watch_mu_);
    watch_mu_.AwaitWithTimeout(absl::Condition(
                                   +[](Impl* self) ABSL_EXCLUSIVE_LOCKS_REQUIRED(self->watch_mu_) {
                                     return self->stop_ || self->look_;
                                   },
                                   this),
                               kPollTime);
    look_ = false;
    if (stop_) break;
  }
  WatchOnce();
}

void Impl::WatchOnce() {
  absl::Status status = health_.Check();
  const absl::Time now = absl::Now();
  if (status.ok()) {
    const absl::StatusOr<int> running = operations_.Poll();
    if (!running.ok()) status = health_.Break(running.status());
  }
  if (status.ok() && collectives_ != nullptr && now >= next_async_check_) {
    next_async_check_ = now + kAsyncErrorTime;
    const absl::Status error = collectives_->AsyncError();
    if (!error.ok()) {
      // Most often a rank died, and the control plane is about to say which.
      async_error_at_ = std::min(async_error_at_, now);
      if (now - async_error_at_ >= kNewsTime) status = health_.Break(error);
    }
  }
  if (status.ok()) {
    if (std::optional<OperationLog::Late> oldest = operations_.Oldest(); oldest.has_value()) {
      const absl::Duration limit =
          options_.timeout + (load_store() ? kSlack : absl::ZeroDuration());
      const int left = left_rank_.load();
      const absl::Time left_at = absl::FromUnixNanos(left_at_.load());
      if (left >= 0 && std::min(oldest->running, now - left_at) >= kLeaveTime) {
        status = health_.Break(PeerLeft(WaitingCallName(oldest->call), rank_, left));
      } else if (oldest->running >= limit) {
        std::vector<int> others;
        for (int peer = 0; peer < size_; ++peer) {
          if (peer != rank_) others.push_back(peer);
        }
        status = health_.Break(
            WaitTimedOut(WaitingCallName(oldest->call), rank_, others, options_.timeout));
      }
    }
  }
  if (!status.ok() && !aborted_) {
    aborted_ = true;
    if (collectives_ != nullptr) collectives_->Abort();
  }
}

// Calls on the host.

absl::StatusOr<std::vector<std::string>> Impl::GatherBlobs(CallKind kind, absl::string_view mine) {
  if (absl::Status s = health_.Check(); !s.ok()) return s;
  WireWriter writer;
  writer.PutInt64(static_cast<int64_t>(kind));
  writer.PutString(mine);
  absl::StatusOr<std::vector<std::string>> all =
      bootstrap_->AllGather(writer.bytes(), options_.timeout, CallName(kind));
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

absl::Status Impl::Collective(WaitingCall call, cudaStream_t stream,
                              absl::FunctionRef<ncclResult_t(ncclComm_t)> enqueue) {
  absl::Status status = operations_.Begin(call, stream);
  if (!status.ok()) return health_.Break(std::move(status));
  if (load_store()) {
    if (cudaError_t e = LaunchArrive(arrivals_, call, stream); e != cudaSuccess) {
      return health_.Break(CudaStatus(e, "Arrive"));
    }
  }
  status = collectives_->Run(WaitingCallName(call), options_.timeout + kSlack, enqueue);
  if (!status.ok()) {
    // The rank behind it may be about to be named.
    if (absl::IsUnavailable(status)) {
      for (const absl::Time until = absl::Now() + kNewsTime;
           !health_.broken() && absl::Now() < until;) {
        absl::SleepFor(absl::Milliseconds(1));
      }
    }
    return health_.Break(std::move(status));
  }
  status = operations_.End(stream);
  return status.ok() ? status : health_.Break(std::move(status));
}

absl::Status Impl::EnqueueAllGather(WaitingCall call, void* buffer,
                                    absl::Span<const GatherRun> runs, cudaStream_t stream) {
  const std::vector<GatherRun> merged = MergeRuns(runs);
  if (size_ == 1 || merged.empty()) return absl::OkStatus();
  char* const bytes = static_cast<char*>(buffer);

  bool by_rank = static_cast<int>(merged.size()) == size_;
  for (int r = 0; by_rank && r < size_; ++r) {
    by_rank = merged[r].rank == r && merged[r].num_bytes == merged[0].num_bytes &&
              merged[r].offset_bytes == merged[0].offset_bytes + r * merged[0].num_bytes;
  }
  return Collective(call, stream, [&](ncclComm_t comm) {
    if (by_rank) {
      return ncclAllGather(bytes + merged[rank_].offset_bytes, bytes + merged[0].offset_bytes,
                           merged[0].num_bytes, ncclInt8, comm, stream);
    }
    ncclResult_t result = ncclGroupStart();
    for (int step = 1; step < size_; ++step) {
      const int to = (rank_ + step) % size_;
      const int from = (rank_ + size_ - step) % size_;
      for (const GatherRun& run : merged) {
        char* const data = bytes + run.offset_bytes;
        if (result == ncclSuccess && run.rank == rank_) {
          result = ncclSend(data, run.num_bytes, ncclInt8, to, comm, stream);
        }
        if (result == ncclSuccess && run.rank == from) {
          result = ncclRecv(data, run.num_bytes, ncclInt8, from, comm, stream);
        }
      }
    }
    const ncclResult_t end = ncclGroupEnd();
    return result == ncclSuccess ? end : result;
  });
}

absl::Status Impl::AllGather(void* buffer, absl::Span<const GatherRun> runs, void* stream) {
  if (absl::Status s = health_.Check(); !s.ok()) return s;
  if (absl::Status s = CheckAllGather(buffer, runs, size_); !s.ok()) return s;
  const ScopedDevice device(device_);
  return EnqueueAllGather(WaitingCall::kAllGather, buffer, runs, static_cast<cudaStream_t>(stream));
}

absl::Status Impl::EnqueueExchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                                   cudaStream_t stream) {
  std::vector<SendOp> own;
  for (const SendOp& send : sends) {
    if (send.peer == rank_) own.push_back(send);
  }
  size_t next_own = 0;
  for (const RecvOp& recv : recvs) {
    if (recv.peer != rank_) continue;
    const SendOp& send = own[next_own++];
    if (recv.num_bytes == 0) continue;
    const cudaError_t e =
        cudaMemcpyAsync(recv.data, send.data, recv.num_bytes, cudaMemcpyDeviceToDevice, stream);
    if (e != cudaSuccess) return health_.Break(CudaStatus(e, "cudaMemcpyAsync"));
  }
  if (size_ == 1) return absl::OkStatus();
  return Collective(WaitingCall::kExchange, stream, [&](ncclComm_t comm) {
    ncclResult_t result = ncclGroupStart();
    for (const SendOp& send : sends) {
      if (result != ncclSuccess || send.peer == rank_ || send.num_bytes == 0) continue;
      result = ncclSend(send.data, send.num_bytes, ncclInt8, send.peer, comm, stream);
    }
    for (const RecvOp& recv : recvs) {
      if (result != ncclSuccess || recv.peer == rank_ || recv.num_bytes == 0) continue;
      result = ncclRecv(recv.data, recv.num_bytes, ncclInt8, recv.peer, comm, stream);
    }
    const ncclResult_t end = ncclGroupEnd();
    return result == ncclSuccess ? end : result;
  });
}

absl::Status Impl::Exchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                            void* stream) {
  if (absl::Status s = health_.Check(); !s.ok()) return s;
  if (absl::Status s = CheckExchange(sends, recvs, rank_, size_); !s.ok()) return s;
  const ScopedDevice device(device_);
  const auto on = static_cast<cudaStream_t>(stream);
  if (!options_.check_exchange || size_ == 1) return EnqueueExchange(sends, recvs, on);

  absl::StatusOr<std::vector<std::string>> plans =
      GatherBlobs(CallKind::kExchange, EncodePlan(sends, recvs));
  if (!plans.ok()) return plans.status();
  const MatchedExchange matched = MatchExchange(sends, recvs, rank_, *plans);
  // What matches is moved: its other end moves it too.
  if (absl::Status s = EnqueueExchange(matched.sends, matched.recvs, on); !s.ok()) return s;
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
                      : CreateMirroredWindow(std::move(window_bytes));
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

absl::StatusOr<std::unique_ptr<Window>> Impl::CreateMirroredWindow(
    std::vector<int64_t> window_bytes) {
  const int64_t num_bytes = std::max<int64_t>(LayOutMirror(window_bytes).num_bytes, 1);
  absl::Status status = CheckDeviceMemoryFor(num_bytes);
  void* memory = nullptr;
  if (status.ok()) status = CudaStatus(cudaMalloc(&memory, num_bytes), "cudaMalloc");
  DevicePtr<char> mirror(static_cast<char*>(memory));
  if (status.ok()) {
    status = CudaStatus(cudaMemsetAsync(memory, 0, num_bytes, stream_.get()), "cudaMemsetAsync");
  }
  if (status.ok()) status = CudaStatus(cudaStreamSynchronize(stream_.get()), "cudaMemsetAsync");
  if (absl::Status s = AgreeOnMemory(status, window_bytes); !s.ok()) return s;
  absl::StatusOr<std::unique_ptr<Window>> window =
      NcclWindow::CreateMirrored(&window_context_, std::move(window_bytes), std::move(mirror));
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
