// The backward of one problem in global token order, computed by the ranks of any communicator.
#ifndef TESTS_TESTING_SHARDED_BACKWARD_H_
#define TESTS_TESTING_SHARDED_BACKWARD_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "tests/testing/sharded.h"

namespace nsa::test {

struct BackwardRun {
  DType gradient_dtype = DType::kF32;  // f32 or that of the activations
  bool keep_summaries = true;
  bool keep_blocks = false;
  bool sum_over_ranks = false;
  // Backwards of the same forward, each added to those before.
  int num_accumulated = 1;
  // Runs other forwards between the forward and its backward, and a second one that is saved too.
  bool other_forwards_between = false;
  // The forward leaves what it saves in memory of the caller's, of which the backward gets a copy.
  bool copies_saved = false;
  std::function<absl::Status()> between = nullptr;  // of this rank: the forward and its backward
};

// Gradients of all ranks: those of activations in global token order, those of compressors rank by
// rank. Lies in memory that forked processes share.
class GlobalGradients {
 public:
  enum Field { kDq, kDkCmp, kDvCmp, kDkSlc, kDvSlc, kDkWin, kDvWin, kDgate, kNumFields };
  enum Weight { kWeight, kPe, kW, kW1, kB1, kW2, kB2, kNumWeights };

  GlobalGradients(const Problem& problem, int num_ranks, DType gradient_dtype);
  ~GlobalGradients();
  GlobalGradients(const GlobalGradients&) = delete;
  GlobalGradients& operator=(const GlobalGradients&) = delete;

  static const char* Name(Field field);
  static const char* Name(Weight weight);

  DType dtype() const { return dtype_; }
  Dims shape(Field field) const { return shapes_[field]; }
  std::byte* data(Field field) const { return memory_ + offset_[field]; }
  int64_t num_bytes(Field field) const;
  std::vector<double> Values(Field field) const;

  // Of the compressor of k (0) or v (1). Empty shape: there is none.
  Dims weight_shape(int compressor, Weight weight) const {
    return weight_shapes_[compressor][weight];
  }
  std::byte* weight_data(int compressor, Weight weight, int rank) const;
  // The sum over ranks.
  std::vector<double> WeightValues(int compressor, Weight weight) const;

  int num_ranks() const { return num_ranks_; }

 private:
  const int num_ranks_;
  const DType dtype_;
  Dims shapes_[kNumFields];
  int64_t offset_[kNumFields];
  Dims weight_shapes_[2][kNumWeights];
  int64_t weight_offset_[2][kNumWeights];
  int64_t num_bytes_ = 0;
  std::byte* memory_;
};

// One rank's part: forwards, then the backward of d_o [S,Hq,Dv], in the activations' dtype.
// `outputs`: of the forward.
absl::Status RunRankBackward(const Problem& problem, const Bytes& d_o, const ShardPlan& plan,
                             const RunOptions& options, const BackwardRun& run,
                             std::shared_ptr<comm::Communicator> communicator,
                             std::shared_ptr<kernels::Kernels> kernels, GlobalOutputs* outputs,
                             GlobalGradients* gradients, ForwardStats* stats = nullptr);

// All ranks as threads over a loopback group, as RunLoopback.
absl::Status RunLoopbackBackward(const Problem& problem, const Bytes& d_o, const ShardPlan& plan,
                                 const RunOptions& options, const BackwardRun& run,
                                 GlobalOutputs* outputs, GlobalGradients* gradients,
                                 ForwardStats* stats = nullptr,
                                 const MakeKernels& make_kernels = nullptr);

}  // namespace nsa::test

#endif  // TESTS_TESTING_SHARDED_BACKWARD_H_
