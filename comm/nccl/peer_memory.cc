#include "comm/nccl/peer_memory.h"

#include "absl/strings/str_cat.h"
#include "comm/nccl/lsa_pointers.h"
#include "comm/nccl/signals.h"

namespace nsa::comm::nccl {
namespace {

// The device header knows how a window looks in device memory, which is not part of NCCL's
// promises: the library that runs must be the one that was compiled against.
bool RunsTheHeadersVersion() {
  int version = 0;
  return ncclGetVersion(&version) == ncclSuccess && version == NCCL_VERSION_CODE;
}

// Where memory cannot be shared NCCL still hands out a window, but of the host.
bool IsDeviceMemory(const void* pointer) {
  cudaPointerAttributes attributes = {};
  const bool known = cudaPointerGetAttributes(&attributes, pointer) == cudaSuccess;
  if (!known) (void)cudaGetLastError();
  return known && attributes.type == cudaMemoryTypeDevice;
}

}  // namespace

absl::Status CheckDeviceMemoryFor(int64_t num_bytes) {
  size_t free = 0;
  size_t total = 0;
  NSA_COMM_CUDA_OK(cudaMemGetInfo(&free, &total));
  if (num_bytes <= static_cast<int64_t>(free)) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("CreateWindow: num_bytes: cannot allocate ",
                                                   num_bytes, ", ", free,
                                                   " are free on this device"));
}

absl::StatusOr<std::unique_ptr<PeerBuffer>> PeerBuffer::Allocate(int64_t num_bytes,
                                                                 cudaStream_t stream) {
  if (absl::Status s = CheckDeviceMemoryFor(num_bytes); !s.ok()) return s;
  void* data = nullptr;
  if (ncclResult_t r = ncclMemAlloc(&data, num_bytes); r != ncclSuccess) {
    return absl::ResourceExhaustedError(absl::StrCat("CreateWindow: num_bytes: cannot allocate ",
                                                     num_bytes,
                                                     ": ncclMemAlloc: ", ncclGetErrorString(r)));
  }
  std::unique_ptr<PeerBuffer> buffer(new PeerBuffer(static_cast<char*>(data), num_bytes));
  NSA_COMM_CUDA_OK(cudaMemsetAsync(data, 0, num_bytes, stream));
  NSA_COMM_CUDA_OK(cudaStreamSynchronize(stream));
  return buffer;
}

PeerBuffer::~PeerBuffer() { (void)ncclMemFree(data_); }

absl::Status PeerBuffer::Register(NcclHandle& nccl, int rank, int size, absl::Duration timeout,
                                  cudaStream_t stream) {
  absl::Status status = nccl.Run("CreateWindow", timeout, [this](ncclComm_t comm) {
    return ncclCommWindowRegister(comm, data_, num_bytes_, &window_, NCCL_WIN_COLL_SYMMETRIC);
  });
  if (!status.ok()) return status;
  if (size > kMaxRanks || window_ == nullptr || !RunsTheHeadersVersion() ||
      !IsDeviceMemory(window_)) {
    return absl::OkStatus();
  }
  bool one_node = false;
  status = nccl.Run("CreateWindow", timeout, [&](ncclComm_t comm) {
    one_node = LsaTeamSize(comm) == size;
    return ncclSuccess;
  });
  if (!status.ok() || !one_node) return status;
  absl::StatusOr<DevicePtr<char*>> bases = AllocateDevice<char*>(size);
  if (!bases.ok()) return bases.status();
  NSA_COMM_CUDA_OK(LaunchLsaPointers(window_, rank, size, data_, bases->get(), stream));
  host_bases_.resize(size);
  NSA_COMM_CUDA_OK(cudaMemcpyAsync(host_bases_.data(), bases->get(), size * sizeof(char*),
                                   cudaMemcpyDeviceToHost, stream));
  NSA_COMM_CUDA_OK(cudaStreamSynchronize(stream));
  bases_ = *std::move(bases);
  return absl::OkStatus();
}

void PeerBuffer::Deregister(NcclHandle& nccl) {
  if (window_ == nullptr) return;
  nccl.Run("ncclCommWindowDeregister", absl::Seconds(1),
           [this](ncclComm_t comm) { return ncclCommWindowDeregister(comm, window_); })
      .IgnoreError();
  window_ = nullptr;
}

}  // namespace nsa::comm::nccl
