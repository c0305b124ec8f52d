#include "comm/nccl/nccl_version.h"

#include "gtest/gtest.h"

namespace nsa::comm::nccl {
namespace {

TEST(NcclVersionTest, TheSameOnAllRanks) {
  EXPECT_EQ(CheckNcclVersions({22809, 22809, 22809}), absl::OkStatus());
  EXPECT_EQ(CheckNcclVersions({22800}), absl::OkStatus());
  EXPECT_EQ(CheckNcclVersions({22809, 22809, 23004}),
            absl::FailedPreconditionError("NCCL's version: rank 2 runs 2.30.4, rank 0 runs 2.28.9; "
                                          "must be the same on all ranks"));
}

TEST(NcclVersionTest, NewEnough) {
  EXPECT_EQ(
      CheckNcclVersions({22809, 22707}),
      absl::FailedPreconditionError("NCCL's version: rank 1 runs 2.27.7; must be at least 2.28.0"));
}

}  // namespace
}  // namespace nsa::comm::nccl
