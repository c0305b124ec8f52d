#include "comm/nccl/nccl_version.h"

#include "absl/strings/str_cat.h"

namespace nsa::comm::nccl {

std::string NcclVersionName(int version) {
  return absl::StrCat(version / 10000, ".", version / 100 % 100, ".", version % 100);
}

absl::Status CheckNcclVersions(absl::Span<const int> versions) {
  for (size_t rank = 0; rank < versions.size(); ++rank) {
    if (versions[rank] < kOldestNccl) {
      return absl::FailedPreconditionError(
          absl::StrCat("NCCL's version: rank ", rank, " runs ", NcclVersionName(versions[rank]),
                       "; must be at least ", NcclVersionName(kOldestNccl)));
    }
    if (versions[rank] != versions[0]) {
      return absl::FailedPreconditionError(absl::StrCat(
          "NCCL's version: rank ", rank, " runs ", NcclVersionName(versions[rank]),
          ", rank 0 runs ", NcclVersionName(versions[0]), "; must be the same on all ranks"));
    }
  }
  return absl::OkStatus();
}

}  // namespace nsa::comm::nccl
