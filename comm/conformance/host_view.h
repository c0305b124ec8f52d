// A communicator for device memory seen as one for host memory, so that what is written for the
// host, such as the conformance suite, runs on it.
#ifndef COMM_CONFORMANCE_HOST_VIEW_H_
#define COMM_CONFORMANCE_HOST_VIEW_H_

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/device_memory.h"

namespace nsa::comm::conformance {

// What a Gather has found wrong with its list by the time its stream has come to its end.
using ListErrorOf = std::function<absl::Status(Window&)>;

// Calls `inner` with the null stream, and waits for it. `list_error` may be null.
std::unique_ptr<Communicator> MakeHostView(std::unique_ptr<Communicator> inner,
                                           std::shared_ptr<DeviceMemory> memory,
                                           ListErrorOf list_error = nullptr);

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_HOST_VIEW_H_
