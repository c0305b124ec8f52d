// The tensors that a caller of the passes holds on one rank, in bf16, with values that depend on
// the place in the global tensor alone.
#ifndef BENCHMARKS_CALLER_TENSORS_H_
#define BENCHMARKS_CALLER_TENSORS_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "nsa/engine.h"

namespace nsa::benchmarks {

class CallerTensors {
 public:
  // Of rank `rank` of `plan`, in the memory of `kernels`; k and v are shared by the branches. Which
  // values they have is not said yet. `trains`: also d_o and the gradients.
  static absl::StatusOr<CallerTensors> Allocate(kernels::Kernels& kernels, const NsaConfig& config,
                                                const ShardPlan& plan, int rank,
                                                bool trains = false);

  // q, k, v and d_o about normal, the gates 0.5. For device memory.
  absl::Status Fill(cudaStream_t stream);
  // The inputs of `other`, which has the same shapes, wherever its memory is.
  absl::Status CopyInputs(const CallerTensors& other);

  const ForwardInputs& inputs() const { return inputs_; }
  const ForwardOutputs& outputs() const { return outputs_; }
  const ConstTensor& d_o() const { return d_o_; }
  const Gradients& gradients() const { return gradients_; }

  // Of o, or of dq when there is one, in device memory: its sum over the ranks is equal for equal
  // bits, however they are sharded.
  absl::StatusOr<uint64_t> Fingerprint(kernels::Kernels& kernels, cudaStream_t stream) const;
  absl::StatusOr<std::vector<uint16_t>> OutputOnHost() const;

 private:
  enum { kQ, kK, kV, kO, kGate, kDo, kDq, kDk, kDv, kDgate, kNumParts };
  struct Part {
    int64_t row_elements = 0;  // of a token
    int64_t num_bytes = 0;
    std::unique_ptr<kernels::Memory> memory;
  };

  std::vector<Chunk> chunks_;
  std::array<Part, kNumParts> parts_;
  ForwardInputs inputs_;
  ForwardOutputs outputs_;
  ConstTensor d_o_;
  Gradients gradients_;
};

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_CALLER_TENSORS_H_
