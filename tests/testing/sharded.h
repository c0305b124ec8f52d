// One problem in global token order, computed by the ranks of any communicator.
#ifndef TESTS_TESTING_SHARDED_H_
#define TESTS_TESTING_SHARDED_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "comm/communicator.h"
#include "gtest/gtest.h"
#include "kernels/kernels.h"
#include "nsa/config.h"
#include "nsa/plan/sharding.h"
#include "nsa/stats.pb.h"
#include "tests/reference/reference.h"
#include "tests/testing/generate.h"

namespace nsa::test {

NsaConfig MakeNsaConfig(const reference::ReferenceConfig& config);

struct Problem {
  NsaConfig config;
  InputOptions input_options;
  std::vector<int64_t> cu_seqlens;
  EncodedInputs inputs;
  int64_t num_tokens() const { return cu_seqlens.back(); }
};

Problem MakeProblem(const reference::ReferenceConfig& config,
                    const std::vector<int64_t>& cu_seqlens, const InputOptions& options,
                    const reference::ReferenceInputs& inputs);
// Inputs from a seed, for tests that need no reference.
Problem RandomProblem(const reference::ReferenceConfig& config,
                      const std::vector<int64_t>& cu_seqlens, const InputOptions& options,
                      uint64_t seed);

// Results of all ranks in global token order. Lies in memory that forked processes share.
class GlobalOutputs {
 public:
  enum Field { kO, kOCmp, kOSlc, kOWin, kLseCmp, kLseSlc, kLseWin, kBlockIndices, kNumFields };

  explicit GlobalOutputs(const Problem& problem);
  ~GlobalOutputs();
  GlobalOutputs(const GlobalOutputs&) = delete;
  GlobalOutputs& operator=(const GlobalOutputs&) = delete;

  std::byte* data(Field field) const { return memory_ + offset_[field]; }
  int64_t row_bytes(Field field) const { return row_bytes_[field]; }
  std::vector<double> Values(Field field) const;  // not kBlockIndices
  std::vector<int32_t> block_indices() const;
  // Fills everything with NaN patterns.
  void Poison();

 private:
  int64_t num_tokens_;
  DType dtype_;
  int64_t offset_[kNumFields];
  int64_t row_bytes_[kNumFields];
  int64_t num_bytes_ = 0;
  std::byte* memory_;
};

// All fields the same, bit for bit.
::testing::AssertionResult SameOutputs(const Problem& problem, const GlobalOutputs& expected,
                                       const GlobalOutputs& actual);

struct RunOptions {
  int64_t fetch_budget_bytes = int64_t{1} << 30;
  // Elements between the rows of every activation tensor beyond what a dense one has.
  int64_t row_padding = 0;
  // The branches are given the same k and v tensors (those of the compressed branch).
  bool share_kv = false;
  int num_forwards = 1;
  std::function<void(absl::string_view stage)> on_stage = nullptr;
};

// One rank's part: makes an engine, runs the forward on the rank's rows of `problem`, puts its rows
// of the results into `outputs`. `stats` (nullable) is of the last forward, of all ranks.
absl::Status RunRank(const Problem& problem, const ShardPlan& plan, const RunOptions& options,
                     std::shared_ptr<comm::Communicator> communicator,
                     std::shared_ptr<kernels::Kernels> kernels, GlobalOutputs* outputs,
                     ForwardStats* stats = nullptr);

// All ranks as threads over a loopback group and CPU kernels with one thread each. The first error
// of the lowest rank.
absl::Status RunLoopback(const Problem& problem, const ShardPlan& plan, const RunOptions& options,
                         GlobalOutputs* outputs, ForwardStats* stats = nullptr);

}  // namespace nsa::test

#endif  // TESTS_TESTING_SHARDED_H_
