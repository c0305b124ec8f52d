#include "comm/inbox.h"

#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

using Fate = Inbox::Fate;

MessageHeader Header(int64_t call, int32_t sender, int32_t index, int32_t count, int64_t num_bytes,
                     CallKind kind = CallKind::kExchange) {
  return {call, num_bytes, sender, index, count, kind};
}

class InboxTest : public testing::Test {
 protected:
  Inbox inbox_{0, 3};
  char data_[16];
  std::string blob_;
};

TEST_F(InboxTest, PairsInOrderOfIndex) {
  EXPECT_EQ(inbox_.Offer(Header(1, 1, 0, 2, 4)), Fate::kEarly);
  inbox_.Begin(1, CallKind::kExchange,
               {{{1, data_, 4, nullptr}, {2, nullptr, 0, &blob_}, {1, data_ + 4, 8, nullptr}}});
  EXPECT_EQ(inbox_.Awaited(), (std::vector<int>{1, 2}));
  EXPECT_EQ(inbox_.Offer(Header(1, 1, 1, 2, 8)), Fate::kDeliver);
  EXPECT_EQ(inbox_.Destination(Header(1, 1, 1, 2, 8)), data_ + 4);
  inbox_.Delivered(Header(1, 1, 1, 2, 8));
  EXPECT_EQ(inbox_.Offer(Header(1, 2, 0, 1, 5)), Fate::kDeliver);
  EXPECT_EQ(inbox_.Destination(Header(1, 2, 0, 1, 5)), blob_.data());
  EXPECT_EQ(blob_.size(), 5u);
  inbox_.Delivered(Header(1, 2, 0, 1, 5));
  EXPECT_EQ(inbox_.Awaited(), std::vector<int>{1});
  EXPECT_EQ(inbox_.Offer(Header(1, 1, 0, 2, 4)), Fate::kDeliver);
  inbox_.Delivered(Header(1, 1, 0, 2, 4));
  EXPECT_TRUE(inbox_.done());
  EXPECT_TRUE(inbox_.Finish().ok());
}

TEST_F(InboxTest, OtherSizeIsInvalidAndTheCallCompletes) {
  inbox_.Begin(1, CallKind::kExchange, {{{1, data_, 4, nullptr}}});
  EXPECT_EQ(inbox_.Offer(Header(1, 1, 0, 1, 5)), Fate::kDrop);
  EXPECT_TRUE(inbox_.done());
  EXPECT_EQ(inbox_.Finish().message(),
            "Exchange: rank 1 sent 5 bytes as message 0 to rank 0, which receives 4; the sizes "
            "must be equal");
  inbox_.Begin(2, CallKind::kBarrier, {});
  EXPECT_TRUE(inbox_.Finish().ok());
}

TEST_F(InboxTest, OtherNumberIsInvalidAndTheRestIsDroppedWheneverItComes) {
  inbox_.Begin(1, CallKind::kExchange, {{{1, data_, 4, nullptr}}});
  EXPECT_EQ(inbox_.Offer(Header(1, 1, 0, 2, 4)), Fate::kDrop);
  EXPECT_TRUE(inbox_.done());
  EXPECT_EQ(inbox_.Finish().code(), absl::StatusCode::kInvalidArgument);
  inbox_.Begin(2, CallKind::kBarrier, {});
  EXPECT_EQ(inbox_.Offer(Header(1, 1, 1, 2, 4)), Fate::kDrop);
}

TEST_F(InboxTest, RanksOutOfStepBreakTheGroup) {
  inbox_.Begin(1, CallKind::kExchange, {{{1, data_, 4, nullptr}}});
  EXPECT_EQ(inbox_.Offer(Header(1, 1, 0, 1, 4, CallKind::kBarrier)), Fate::kBreak);
  EXPECT_EQ(inbox_.violation().code(), absl::StatusCode::kFailedPrecondition);
  inbox_.Finish().IgnoreError();
  inbox_.Begin(2, CallKind::kExchange, {});
  EXPECT_EQ(inbox_.Offer(Header(1, 2, 0, 1, 4)), Fate::kBreak);
}

}  // namespace
}  // namespace nsa::comm
