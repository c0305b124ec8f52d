// A communicator of device memory as one of host memory, so that tests written for host pointers
// run on it: every call copies its buffers to the device, waits for the stream, and copies back.
#ifndef COMM_NCCL_HOST_VIEW_H_
#define COMM_NCCL_HOST_VIEW_H_

#include <memory>

#include "comm/communicator.h"

namespace nsa::comm::nccl {

// Uses the current device. The windows of `inner` must be DeviceWindows.
std::unique_ptr<Communicator> MakeHostView(std::unique_ptr<Communicator> inner);

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_HOST_VIEW_H_
