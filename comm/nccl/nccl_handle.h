// A non-blocking ncclComm_t: every wait for NCCL on the host has a deadline.
#ifndef COMM_NCCL_NCCL_HANDLE_H_
#define COMM_NCCL_NCCL_HANDLE_H_

#include <nccl.h>

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "comm/nccl/group_health.h"

namespace nsa::comm::nccl {

// Thread-safe.
class NcclHandle {
 public:
  // Collective. `id` is what NewId gave rank 0.
  static absl::StatusOr<std::unique_ptr<NcclHandle>> Create(const std::string& id, int rank,
                                                            int size, absl::Duration timeout,
                                                            GroupHealth* health);
  static absl::StatusOr<std::string> NewId();
  // Takes `comm`, which must be ready.
  static std::unique_ptr<NcclHandle> Adopt(ncclComm_t comm, int rank, GroupHealth* health);
  // Frees the communicator: in good order, unless it was aborted or its end takes too long.
  ~NcclHandle();

  // Calls `call` and waits on the host until NCCL has taken it, which may need the other ranks.
  // Unless it succeeds, the communicator is of no use any more; it is for the caller to say so to
  // the group. `name` is the call in errors.
  absl::Status Run(absl::string_view name, absl::Duration timeout,
                   absl::FunctionRef<ncclResult_t(ncclComm_t)> call);

  // OK, or what NCCL's own threads found. OK too while another thread is in Run.
  absl::Status AsyncError();

  // Ends the kernels in flight. Later calls fail.
  void Abort() ABSL_NO_THREAD_SAFETY_ANALYSIS;

 private:
  NcclHandle(int rank, GroupHealth* health) : rank_(rank), health_(*health) {}
  absl::Status AwaitTaken(absl::string_view name, absl::Duration timeout);

  const int rank_;
  GroupHealth& health_;
  absl::Mutex mu_;
  ncclComm_t comm_ ABSL_GUARDED_BY(mu_) = nullptr;  // null: aborted
};

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_NCCL_HANDLE_H_
