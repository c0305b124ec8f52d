// Memory of a device that is not there: what it allocates must not be loaded or stored by the
// processor, which ends the process.
#ifndef COMM_CONFORMANCE_FAKE_MEMORY_H_
#define COMM_CONFORMANCE_FAKE_MEMORY_H_

#include <memory>

#include "comm/device_memory.h"

namespace nsa::comm::conformance {

// No more than `limit_bytes` at a time.
std::shared_ptr<DeviceMemory> MakeFakeMemory(int64_t limit_bytes);

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_FAKE_MEMORY_H_
