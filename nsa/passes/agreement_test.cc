#include "nsa/passes/agreement.h"

#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"

namespace nsa {
namespace {

constexpr int kRanks = 3;

// `mine` and `fields` are of each rank. Expects the same from all, and returns it.
absl::Status AgreeOf(const std::vector<absl::Status>& mine, const std::vector<FieldList>& fields) {
  auto group = comm::LoopbackGroup::Create(kRanks, {.timeout = absl::Seconds(20)});
  EXPECT_TRUE(group.ok()) << group.status();
  std::vector<absl::Status> agreed(kRanks);
  std::vector<std::thread> threads;
  for (int r = 0; r < kRanks; ++r) {
    threads.emplace_back([&, r] {
      agreed[r] = Agree(*(*group)[r], mine[r], fields[r]);
      // And they are in step afterwards.
      EXPECT_TRUE((*group)[r]->Barrier().ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : agreed) EXPECT_EQ(status, agreed[0]);
  return agreed[0];
}

FieldList Numbered(int count) {
  FieldList fields;
  for (int i = 0; i < count; ++i) fields.emplace_back(absl::StrCat("f[", i, "]"), absl::StrCat(i));
  return fields;
}

// Few fields are compared at once, many by a hash first.
class AgreementTest : public ::testing::TestWithParam<int> {
 protected:
  const std::vector<absl::Status> ok_ = std::vector<absl::Status>(kRanks);
  std::vector<FieldList> fields_ = std::vector<FieldList>(kRanks, Numbered(GetParam()));
};

TEST_P(AgreementTest, EqualFields) { EXPECT_TRUE(AgreeOf(ok_, fields_).ok()); }

TEST_P(AgreementTest, NamesTheFieldThatDiffers) {
  const int last = GetParam() - 1;
  fields_[2].back().second = "other";
  EXPECT_EQ(AgreeOf(ok_, fields_),
            absl::InvalidArgumentError(absl::StrCat("f[", last, "]: rank 2 has other, rank 0 has ",
                                                    last, "; must be the same on all ranks")));
}

TEST_P(AgreementTest, NoOpinionAgreesWithAny) {
  fields_[0].back().second = "";
  EXPECT_TRUE(AgreeOf(ok_, fields_).ok());
}

TEST_P(AgreementTest, OneRankHasMany) {
  fields_[1] = Numbered(GetParam() + 2000);
  EXPECT_EQ(AgreeOf(ok_, fields_).code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(AgreementTest, ErrorOfOneRank) {
  std::vector<absl::Status> mine = ok_;
  mine[1] = absl::ResourceExhaustedError("too much");
  EXPECT_EQ(AgreeOf(mine, fields_), absl::ResourceExhaustedError("rank 1: too much"));
}

TEST_P(AgreementTest, ErrorOfAllRanks) {
  const std::vector<absl::Status> mine(kRanks, absl::InvalidArgumentError("bad"));
  EXPECT_EQ(AgreeOf(mine, fields_), absl::InvalidArgumentError("rank 0: bad"));
}

INSTANTIATE_TEST_SUITE_P(Fields, AgreementTest, ::testing::Values(1, 3000));

}  // namespace
}  // namespace nsa
