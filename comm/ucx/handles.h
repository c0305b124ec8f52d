// Owners of UCP handles, and UCP's errors as absl::Status.
#ifndef COMM_UCX_HANDLES_H_
#define COMM_UCX_HANDLES_H_

#include <ucp/api/ucp.h>

#include <memory>
#include <type_traits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace nsa::comm::ucx {

struct ConfigDeleter {
  void operator()(ucp_config_t* config) const { ucp_config_release(config); }
};
struct ContextDeleter {
  void operator()(ucp_context_h context) const { ucp_cleanup(context); }
};
struct WorkerDeleter {
  void operator()(ucp_worker_h worker) const { ucp_worker_destroy(worker); }
};
struct RkeyDeleter {
  void operator()(ucp_rkey_h rkey) const { ucp_rkey_destroy(rkey); }
};
struct PackedRkeyDeleter {
  void operator()(void* buffer) const { ucp_rkey_buffer_release(buffer); }
};

using Config = std::unique_ptr<ucp_config_t, ConfigDeleter>;
using Context = std::unique_ptr<std::remove_pointer_t<ucp_context_h>, ContextDeleter>;
using WorkerHandle = std::unique_ptr<std::remove_pointer_t<ucp_worker_h>, WorkerDeleter>;
using Rkey = std::unique_ptr<std::remove_pointer_t<ucp_rkey_h>, RkeyDeleter>;
using PackedRkey = std::unique_ptr<void, PackedRkeyDeleter>;

inline absl::Status UcsError(absl::string_view expression, ucs_status_t status) {
  return absl::InternalError(absl::StrCat(expression, ": ", ucs_status_string(status)));
}

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_HANDLES_H_
