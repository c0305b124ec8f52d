#include "comm/nccl/group_health.h"

#include <new>
#include <utility>

#include "comm/errors.h"

namespace nsa::comm::nccl {
namespace {

// The device reads and writes these words at any time.
uint32_t Load(const uint32_t& word) { return __atomic_load_n(&word, __ATOMIC_ACQUIRE); }
void Store(uint32_t& word, uint32_t value) { __atomic_store_n(&word, value, __ATOMIC_RELEASE); }

}  // namespace

absl::string_view WaitingCallName(WaitingCall call) {
  switch (call) {
    case WaitingCall::kAllGather:
      return "AllGather";
    case WaitingCall::kExchange:
      return "Exchange";
    case WaitingCall::kBeginWrite:
      return "BeginWrite";
    case WaitingCall::kGather:
      return "Gather";
  }
  return "unknown call";
}

absl::Status GroupHealth::Start() {
  void* memory = nullptr;
  NSA_COMM_CUDA_OK(cudaHostAlloc(&memory, sizeof(FaultBoard), cudaHostAllocMapped));
  board_.reset(new (memory) FaultBoard());
  void* device = nullptr;
  NSA_COMM_CUDA_OK(cudaHostGetDevicePointer(&device, memory, 0));
  device_board_ = static_cast<FaultBoard*>(device);
  if (health_.broken()) Store(board_->broken, 1);
  started_.store(true, std::memory_order_release);
  return absl::OkStatus();
}

absl::Status GroupHealth::Break(absl::Status error) {
  absl::Status first = health_.Break(std::move(error));
  if (started_.load(std::memory_order_acquire)) Store(board_->broken, 1);
  return first;
}

void GroupHealth::MarkLeft(int rank) {
  if (started_.load(std::memory_order_acquire) && rank < kMaxRanks) Store(board_->left[rank], 1);
}

absl::Status GroupHealth::FaultOfDevice() const {
  const auto call = static_cast<WaitingCall>(Load(board_->call));
  std::vector<int> awaited;
  for (int rank = 0; rank < size_ && rank < kMaxRanks; ++rank) {
    if (Load(board_->awaited[rank]) != 0) awaited.push_back(rank);
  }
  if (Load(board_->fault) == static_cast<uint32_t>(FaultKind::kPeerLeft) && !awaited.empty()) {
    return PeerLeft(WaitingCallName(call), rank_, awaited[0]);
  }
  return WaitTimedOut(WaitingCallName(call), rank_, awaited, timeout_);
}

absl::Status GroupHealth::Check() {
  if (!health_.broken() && started_.load(std::memory_order_acquire) && Load(board_->fault) != 0) {
    return Break(FaultOfDevice());
  }
  return health_.status();
}

}  // namespace nsa::comm::nccl
