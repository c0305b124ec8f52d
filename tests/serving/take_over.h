// A cache of few pages, and a forward that it takes over.
#ifndef TESTS_SERVING_TAKE_OVER_H_
#define TESTS_SERVING_TAKE_OVER_H_

#include <memory>
#include <vector>

#include "comm/communicator.h"
#include "kernels/kernels.h"
#include "nsa/engine.h"
#include "nsa/serving/kv_cache.h"

namespace nsa::test {

inline serving::KvCacheOptions SmallCache() {
  serving::KvCacheOptions options;
  options.config.num_q_heads = options.config.num_kv_heads = 1;
  options.config.head_dim_qk = options.config.head_dim_v = 64;
  options.dtype = DType::kF32;
  options.num_pages = 4;
  options.max_tokens = 1024;
  return options;
}

struct TakeOverStreams {
  void* forward = nullptr;
  void* append = nullptr;
};

// A forward of 100 tokens on each rank, then `between()`, then its AppendForward to a sequence of
// rank 0.
template <typename Between>
absl::Status TakeOver(const std::shared_ptr<comm::Communicator>& communicator,
                      const std::shared_ptr<kernels::Kernels>& kernels, Between between,
                      const TakeOverStreams& streams = {}) {
  constexpr int64_t kTokens = 100;
  const serving::KvCacheOptions options = SmallCache();
  auto cache = serving::KvCache::Create(options, communicator, kernels);
  if (!cache.ok()) return cache.status();
  const int size = communicator->size();
  auto engine =
      Engine::Create({.config = options.config, .dtype = options.dtype},
                     *ShardPlan::Parse("contiguous", size * kTokens, size), communicator, kernels);
  if (!engine.ok()) return engine.status();
  std::vector<float> zeros(kTokens * 64), o(kTokens * 64);
  const ConstTensor rows(zeros.data(), DType::kF32, {kTokens, 1, 64});
  ForwardInputs inputs;
  inputs.q = rows;
  inputs.gate = ConstTensor(zeros.data(), DType::kF32, {kTokens, 1, 3});
  inputs.SetSharedKv(rows, rows);
  ForwardOutputs outputs;
  outputs.o = Tensor(o.data(), DType::kF32, {kTokens, 1, 64});
  if (absl::Status s = (*engine)->Forward(inputs, outputs, streams.forward); !s.ok()) return s;
  serving::SequenceId sequence = 0;
  if (communicator->rank() == 0) {
    const auto opened = (*cache)->Open();
    if (!opened.ok()) return opened.status();
    sequence = *opened;
  }
  between();
  return (*cache)->AppendForward(/*home=*/0, sequence, **engine, inputs, /*document=*/0,
                                 streams.append);
}

}  // namespace nsa::test

#endif  // TESTS_SERVING_TAKE_OVER_H_
