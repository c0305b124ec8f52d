// One problem in global token order, computed by the ranks of any communicator.
#ifndef TESTS_TESTING_SHARDED_H_
#define TESTS_TESTING_SHARDED_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "comm/communicator.h"
#include "gtest/gtest.h"
#include "kernels/kernels.h"
#include "nsa/config.h"
#include "nsa/engine.h"
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

// Any sharding over one to six ranks; chunks may be empty.
ShardPlan RandomPlan(const std::vector<int64_t>& cu_seqlens, Random* random);

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
  // Elements between the rows, and between the heads, of every activation tensor beyond what a
  // dense one has.
  int64_t row_padding = 0;
  int64_t head_padding = 0;
  // The branches are given the same k and v tensors (those of the compressed branch).
  bool share_kv = false;
  // No optional output is asked for: those stay poisoned.
  bool only_o = false;
  int num_forwards = 1;
  bool has_backward = false;
  std::function<void(absl::string_view stage)> on_stage = nullptr;
  const Engine* memory_of = nullptr;  // of this rank
};

class LocalTensor;

// One rank's engine, with the rank's rows of a problem in the kernels' memory.
class RankForward {
 public:
  // Collective.
  static absl::StatusOr<std::unique_ptr<RankForward>> Create(
      const Problem& problem, const ShardPlan& plan, const RunOptions& options,
      std::shared_ptr<comm::Communicator> communicator, std::shared_ptr<kernels::Kernels> kernels);
  ~RankForward();

  // Puts this rank's rows of a problem of the same shapes in the place of those there are.
  absl::Status Load(const Problem& problem);
  // Fills the results, their padding too, with NaN patterns.
  absl::Status Poison();
  // Collective. Enqueues the forward; neither of the others may be called before it is done.
  absl::Status Run(void* stream = nullptr);
  // Puts this rank's rows of the results into `outputs`.
  absl::Status CopyTo(GlobalOutputs* outputs);

  Engine& engine() { return *engine_; }
  const ForwardInputs& inputs() const { return inputs_; }
  const ForwardOutputs& outputs() const { return outputs_; }
  const std::vector<int64_t>& rows() const { return rows_; }

 private:
  RankForward(const ShardPlan& plan, int rank, std::shared_ptr<kernels::Kernels> kernels);
  absl::Status Allocate(const Problem& problem, const RunOptions& options);

  std::vector<int64_t> rows_;  // the global token of each row
  const std::shared_ptr<kernels::Kernels> kernels_;
  std::unique_ptr<Engine> engine_;
  std::vector<LocalTensor> activations_, parameters_, results_;
  ForwardInputs inputs_;
  ForwardOutputs outputs_;
};

// One rank's part: makes an engine, runs the forward on the rank's rows of `problem`, puts its rows
// of the results into `outputs`. `stats` (nullable) is of the last forward, of all ranks.
absl::Status RunRank(const Problem& problem, const ShardPlan& plan, const RunOptions& options,
                     std::shared_ptr<comm::Communicator> communicator,
                     std::shared_ptr<kernels::Kernels> kernels, GlobalOutputs* outputs,
                     ForwardStats* stats = nullptr);

// The kernels of one rank, over host memory.
using MakeKernels = std::function<absl::StatusOr<std::unique_ptr<kernels::Kernels>>()>;

// `run` on every rank, as threads over a loopback group. The first error of the lowest rank.
// `make_kernels`: null for CPU kernels with one thread.
absl::Status OnLoopbackRanks(
    int num_ranks,
    const std::function<absl::Status(std::shared_ptr<comm::Communicator>,
                                     std::shared_ptr<kernels::Kernels>)>& run,
    const MakeKernels& make_kernels = nullptr);
absl::Status RunLoopback(const Problem& problem, const ShardPlan& plan, const RunOptions& options,
                         GlobalOutputs* outputs, ForwardStats* stats = nullptr,
                         const MakeKernels& make_kernels = nullptr);

}  // namespace nsa::test

#endif  // TESTS_TESTING_SHARDED_H_
