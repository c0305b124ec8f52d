// The UCP context: which transports there are, and how they are set up.
#ifndef COMM_UCX_CONTEXT_H_
#define COMM_UCX_CONTEXT_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "comm/ucx/handles.h"

namespace nsa::comm::ucx {

// Shared memory, TCP, and what leads to oneself. All of their copying is done by the processor, so
// a worker that is not driven leaves the caller's memory alone.
inline constexpr char kHostTransports[] = "sm,tcp,self";

// Those for memory of CUDA devices, of a UCX that has them.
inline constexpr char kCudaTransports[] = "cuda_copy,cuda_ipc";

// `tls`, or when it is empty what UCX_TLS says, or when that is not set kHostTransports.
std::string ChooseTransports(const std::string& tls);

// True if `tls` allows nothing but the host's transports.
bool AreHostTransports(absl::string_view tls);

// The most bytes of one message. Segments of the host transports are made to hold it, so that it is
// copied once on either side. Shared memory keeps a segment's length in 16 bits.
inline constexpr int64_t kSegmentBytes = 32 << 10;

// InvalidArgument when UCX has none of these transports or devices. `copied_sends`: see
// RemoteReads; without it UCX is free in how it moves bytes.
absl::StatusOr<Context> MakeContext(const std::string& tls, const std::string& net_devices,
                                    bool copied_sends);

// True if UCX moves the memory of CUDA devices by itself.
bool MovesCudaMemory(ucp_context_h context);

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_CONTEXT_H_
