// DeviceMemory of a CUDA device.
#ifndef COMM_CUDA_MEMORY_H_
#define COMM_CUDA_MEMORY_H_

#include <memory>

#include "absl/status/statusor.h"
#include "comm/device_memory.h"

namespace nsa::comm {

// Streams are cudaStream_t of that device (null: its default stream). InvalidArgument when there is
// no such device.
absl::StatusOr<std::shared_ptr<DeviceMemory>> CreateCudaMemory(int device);

}  // namespace nsa::comm

#endif  // COMM_CUDA_MEMORY_H_
