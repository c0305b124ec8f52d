#include "comm/nccl/collectives.h"

#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "comm/checks.h"
#include "comm/nccl/window_kernels.h"

namespace nsa::comm::nccl {

absl::Status Collectives::Enqueue(WaitingCall call, cudaStream_t stream,
                                  absl::FunctionRef<ncclResult_t(ncclComm_t)> enqueue) {
  absl::Status status = log_.Begin(call, stream);
  if (!status.ok()) return health_.Break(std::move(status));
  if (meets_) {
    if (cudaError_t e = LaunchArrive(arrivals_, call, stream); e != cudaSuccess) {
      return health_.Break(CudaStatus(e, "Arrive"));
    }
  }
  status = nccl_->Run(WaitingCallName(call), timeout_ + kSlack, enqueue);
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
  status = log_.End(stream);
  return status.ok() ? status : health_.Break(std::move(status));
}

absl::Status Collectives::AllGather(void* buffer, absl::Span<const GatherRun> runs,
                                    cudaStream_t stream) {
  const std::vector<GatherRun> merged = MergeRuns(runs);
  if (size_ == 1 || merged.empty()) return absl::OkStatus();
  char* const bytes = static_cast<char*>(buffer);

  bool by_rank = static_cast<int>(merged.size()) == size_;
  for (int r = 0; by_rank && r < size_; ++r) {
    by_rank = merged[r].rank == r && merged[r].num_bytes == merged[0].num_bytes &&
              merged[r].offset_bytes == merged[0].offset_bytes + r * merged[0].num_bytes;
  }
  return Enqueue(WaitingCall::kAllGather, stream, [&](ncclComm_t comm) {
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

absl::Status Collectives::Exchange(WaitingCall call, absl::Span<const SendOp> sends,
                                   absl::Span<const RecvOp> recvs, cudaStream_t stream) {
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
  return Enqueue(call, stream, [&](ncclComm_t comm) {
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

}  // namespace nsa::comm::nccl
