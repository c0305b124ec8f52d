// Host memory for Kernels::Allocate and for scratch.
#ifndef KERNELS_CPU_MEMORY_H_
#define KERNELS_CPU_MEMORY_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

// Zeroed, 256-byte aligned at least. ResourceExhausted, naming bytes asked and free, when the
// system says that it has less available: on Linux asking for more would succeed, and kill the
// process when the memory is touched.
absl::StatusOr<std::unique_ptr<Memory>> AllocateMemory(int64_t num_bytes);

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_MEMORY_H_
