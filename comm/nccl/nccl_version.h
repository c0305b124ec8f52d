// Which versions of NCCL may run together.
#ifndef COMM_NCCL_NCCL_VERSION_H_
#define COMM_NCCL_NCCL_VERSION_H_

#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace nsa::comm::nccl {

// The oldest that will do, as ncclGetVersion counts: windows and their device API came with it.
inline constexpr int kOldestNccl = 22800;

// "2.28.9".
std::string NcclVersionName(int version);

// `versions` holds what ncclGetVersion says on each rank. FailedPrecondition, the same on all
// ranks, unless all run the same version and that is new enough.
absl::Status CheckNcclVersions(absl::Span<const int> versions);

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_NCCL_VERSION_H_
