// How much memory there is to ask for.
#ifndef COMM_HOST_MEMORY_H_
#define COMM_HOST_MEMORY_H_

#include <cstdint>

#include "absl/status/status.h"

namespace nsa::comm {

// ResourceExhausted, with bytes asked and free, when this host has less than `num_bytes` to give.
// Asked before an allocation, because the system promises more than it has and then ends the
// process.
absl::Status CheckMemoryFor(int64_t num_bytes);

// The same error when the allocation itself has failed, for the reason `why`.
absl::Status OutOfMemory(int64_t num_bytes, absl::string_view why);

}  // namespace nsa::comm

#endif  // COMM_HOST_MEMORY_H_
