// Calls on streams of their own begin when what they read is there.
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tests/serving/take_over.h"
#include "tests/testing/delegating_kernels.h"

namespace nsa::test {
namespace {

// Remembers which stream has waited for which.
class OrderedKernels final : public DelegatingKernels {
 public:
  using DelegatingKernels::DelegatingKernels;
  absl::Status Record(kernels::Event& event, void* stream) override {
    recorded_[&event] = stream;
    return DelegatingKernels::Record(event, stream);
  }
  absl::Status WaitFor(kernels::Event& event, void* stream) override {
    if (recorded_.count(&event) > 0) waited_.emplace(stream, recorded_[&event]);
    return DelegatingKernels::WaitFor(event, stream);
  }
  bool HasWaited(void* stream, void* for_stream) const {
    return waited_.count({stream, for_stream}) > 0;
  }

 private:
  std::map<kernels::Event*, void*> recorded_;
  std::set<std::pair<void*, void*>> waited_;
};

TEST(StreamOrderTest, AppendForwardWaitsForTheForward) {
  auto group = comm::LoopbackGroup::Create(1, {});
  ASSERT_TRUE(group.ok()) << group.status();
  auto cpu = kernels::CpuKernels::Create({.num_threads = 1});
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  const auto kernels = std::make_shared<OrderedKernels>(*std::move(cpu));
  int forward_stream, append_stream;  // of which CPU kernels know nothing
  const absl::Status status = TakeOver(std::move((*group)[0]), kernels, [] {},
                                       {.forward = &forward_stream, .append = &append_stream});
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(kernels->HasWaited(&append_stream, &forward_stream));
}

}  // namespace
}  // namespace nsa::test
