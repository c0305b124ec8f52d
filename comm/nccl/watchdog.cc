#include "comm/nccl/watchdog.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "absl/time/clock.h"
#include "comm/cuda_status.h"
#include "comm/errors.h"
#include "comm/nccl/collectives.h"

namespace nsa::comm::nccl {
namespace {

// How often the thread looks.
constexpr absl::Duration kPollTime = absl::Milliseconds(1);
constexpr absl::Duration kAsyncErrorTime = absl::Milliseconds(20);
// How long what a rank did before it left in good order may take to finish.
constexpr absl::Duration kLeaveTime = absl::Seconds(1);

}  // namespace

void Watchdog::Start(int device, NcclHandle* nccl) {
  nccl_ = nccl;
  thread_ = std::thread([this, device] { Run(device); });
}

Watchdog::~Watchdog() {
  if (!thread_.joinable()) return;
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  thread_.join();
}

void Watchdog::SetLimit(absl::Duration limit) {
  absl::MutexLock lock(&mu_);
  limit_ = limit;
}

void Watchdog::OnLeft(int rank) {
  absl::MutexLock lock(&mu_);
  look_ = true;
  if (left_rank_ >= 0) return;
  left_rank_ = rank;
  left_at_ = absl::Now();
}

void Watchdog::Wake() {
  absl::MutexLock lock(&mu_);
  look_ = true;
}

void Watchdog::Run(int device) {
  (void)cudaSetDevice(device);
  // Asking events must not spoil what another thread captures.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  (void)cudaThreadExchangeStreamCaptureMode(&mode);
  const auto wanted = [](Watchdog* self) ABSL_EXCLUSIVE_LOCKS_REQUIRED(self->mu_) {
    return self->stop_ || self->look_;
  };
  bool stop = false;
  while (!stop) {
    Look();
    absl::MutexLock lock(&mu_);
    mu_.AwaitWithTimeout(absl::Condition(+wanted, this), kPollTime);
    look_ = false;
    stop = stop_;
  }
  Look();
}

void Watchdog::Look() {
  absl::Status status = health_.Check();
  if (status.ok()) {
    const absl::StatusOr<int> running = log_.Poll();
    if (!running.ok()) health_.Break(running.status()).IgnoreError();
    CheckOperations();
    const absl::Time now = absl::Now();
    if (nccl_ != nullptr && now >= next_async_check_) {
      next_async_check_ = now + kAsyncErrorTime;
      if (const absl::Status error = nccl_->AsyncError(); !error.ok()) {
        // Most often a rank died, and the control plane is about to say which.
        async_error_at_ = std::min(async_error_at_, now);
        if (now - async_error_at_ >= kNewsTime) health_.Break(error).IgnoreError();
      }
    }
    status = health_.Check();
  }
  if (!status.ok() && !aborted_) {
    aborted_ = true;
    if (nccl_ != nullptr) nccl_->Abort();
  }
}

void Watchdog::CheckOperations() {
  const std::optional<OperationLog::Late> oldest = log_.Oldest();
  if (!oldest.has_value()) return;
  absl::MutexLock lock(&mu_);
  if (left_rank_ >= 0 && std::min(oldest->running, absl::Now() - left_at_) >= kLeaveTime) {
    health_.Break(PeerLeft(WaitingCallName(oldest->call), rank_, left_rank_)).IgnoreError();
  } else if (oldest->running >= limit_) {
    std::vector<int> others;
    for (int peer = 0; peer < size_; ++peer) {
      if (peer != rank_) others.push_back(peer);
    }
    health_.Break(WaitTimedOut(WaitingCallName(oldest->call), rank_, others, timeout_))
        .IgnoreError();
  }
}

}  // namespace nsa::comm::nccl
