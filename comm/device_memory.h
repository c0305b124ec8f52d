// Memory that the processor does not load and store, such as a GPU's, as far as communicators over
// the host need it. An implementation knows the device; comm/staged_communicator does not.
#ifndef COMM_DEVICE_MEMORY_H_
#define COMM_DEVICE_MEMORY_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace nsa::comm {

class DeviceMemory {
 public:
  // 256-byte aligned, freed with its owner.
  using Block = std::unique_ptr<char, std::function<void(char*)>>;

  virtual ~DeviceMemory() = default;
  // Zeros on the device. ResourceExhausted names bytes asked and free.
  virtual absl::StatusOr<Block> Allocate(int64_t num_bytes) = 0;
  // Memory of the host that is copied to and from the device fast.
  virtual absl::StatusOr<Block> AllocateHost(int64_t num_bytes) = 0;
  // Enqueues a copy between any two of the device, what AllocateHost gave, and other host memory
  // that stays as it is until Synchronize.
  virtual absl::Status Copy(void* dst, const void* src, int64_t num_bytes, void* stream) = 0;
  // Waits for what is enqueued on `stream`.
  virtual absl::Status Synchronize(void* stream) = 0;
};

}  // namespace nsa::comm

#endif  // COMM_DEVICE_MEMORY_H_
