#include "comm/nccl/operation_log.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"

namespace nsa::comm::nccl {

absl::StatusOr<Event> OperationLog::TakeEvent() {
  if (!free_.empty()) {
    Event event = std::move(free_.back());
    free_.pop_back();
    return event;
  }
  cudaEvent_t event = nullptr;
  NSA_COMM_CUDA_OK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return Event(event);
}

absl::Status OperationLog::Begin(WaitingCall call, cudaStream_t stream) {
  if (IsCapturing(stream)) return absl::OkStatus();
  absl::MutexLock lock(&mu_);
  absl::StatusOr<Event> begin = TakeEvent();
  if (!begin.ok()) return begin.status();
  absl::StatusOr<Event> end = TakeEvent();
  if (!end.ok()) return end.status();
  NSA_COMM_CUDA_OK(cudaEventRecord(begin->get(), stream));
  Operation& operation = operations_.emplace_back();
  operation.call = call;
  operation.begin = *std::move(begin);
  operation.end = *std::move(end);
  return absl::OkStatus();
}

absl::Status OperationLog::End(cudaStream_t stream) {
  if (IsCapturing(stream)) return absl::OkStatus();
  absl::MutexLock lock(&mu_);
  Operation& operation = operations_.back();
  NSA_COMM_CUDA_OK(cudaEventRecord(operation.end.get(), stream));
  operation.ended = true;
  return absl::OkStatus();
}

absl::StatusOr<int> OperationLog::Poll() {
  absl::MutexLock lock(&mu_);
  // Operations of different streams may finish in any order; those of one log are few.
  for (auto it = operations_.begin(); it != operations_.end();) {
    if (it->begun == absl::InfiniteFuture()) {
      const cudaError_t e = cudaEventQuery(it->begin.get());
      if (e != cudaSuccess && e != cudaErrorNotReady) return CudaStatus(e, "an operation's begin");
      if (e == cudaSuccess) it->begun = absl::Now();
    }
    if (it->ended && it->begun != absl::InfiniteFuture()) {
      const cudaError_t e = cudaEventQuery(it->end.get());
      if (e != cudaSuccess && e != cudaErrorNotReady) return CudaStatus(e, "an operation's end");
      if (e == cudaSuccess) {
        free_.push_back(std::move(it->begin));
        free_.push_back(std::move(it->end));
        it = operations_.erase(it);
        continue;
      }
    }
    ++it;
  }
  return static_cast<int>(operations_.size());
}

std::optional<OperationLog::Late> OperationLog::Oldest() {
  absl::MutexLock lock(&mu_);
  std::optional<Late> oldest;
  const absl::Time now = absl::Now();
  for (const Operation& operation : operations_) {
    if (operation.begun == absl::InfiniteFuture()) continue;
    if (!oldest.has_value() || now - operation.begun > oldest->running) {
      oldest = Late{operation.call, now - operation.begun};
    }
  }
  return oldest;
}

}  // namespace nsa::comm::nccl
