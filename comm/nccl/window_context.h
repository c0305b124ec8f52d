// What windows need of their communicator.
#ifndef COMM_NCCL_WINDOW_CONTEXT_H_
#define COMM_NCCL_WINDOW_CONTEXT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "comm/communicator.h"
#include "comm/cuda_status.h"
#include "comm/nccl/group_health.h"
#include "comm/nccl/peer_memory.h"

namespace nsa::comm::nccl {

struct WindowContext {
  int rank;
  int size;
  int device;
  absl::Duration timeout;
  int gather_ctas;
  int gather_warps;
  GroupHealth* health;
  cudaStream_t stream;  // of the host's own work; never waits for a peer

  // Of windows that peers load and store: takes a buffer that this rank uses no more.
  std::function<void(int64_t id, std::unique_ptr<PeerBuffer> buffer)> retire;

  // Of windows in packs: an all-gather on the host, as part of `call`, and an Exchange.
  std::function<absl::StatusOr<std::vector<std::string>>(absl::string_view call,
                                                         absl::string_view mine)>
      host_all_gather;
  std::function<absl::Status(absl::Span<const SendOp> sends, absl::Span<const RecvOp> recvs,
                             cudaStream_t stream)>
      exchange;

  // Waits for what this rank has enqueued up to `event`: kernels that wait for peers end by their
  // own limit or because the communicator breaks. False when it has not happened even then.
  bool AwaitIdle(cudaEvent_t event) const {
    const absl::Time deadline = absl::Now() + timeout + absl::Seconds(2);
    while (cudaEventQuery(event) == cudaErrorNotReady) {
      if (absl::Now() >= deadline) return false;
      absl::SleepFor(absl::Microseconds(20));
    }
    return true;
  }
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_WINDOW_CONTEXT_H_
