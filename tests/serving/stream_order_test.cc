// Calls on streams of their own begin when what they read is there.
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/engine.h"
#include "nsa/serving/kv_cache.h"
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
  constexpr int64_t kTokens = 100;
  auto group = comm::LoopbackGroup::Create(1, {});
  ASSERT_TRUE(group.ok()) << group.status();
  const std::shared_ptr<comm::Communicator> communicator = std::move((*group)[0]);
  auto cpu = kernels::CpuKernels::Create({.num_threads = 1});
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  const auto kernels = std::make_shared<OrderedKernels>(*std::move(cpu));

  serving::KvCacheOptions options;
  options.config.num_q_heads = options.config.num_kv_heads = 1;
  options.config.head_dim_qk = options.config.head_dim_v = 64;
  options.dtype = DType::kF32;
  options.num_pages = 4;
  options.max_tokens = 1024;
  auto cache = serving::KvCache::Create(options, communicator, kernels);
  ASSERT_TRUE(cache.ok()) << cache.status();
  auto engine = Engine::Create({.config = options.config, .dtype = options.dtype},
                               *ShardPlan::Parse("contiguous", kTokens, 1), communicator, kernels);
  ASSERT_TRUE(engine.ok()) << engine.status();

  std::vector<float> zeros(kTokens * 64), o(kTokens * 64);
  const ConstTensor rows(zeros.data(), DType::kF32, {kTokens, 1, 64});
  ForwardInputs inputs;
  inputs.q = rows;
  inputs.gate = ConstTensor(zeros.data(), DType::kF32, {kTokens, 1, 3});
  inputs.SetSharedKv(rows, rows);
  ForwardOutputs outputs;
  outputs.o = Tensor(o.data(), DType::kF32, {kTokens, 1, 64});
  int forward_stream, append_stream;  // of which CPU kernels know nothing
  absl::Status status = (*engine)->Forward(inputs, outputs, &forward_stream);
  ASSERT_TRUE(status.ok()) << status;
  const auto sequence = (*cache)->Open();
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  status = (*cache)->AppendForward(/*home=*/0, *sequence, **engine, inputs, /*document=*/0,
                                   &append_stream);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(kernels->HasWaited(&append_stream, &forward_stream));
}

}  // namespace
}  // namespace nsa::test
