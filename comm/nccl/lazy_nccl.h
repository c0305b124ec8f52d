// NCCL, opened when it is first wanted.
#ifndef COMM_NCCL_LAZY_NCCL_H_
#define COMM_NCCL_LAZY_NCCL_H_

#include "absl/status/status.h"

namespace nsa::comm {

// See OpenLibrary of comm/lazy_library.h.
absl::Status OpenNccl();

}  // namespace nsa::comm

#endif  // COMM_NCCL_LAZY_NCCL_H_
