#include "comm/checks.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace nsa::comm {
namespace {

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

bool IsRank(int32_t rank, int size) { return rank >= 0 && rank < size; }

absl::Status CheckOp(absl::string_view what, size_t i, int32_t peer, const void* data,
                     int64_t num_bytes, int size) {
  if (!IsRank(peer, size)) {
    return Invalid("Exchange: ", what, "[", i, "].peer: ", peer, "; must be in [0, ", size, ")");
  }
  if (num_bytes < 0) {
    return Invalid("Exchange: ", what, "[", i, "].num_bytes: ", num_bytes, "; must be >= 0");
  }
  if (num_bytes > 0 && data == nullptr) {
    return Invalid("Exchange: ", what, "[", i, "].data: null; must hold ", num_bytes, " bytes");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckAllGather(const void* buffer, absl::Span<const GatherRun> runs, int size) {
  std::vector<size_t> order;
  for (size_t i = 0; i < runs.size(); ++i) {
    const GatherRun& run = runs[i];
    if (!IsRank(run.rank, size)) {
      return Invalid("AllGather: runs[", i, "].rank: ", run.rank, "; must be in [0, ", size, ")");
    }
    if (run.offset_bytes < 0) {
      return Invalid("AllGather: runs[", i, "].offset_bytes: ", run.offset_bytes, "; must be >= 0");
    }
    if (run.num_bytes < 0 ||
        run.num_bytes > std::numeric_limits<int64_t>::max() - run.offset_bytes) {
      return Invalid("AllGather: runs[", i, "].num_bytes: ", run.num_bytes,
                     "; must be >= 0 and end within int64");
    }
    if (run.num_bytes > 0) order.push_back(i);
  }
  if (!order.empty() && buffer == nullptr) {
    return Invalid("AllGather: buffer: null; must hold the runs");
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return runs[a].offset_bytes < runs[b].offset_bytes; });
  for (size_t i = 1; i < order.size(); ++i) {
    const GatherRun& before = runs[order[i - 1]];
    if (before.offset_bytes + before.num_bytes > runs[order[i]].offset_bytes) {
      return Invalid("AllGather: runs[", order[i], "].offset_bytes: ", runs[order[i]].offset_bytes,
                     "; must not overlap runs[", order[i - 1], "], which ends at ",
                     before.offset_bytes + before.num_bytes);
    }
  }
  return absl::OkStatus();
}

absl::Status CheckExchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs, int rank,
                           int size) {
  std::vector<int64_t> own;
  for (size_t i = 0; i < sends.size(); ++i) {
    if (absl::Status s =
            CheckOp("sends", i, sends[i].peer, sends[i].data, sends[i].num_bytes, size);
        !s.ok()) {
      return s;
    }
    if (sends[i].peer == rank) own.push_back(sends[i].num_bytes);
  }
  size_t matched = 0;
  for (size_t i = 0; i < recvs.size(); ++i) {
    if (absl::Status s =
            CheckOp("recvs", i, recvs[i].peer, recvs[i].data, recvs[i].num_bytes, size);
        !s.ok()) {
      return s;
    }
    if (recvs[i].peer != rank) continue;
    if (matched < own.size() && own[matched] != recvs[i].num_bytes) {
      return Invalid("Exchange: recvs[", i, "].num_bytes: ", recvs[i].num_bytes,
                     "; must equal the matching send of rank ", rank, " to itself, ", own[matched]);
    }
    ++matched;
  }
  if (matched != own.size()) {
    return Invalid("Exchange: recvs: ", matched, " from rank ", rank,
                   " itself; must be as many as its sends to itself, ", own.size());
  }
  return absl::OkStatus();
}

absl::Status CheckGather(const GatherList& list, int64_t record_bytes, const void* dst,
                         absl::Span<const int64_t> window_bytes) {
  if (record_bytes <= 0) {
    return Invalid("Gather: record_bytes: ", record_bytes, "; must be > 0");
  }
  if (list.count == nullptr) return Invalid("Gather: list.count: null; must point to the count");
  const int64_t count = *list.count;
  if (count < 0 || count > list.max_count) {
    return Invalid("Gather: *list.count: ", count, "; must be in [0, max_count], which is ",
                   list.max_count);
  }
  if (count == 0) return absl::OkStatus();
  if (list.peers == nullptr || list.offsets == nullptr || dst == nullptr) {
    return Invalid("Gather: list.peers, list.offsets or dst: null; must hold ", count, " records");
  }
  const int size = static_cast<int>(window_bytes.size());
  for (int64_t i = 0; i < count; ++i) {
    const int32_t peer = list.peers[i];
    if (!IsRank(peer, size)) {
      return Invalid("Gather: list.peers[", i, "]: ", peer, "; must be in [0, ", size, ")");
    }
    if (list.offsets[i] < 0 || list.offsets[i] > window_bytes[peer] - record_bytes) {
      return Invalid("Gather: list.offsets[", i, "]: ", list.offsets[i], "; ", record_bytes,
                     " bytes from there must lie in the window of rank ", peer, ", which has ",
                     window_bytes[peer]);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<HostGatherList> ReadGatherList(
    const GatherList& list, int64_t record_bytes, const void* dst,
    absl::Span<const int64_t> window_bytes,
    absl::FunctionRef<absl::Status(void* dst, const void* src, int64_t num_bytes)> copy) {
  HostGatherList read;
  int32_t count = 0;
  if (list.count != nullptr) {
    if (absl::Status s = copy(&count, list.count, sizeof(count)); !s.ok()) return s;
  }
  if (count > 0 && count <= list.max_count && list.peers != nullptr && list.offsets != nullptr) {
    read.peers.resize(count);
    read.offsets.resize(count);
    absl::Status status = copy(read.peers.data(), list.peers, count * int64_t{sizeof(int32_t)});
    if (status.ok()) {
      status = copy(read.offsets.data(), list.offsets, count * int64_t{sizeof(int64_t)});
    }
    if (!status.ok()) return status;
  }
  const GatherList on_host = {read.peers.empty() ? nullptr : read.peers.data(),
                              read.offsets.empty() ? nullptr : read.offsets.data(),
                              list.count == nullptr ? nullptr : &count, list.max_count};
  if (absl::Status s = CheckGather(on_host, record_bytes, dst, window_bytes); !s.ok()) return s;
  return read;
}

absl::Status CheckWindowBytes(int64_t num_bytes) {
  if (num_bytes >= 0) return absl::OkStatus();
  return Invalid("CreateWindow: num_bytes: ", num_bytes, "; must be >= 0");
}

std::vector<GatherRun> MergeRuns(absl::Span<const GatherRun> runs) {
  std::vector<GatherRun> merged;
  for (const GatherRun& run : runs) {
    if (run.num_bytes == 0) continue;
    if (!merged.empty() && merged.back().rank == run.rank &&
        merged.back().offset_bytes + merged.back().num_bytes == run.offset_bytes) {
      merged.back().num_bytes += run.num_bytes;
    } else {
      merged.push_back(run);
    }
  }
  return merged;
}

std::vector<WindowRead> MergeRecords(const GatherList& list, int64_t record_bytes) {
  std::vector<WindowRead> reads;
  for (int64_t i = 0; i < *list.count; ++i) {
    if (!reads.empty() && reads.back().peer == list.peers[i] &&
        reads.back().window_offset + reads.back().num_bytes == list.offsets[i]) {
      reads.back().num_bytes += record_bytes;
    } else {
      reads.push_back({list.peers[i], list.offsets[i], i * record_bytes, record_bytes});
    }
  }
  return reads;
}

absl::Status WindowOrder::OutOfOrder(absl::string_view call) const {
  const absl::string_view state = state_ == State::kReleased  ? "released"
                                  : state_ == State::kWriting ? "being written"
                                                              : "published";
  return Invalid(call, ": the window is ", state, " (epoch ", epoch_,
                 "); the order of an epoch is BeginWrite, Publish, any Gathers, Release");
}

absl::Status WindowOrder::BeginWrite() {
  if (state_ != State::kReleased) return OutOfOrder("BeginWrite");
  state_ = State::kWriting;
  ++epoch_;
  return absl::OkStatus();
}

absl::Status WindowOrder::Publish() {
  if (state_ != State::kWriting) return OutOfOrder("Publish");
  state_ = State::kPublished;
  return absl::OkStatus();
}

absl::Status WindowOrder::Gather() const {
  return state_ == State::kPublished ? absl::OkStatus() : OutOfOrder("Gather");
}

absl::Status WindowOrder::Release() {
  if (state_ != State::kPublished) return OutOfOrder("Release");
  state_ = State::kReleased;
  return absl::OkStatus();
}

}  // namespace nsa::comm
