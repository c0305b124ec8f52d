#include "examples/03_decode/conversation.h"

#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"

namespace nsa::examples {
namespace {

// Refuses the third request; the first of the others fails.
class FakeClient : public Client {
 public:
  absl::StatusOr<ControlResponse> Control(const ControlRequest&, absl::Time) override {
    return absl::UnimplementedError("Control");
  }
  absl::StatusOr<RequestId> Submit(const DecodeRequest&) override {
    if (num_submitted == 2) return absl::ResourceExhaustedError("the queue is full");
    return ++num_submitted;
  }
  bool Cancel(RequestId) override { return false; }
  absl::StatusOr<Result> Next(absl::Time) override {
    return Result{++num_read, num_read == 1 ? absl::UnavailableError("lost") : absl::OkStatus()};
  }
  absl::Status RunCollective(const std::function<absl::Status(serving::KvCache&)>&) override {
    return absl::UnimplementedError("RunCollective");
  }
  RequestId num_submitted = 0, num_read = 0;
};

TEST(ConversationTest, AStepThatFailsLeavesNoRequestBehind) {
  const std::shared_ptr<kernels::Kernels> kernels =
      *kernels::CpuKernels::Create({.num_threads = 1});
  std::vector<Conversation> conversations;
  for (int i = 0; i < 4; ++i) {
    conversations.emplace_back(i, "text", std::vector<Riddle>{{"question", "answer"}}, kernels);
  }
  FakeClient client;
  const absl::Status status = Step(absl::MakeSpan(conversations), client).status();
  EXPECT_EQ(status, absl::ResourceExhaustedError("the queue is full"));
  EXPECT_EQ(client.num_submitted, 2);
  EXPECT_EQ(client.num_read, 2);
}

}  // namespace
}  // namespace nsa::examples
