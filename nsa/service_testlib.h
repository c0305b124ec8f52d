// Requests with tensors of their own, and a small service for them.
#ifndef NSA_SERVICE_TESTLIB_H_
#define NSA_SERVICE_TESTLIB_H_

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "nsa/engine_testlib.h"
#include "nsa/service.h"

namespace nsa {

inline ServiceOptions SmallService() {
  ServiceOptions options;
  options.cache.config = SmallConfig();
  options.cache.dtype = DType::kF32;
  options.cache.num_pages = 64;
  options.cache.max_sequences = 8;
  options.cache.max_tokens = 1024;
  return options;
}

// What stands for token number `token` in every head of every tensor. The same tokens in the same
// order give the same bits, wherever they are computed.
inline float TokenValue(int64_t token, int64_t index) {
  const uint32_t mixed = static_cast<uint32_t>(token * 7919 + index * 104729 + 12345) * 2654435761u;
  return static_cast<float>(mixed >> 8) / (1 << 23) - 1.0f;
}

// A request for these tokens, and where its tensors lie. o is poisoned.
struct TokensRequest {
  TokensRequest(serving::SequenceId sequence, const std::vector<int64_t>& tokens) {
    const NsaConfig c = SmallConfig();
    const auto count = static_cast<int64_t>(tokens.size());
    const auto tensor = [&](int64_t heads, int64_t dim, int64_t salt) {
      std::vector<float>& rows = memory.emplace_back();
      for (int64_t token : tokens) {
        for (int64_t i = 0; i < heads * dim; ++i) rows.push_back(TokenValue(token, i + salt));
      }
      return ConstTensor(rows.data(), DType::kF32, {count, heads, dim});
    };
    memory.reserve(4);
    request.sequence = sequence;
    request.inputs.q = tensor(c.num_q_heads, c.head_dim_qk, 0);
    request.inputs.kv.k_slc = tensor(c.num_kv_heads, c.head_dim_qk, 1000);
    request.inputs.kv.v_slc = tensor(c.num_kv_heads, c.head_dim_v, 2000);
    request.inputs.gate = tensor(c.num_q_heads, 3, 3000);
    o.assign(count * c.num_q_heads * c.head_dim_v, kPoison);
    request.o = Tensor(o.data(), DType::kF32, {count, c.num_q_heads, c.head_dim_v});
  }
  bool is_untouched() const { return o == std::vector<float>(o.size(), kPoison); }
  // Appends only.
  TokensRequest& WithoutQueries() {
    request.inputs.q = request.inputs.gate = ConstTensor();
    request.o = Tensor();
    return *this;
  }

  static constexpr float kPoison = 12345.0f;
  DecodeRequest request;
  std::vector<float> o;
  std::vector<std::vector<float>> memory;
};

// Control requests.
inline ControlRequest Open() {
  ControlRequest request;
  request.mutable_open();
  return request;
}
inline ControlRequest Fork(serving::SequenceId sequence) {
  ControlRequest request;
  request.mutable_fork()->set_sequence(sequence);
  return request;
}
inline ControlRequest Truncate(serving::SequenceId sequence, int64_t num_tokens) {
  ControlRequest request;
  request.mutable_truncate()->set_sequence(sequence);
  request.mutable_truncate()->set_num_tokens(num_tokens);
  return request;
}
inline ControlRequest Close(serving::SequenceId sequence) {
  ControlRequest request;
  request.mutable_close()->set_sequence(sequence);
  return request;
}
inline ControlRequest Describe(serving::SequenceId sequence) {
  ControlRequest request;
  request.mutable_describe()->set_sequence(sequence);
  return request;
}

// One rank's cache without a service, of which it is a plain model: one sequence, whole.
class AloneCache {
 public:
  AloneCache() {
    std::shared_ptr<comm::Communicator> communicator =
        std::move((*comm::LoopbackGroup::Create(1))[0]);
    std::shared_ptr<kernels::Kernels> kernels = *kernels::CpuKernels::Create({.num_threads = 1});
    cache_ = *serving::KvCache::Create(SmallService().cache, communicator, kernels);
  }

  // o of the last `count` tokens.
  std::vector<float> Decode(const std::vector<int64_t>& tokens, int64_t count) {
    const std::vector<int64_t> before(tokens.begin(), tokens.end() - count);
    TokensRequest last(*cache_->Open(), {tokens.end() - count, tokens.end()});
    if (!before.empty()) {
      const TokensRequest first(0, before);
      EXPECT_TRUE(cache_->Append(last.request.sequence, first.request.inputs.kv).ok());
    }
    const serving::StepSequence step = {last.request.sequence, static_cast<int32_t>(count)};
    EXPECT_TRUE(cache_->Step({&step, 1}, last.request.inputs, {.o = last.request.o}).ok());
    EXPECT_TRUE(cache_->Close(step.sequence).ok());
    return last.o;
  }

 private:
  std::unique_ptr<serving::KvCache> cache_;
};

}  // namespace nsa

#endif  // NSA_SERVICE_TESTLIB_H_
