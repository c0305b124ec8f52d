#include "comm/nccl/exchange_check.h"

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace nsa::comm::nccl {
namespace {

char bytes[64];

TEST(MatchExchange, MovesWhatMatches) {
  const std::vector<SendOp> sends_of_1 = {{0, bytes, 8}, {0, bytes, 16}, {2, bytes, 4}};
  const std::vector<RecvOp> recvs_of_0 = {{1, bytes, 9}, {1, bytes, 16}};
  const std::vector<RecvOp> recvs_of_2 = {{1, bytes, 4}};
  const std::vector<std::string> plans = {EncodePlan({}, recvs_of_0), EncodePlan(sends_of_1, {}),
                                          EncodePlan({}, recvs_of_2)};

  const MatchedExchange at_0 = MatchExchange({}, recvs_of_0, 0, plans);
  ASSERT_EQ(at_0.recvs.size(), 1u);
  EXPECT_EQ(at_0.recvs[0].num_bytes, 16);
  EXPECT_EQ(at_0.mismatch.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      at_0.mismatch.message(),
      "Exchange: rank 1 sent 8 bytes as message 0 to rank 0, which receives 9; the sizes must "
      "be equal");

  const MatchedExchange at_1 = MatchExchange(sends_of_1, {}, 1, plans);
  EXPECT_EQ(at_1.mismatch, absl::OkStatus());
  ASSERT_EQ(at_1.sends.size(), 2u);
  EXPECT_EQ(at_1.sends[0].num_bytes, 16);
  EXPECT_EQ(at_1.sends[1].peer, 2);

  EXPECT_EQ(MatchExchange({}, recvs_of_2, 2, plans).mismatch, absl::OkStatus());
}

TEST(MatchExchange, NumbersDiffer) {
  const std::vector<SendOp> sends = {{0, bytes, 8}, {0, bytes, 8}};
  const std::vector<RecvOp> recvs = {{1, bytes, 8}};
  const std::vector<std::string> plans = {EncodePlan({}, recvs), EncodePlan(sends, {})};
  const MatchedExchange at_0 = MatchExchange({}, recvs, 0, plans);
  EXPECT_TRUE(at_0.recvs.empty());
  EXPECT_TRUE(absl::StrContains(at_0.mismatch.message(), "sent 2 messages to rank 0"));
  EXPECT_TRUE(MatchExchange(sends, {}, 1, plans).sends.empty());
}

TEST(MatchExchange, NobodyReceives) {
  const std::vector<SendOp> sends = {{0, bytes, 8}};
  const std::vector<std::string> plans = {EncodePlan({}, {}), EncodePlan(sends, {})};
  EXPECT_EQ(MatchExchange({}, {}, 0, plans).mismatch.code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nsa::comm::nccl
