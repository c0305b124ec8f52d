// UCX, opened when it is first wanted.
#ifndef COMM_UCX_LAZY_UCX_H_
#define COMM_UCX_LAZY_UCX_H_

#include "absl/status/status.h"

namespace nsa::comm {

// See OpenLibrary of comm/lazy_library.h.
absl::Status OpenUcx();

}  // namespace nsa::comm

#endif  // COMM_UCX_LAZY_UCX_H_
