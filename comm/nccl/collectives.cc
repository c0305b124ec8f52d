#include "comm/nccl/collectives.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "comm/checks.h"

namespace nsa::comm::nccl {
namespace {

int64_t StagingRoom(int64_t num_bytes) {
  return (num_bytes + kStagingAlignment - 1) / kStagingAlignment * kStagingAlignment;
}

// Every rank's runs one after the other in its staging area. False when they do not fit; `runs` are
// the same on all ranks, and so is the answer.
bool StageRuns(int rank, int size, char* buffer, absl::Span<const GatherRun> runs,
               StagedCopies& copies) {
  if (runs.size() > kMaxStagedPieces) return false;
  std::vector<int64_t> used(size, 0);
  for (const GatherRun& run : runs) {
    (run.rank == rank ? copies.in : copies.out)
        .push_back({buffer + run.offset_bytes, used[run.rank], run.num_bytes, run.rank});
    used[run.rank] += StagingRoom(run.num_bytes);
  }
  return *std::max_element(used.begin(), used.end()) <= kStagingBytes;
}

// The messages between two ranks one after the other in the part of the sender's staging area that
// belongs to the receiver: all of them or, when they do not fit, none. Both sides know the sizes.
// Takes what is staged out of `ops`, and empty messages.
template <typename Op>
std::vector<StagedPiece> StageMessages(int rank, int size, std::vector<Op>& ops) {
  const int64_t part = kStagingBytes / size / kStagingAlignment * kStagingAlignment;
  const int64_t max_messages = kMaxStagedPieces / 2 / size;
  std::vector<int64_t> total(size, 0);
  std::vector<int64_t> count(size, 0);
  for (const Op& op : ops) {
    if (op.num_bytes == 0) continue;
    total[op.peer] += StagingRoom(op.num_bytes);
    ++count[op.peer];
  }
  std::vector<int64_t> used(size, 0);
  std::vector<StagedPiece> pieces;
  std::vector<Op> rest;
  for (const Op& op : ops) {
    if (op.num_bytes == 0) continue;
    if (total[op.peer] > part || count[op.peer] > max_messages) {
      rest.push_back(op);
      continue;
    }
    constexpr bool kSends = std::is_same_v<Op, SendOp>;
    const int receiver = kSends ? op.peer : rank;
    pieces.push_back({static_cast<char*>(const_cast<void*>(op.data)),
                      receiver * part + used[op.peer], op.num_bytes, kSends ? rank : op.peer});
    used[op.peer] += StagingRoom(op.num_bytes);
  }
  ops = std::move(rest);
  return pieces;
}

// Sends and receives of a rank in a group of NCCL's. With 1700 on 4 ranks a group waited for ever:
// it seems that NCCL cuts up large groups by itself, on each rank in another place.
constexpr int kMostOperations = 512;

// Of two ranks in a group, one way.
constexpr int MostOfPair(int size) { return std::max(1, kMostOperations / 2 / size); }

// What goes into each group. Message i between two ranks is in the same group on both.
template <typename Op>
std::vector<std::vector<Op>> GroupsOf(int size, const std::vector<Op>& ops) {
  std::vector<std::vector<Op>> groups;
  std::vector<int> count(size, 0);
  for (const Op& op : ops) {
    if (op.num_bytes == 0) continue;
    const size_t group = count[op.peer]++ / MostOfPair(size);
    if (group >= groups.size()) groups.resize(group + 1);
    groups[group].push_back(op);
  }
  return groups;
}

// Groups what `enqueue` enqueues while it returns ncclSuccess.
ncclResult_t InGroup(absl::FunctionRef<ncclResult_t()> enqueue) {
  if (const ncclResult_t begin = ncclGroupStart(); begin != ncclSuccess) return begin;
  const ncclResult_t result = enqueue();
  const ncclResult_t end = ncclGroupEnd();
  return result == ncclSuccess ? end : result;
}

}  // namespace

absl::Status Collectives::Enqueue(WaitingCall call, const StagedCopies& copies, size_t num_groups,
                                  absl::FunctionRef<ncclResult_t(ncclComm_t, size_t)> over_nccl,
                                  cudaStream_t stream) {
  absl::Status status = log_.Begin(call, stream);
  if (!status.ok()) return health_.Break(std::move(status));
  if (meets_) {
    if (cudaError_t e = LaunchMeeting(meeting_, call, copies, stream); e != cudaSuccess) {
      return health_.Break(CudaStatus(e, "Meet"));
    }
  }
  for (size_t group = 0; group < num_groups && status.ok(); ++group) {
    status = nccl_->Run(WaitingCallName(call), timeout_ + kSlack,
                        [&](ncclComm_t comm) { return over_nccl(comm, group); });
  }
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
  const auto nothing = [](ncclComm_t, size_t) { return ncclSuccess; };
  if (StagedCopies copies; meets_ && StageRuns(rank_, size_, bytes, merged, copies)) {
    return Enqueue(WaitingCall::kAllGather, copies, 0, nothing, stream);
  }

  bool by_rank = static_cast<int>(merged.size()) == size_;
  for (int r = 0; by_rank && r < size_; ++r) {
    by_rank = merged[r].rank == r && merged[r].num_bytes == merged[0].num_bytes &&
              merged[r].offset_bytes == merged[0].offset_bytes + r * merged[0].num_bytes;
  }
  if (by_rank) {
    const auto gather = [&](ncclComm_t comm, size_t) {
      return ncclAllGather(bytes + merged[rank_].offset_bytes, bytes + merged[0].offset_bytes,
                           merged[0].num_bytes, ncclInt8, comm, stream);
    };
    return Enqueue(WaitingCall::kAllGather, {}, 1, gather, stream);
  }
  const size_t most = MostOfPair(size_);
  const auto send_and_receive = [&](ncclComm_t comm, size_t group) {
    return InGroup([&] {
      ncclResult_t result = ncclSuccess;
      for (int step = 1; step < size_; ++step) {
        const int to = (rank_ + step) % size_;
        const int from = (rank_ + size_ - step) % size_;
        for (const GatherRun& run : absl::MakeConstSpan(merged).subspan(group * most, most)) {
          char* const data = bytes + run.offset_bytes;
          if (result == ncclSuccess && run.rank == rank_) {
            result = ncclSend(data, run.num_bytes, ncclInt8, to, comm, stream);
          }
          if (result == ncclSuccess && run.rank == from) {
            result = ncclRecv(data, run.num_bytes, ncclInt8, from, comm, stream);
          }
        }
      }
      return result;
    });
  };
  return Enqueue(WaitingCall::kAllGather, {}, (merged.size() + most - 1) / most, send_and_receive,
                 stream);
}

absl::Status Collectives::Exchange(WaitingCall call, absl::Span<const SendOp> sends,
                                   absl::Span<const RecvOp> recvs, cudaStream_t stream) {
  std::vector<SendOp> own;
  std::vector<SendOp> to_peers;
  for (const SendOp& send : sends) (send.peer == rank_ ? own : to_peers).push_back(send);
  std::vector<RecvOp> from_peers;
  size_t next_own = 0;
  for (const RecvOp& recv : recvs) {
    if (recv.peer != rank_) {
      from_peers.push_back(recv);
      continue;
    }
    const SendOp& send = own[next_own++];
    if (recv.num_bytes == 0) continue;
    const cudaError_t e =
        cudaMemcpyAsync(recv.data, send.data, recv.num_bytes, cudaMemcpyDeviceToDevice, stream);
    if (e != cudaSuccess) return health_.Break(CudaStatus(e, "cudaMemcpyAsync"));
  }
  if (size_ == 1) return absl::OkStatus();

  StagedCopies copies;
  if (meets_) {
    copies = {StageMessages(rank_, size_, to_peers), StageMessages(rank_, size_, from_peers)};
  }
  const auto to_send = GroupsOf(size_, to_peers);
  const auto to_receive = GroupsOf(size_, from_peers);
  const auto send_and_receive = [&](ncclComm_t comm, size_t group) {
    return InGroup([&] {
      ncclResult_t result = ncclSuccess;
      if (group < to_send.size()) {
        for (const SendOp& send : to_send[group]) {
          if (result != ncclSuccess) break;
          result = ncclSend(send.data, send.num_bytes, ncclInt8, send.peer, comm, stream);
        }
      }
      if (group < to_receive.size()) {
        for (const RecvOp& recv : to_receive[group]) {
          if (result != ncclSuccess) break;
          result = ncclRecv(recv.data, recv.num_bytes, ncclInt8, recv.peer, comm, stream);
        }
      }
      return result;
    });
  };
  return Enqueue(call, copies, std::max(to_send.size(), to_receive.size()), send_and_receive,
                 stream);
}

}  // namespace nsa::comm::nccl
