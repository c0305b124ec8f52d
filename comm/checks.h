// Argument rules of communicator.h, checked before anything is sent. Every backend uses these.
#ifndef COMM_CHECKS_H_
#define COMM_CHECKS_H_

#include <cstdint>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "comm/communicator.h"

namespace nsa::comm {

// Ranks in [0, size), offsets and sizes >= 0, no two runs overlap, buffer not null when bytes move.
absl::Status CheckAllGather(const void* buffer, absl::Span<const GatherRun> runs, int size);

// Peers in [0, size), sizes >= 0, data not null when bytes move; sends to oneself pair up in number
// and size with receives from oneself.
absl::Status CheckExchange(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs, int rank,
                           int size);

// Count within max_count, peers in [0, size), every record inside its peer's window. The list lies
// in host memory. `window_bytes` holds each rank's window size.
absl::Status CheckGather(const GatherList& list, int64_t record_bytes, const void* dst,
                         absl::Span<const int64_t> window_bytes);

// A record list on the host.
struct HostGatherList {
  std::vector<int32_t> peers;
  std::vector<int64_t> offsets;
};

// Fetches a list that lies in other memory, by `copy`, whose bytes are there when it returns, and
// checks it as CheckGather does.
absl::StatusOr<HostGatherList> ReadGatherList(
    const GatherList& list, int64_t record_bytes, const void* dst,
    absl::Span<const int64_t> window_bytes,
    absl::FunctionRef<absl::Status(void* dst, const void* src, int64_t num_bytes)> copy);

absl::Status CheckWindowBytes(int64_t num_bytes);

// The runs that move bytes, in the given order, with neighbours of one rank made one run. Ranks
// that pass the same runs get the same result, which is what pairs messages up.
std::vector<GatherRun> MergeRuns(absl::Span<const GatherRun> runs);

// A contiguous piece of a peer's window and its place in the destination.
struct WindowRead {
  int32_t peer;
  int64_t window_offset;
  int64_t dst_offset;
  int64_t num_bytes;
};

// The records as reads, neighbours in both window and destination made one read.
std::vector<WindowRead> MergeRecords(const GatherList& list, int64_t record_bytes);

// The order of calls on a window, see Window in communicator.h.
class WindowOrder {
 public:
  // Each returns InvalidArgument when the call is out of order.
  absl::Status BeginWrite();
  absl::Status Publish();
  absl::Status Gather() const;
  absl::Status Release();

  // Counts from 1 with the first BeginWrite.
  int64_t epoch() const { return epoch_; }
  // The last epoch whose data peers may read, 0 before the first Publish.
  int64_t published_epoch() const { return state_ == State::kWriting ? epoch_ - 1 : epoch_; }

 private:
  enum class State { kReleased, kWriting, kPublished };
  absl::Status OutOfOrder(absl::string_view call) const;

  State state_ = State::kReleased;
  int64_t epoch_ = 0;
};

}  // namespace nsa::comm

#endif  // COMM_CHECKS_H_
