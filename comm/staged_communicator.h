// A communicator for device memory on top of one for host memory.
#ifndef COMM_STAGED_COMMUNICATOR_H_
#define COMM_STAGED_COMMUNICATOR_H_

#include <memory>

#include "comm/communicator.h"
#include "comm/device_memory.h"

namespace nsa::comm {

// All buffers, windows and lists of the result lie in `memory`. A call waits for what its stream
// holds, copies what others need to the host, and has finished when it returns. A window has a copy
// on the host, made by Publish, unless `windows_on_device`: those of `host` lie in `memory` by
// themselves, and their Gather reads there from others. CreateWindow makes one more collective call
// of `host`.
std::unique_ptr<Communicator> StageThroughHost(std::unique_ptr<Communicator> host,
                                               std::shared_ptr<DeviceMemory> memory,
                                               bool windows_on_device = false);

}  // namespace nsa::comm

#endif  // COMM_STAGED_COMMUNICATOR_H_
