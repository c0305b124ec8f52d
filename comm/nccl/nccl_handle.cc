#include "comm/nccl/nccl_handle.h"

#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace nsa::comm::nccl {
namespace {

// How long a call in progress may keep an abort waiting. Only one that is stuck in a launch does,
// because the device's queue is full behind a kernel that the abort must end.
constexpr absl::Duration kAbortPatience = absl::Seconds(2);
// How long a wait for NCCL polls before it sleeps.
constexpr absl::Duration kSpinTime = absl::Microseconds(200);
// How long the end may take.
constexpr absl::Duration kEndTime = absl::Seconds(5);

absl::Status NcclError(ncclResult_t result, ncclComm_t comm, absl::string_view name) {
  const bool link = result == ncclRemoteError || result == ncclSystemError;
  std::string message =
      absl::StrCat(name, ": NCCL: ", ncclGetErrorString(result), ": ", ncclGetLastError(comm));
  return absl::Status(link ? absl::StatusCode::kUnavailable : absl::StatusCode::kInternal, message);
}

}  // namespace

absl::StatusOr<std::string> NcclHandle::NewId() {
  ncclUniqueId id;
  if (ncclResult_t r = ncclGetUniqueId(&id); r != ncclSuccess) {
    return NcclError(r, nullptr, "ncclGetUniqueId");
  }
  return std::string(id.internal, sizeof(id.internal));
}

absl::StatusOr<std::unique_ptr<NcclHandle>> NcclHandle::Create(const std::string& id, int rank,
                                                               int size, absl::Duration timeout,
                                                               GroupHealth* health) {
  ncclUniqueId unique = {};
  if (id.size() != sizeof(unique.internal)) {
    return absl::InternalError("the NCCL id of rank 0 cannot be read");
  }
  std::memcpy(unique.internal, id.data(), id.size());
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  std::unique_ptr<NcclHandle> handle(new NcclHandle(rank, health));
  {
    absl::MutexLock lock(&handle->mu_);
    const ncclResult_t r = ncclCommInitRankConfig(&handle->comm_, size, unique, rank, &config);
    if (r != ncclSuccess && r != ncclInProgress) {
      return NcclError(r, nullptr, "ncclCommInitRankConfig");
    }
  }
  if (absl::Status s = handle->AwaitTaken("connecting", timeout); !s.ok()) {
    handle->Abort();
    return s;
  }
  return handle;
}

std::unique_ptr<NcclHandle> NcclHandle::Adopt(ncclComm_t comm, int rank, GroupHealth* health) {
  std::unique_ptr<NcclHandle> handle(new NcclHandle(rank, health));
  absl::MutexLock lock(&handle->mu_);
  handle->comm_ = comm;
  return handle;
}

NcclHandle::~NcclHandle() {
  if (health_.broken()) {
    Abort();
    return;
  }
  const absl::Status finalized =
      Run("ncclCommFinalize", kEndTime, [](ncclComm_t comm) { return ncclCommFinalize(comm); });
  if (!finalized.ok()) {
    Abort();
    return;
  }
  absl::MutexLock lock(&mu_);
  if (comm_ != nullptr) (void)ncclCommDestroy(comm_);
}

absl::Status NcclHandle::Run(absl::string_view name, absl::Duration timeout,
                             absl::FunctionRef<ncclResult_t(ncclComm_t)> call) {
  {
    absl::MutexLock lock(&mu_);
    if (comm_ == nullptr) return health_.Check();
    const ncclResult_t r = call(comm_);
    if (r != ncclSuccess && r != ncclInProgress) return NcclError(r, comm_, name);
  }
  return AwaitTaken(name, timeout);
}

absl::Status NcclHandle::AwaitTaken(absl::string_view name, absl::Duration timeout) {
  const absl::Time start = absl::Now();
  const absl::Time deadline = start + timeout;
  while (true) {
    {
      absl::MutexLock lock(&mu_);
      if (comm_ != nullptr) {
        ncclResult_t state = ncclInProgress;
        if (ncclResult_t r = ncclCommGetAsyncError(comm_, &state); r != ncclSuccess) state = r;
        if (state == ncclSuccess) return absl::OkStatus();
        if (state != ncclInProgress) return NcclError(state, comm_, name);
      }
    }
    if (absl::Status s = health_.Check(); !s.ok()) return s;
    if (absl::Now() >= deadline) {
      return absl::DeadlineExceededError(absl::StrCat(name, ": rank ", rank_, " waited ",
                                                      absl::FormatDuration(timeout),
                                                      " for other ranks to connect"));
    }
    // NCCL launches from a thread of its own, mostly within this time.
    if (absl::Now() < start + kSpinTime) {
      std::this_thread::yield();
    } else {
      absl::SleepFor(absl::Microseconds(50));
    }
  }
}

absl::Status NcclHandle::AsyncError() {
  if (!mu_.TryLock()) return absl::OkStatus();
  absl::Status status;
  ncclResult_t state = ncclSuccess;
  if (comm_ != nullptr && ncclCommGetAsyncError(comm_, &state) == ncclSuccess &&
      state != ncclSuccess && state != ncclInProgress) {
    status = NcclError(state, comm_, "in the background");
  }
  mu_.Unlock();
  return status;
}

void NcclHandle::Abort() {
  const absl::Time patience = absl::Now() + kAbortPatience;
  bool locked = mu_.TryLock();
  while (!locked && absl::Now() < patience) {
    absl::SleepFor(absl::Milliseconds(1));
    locked = mu_.TryLock();
  }
  if (comm_ != nullptr) (void)ncclCommAbort(comm_);
  comm_ = nullptr;
  if (locked) mu_.Unlock();
}

}  // namespace nsa::comm::nccl
