// The engine as a layer whose inputs, outputs and gradients are read and written on the host.
#ifndef EXAMPLES_05_TRAINING_ATTENTION_H_
#define EXAMPLES_05_TRAINING_ATTENTION_H_

#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "nsa/config.h"
#include "nsa/engine.h"
#include "nsa/plan/sharding.h"
#include "tools/launch/launch.h"

namespace nsa::training {

// A dense tensor in memory of the kernels, f32 or bf16, and its values on the host.
class Array {
 public:
  absl::Status Create(std::shared_ptr<kernels::Kernels> kernels, DType dtype, Dims shape);
  absl::Status ToDevice();  // rounds
  absl::Status ToHost();
  const Tensor& device() const { return device_; }

  std::vector<float> host;

 private:
  std::shared_ptr<kernels::Kernels> kernels_;
  std::unique_ptr<kernels::Memory> memory_;
  Tensor device_;
};

// T: this rank's tokens. Branches share k and v; the compressors are weighted ones for all heads.
struct AttentionArrays {
  Array q;         // [T,Hq,D]
  Array k, v;      // [T,Hkv,D]
  Array gate;      // [T,Hq,3]
  Array weight_k;  // [1,l]
  Array pe_k;      // [1,l,D]
  Array weight_v;  // [1,l]
  Array pe_v;      // [1,l,D]
  Array o;         // [T,Hq,D]

  std::vector<Array*> Inputs() { return {&q, &k, &v, &gate, &weight_k, &pe_k, &weight_v, &pe_v}; }
};

class Attention {
 public:
  // Collective, as all calls. `dtype`: of q, k, v and o on the device.
  static absl::StatusOr<std::unique_ptr<Attention>> Create(const NsaConfig& config, DType dtype,
                                                           const ShardPlan& plan,
                                                           const tools::RankContext& context);
  absl::Status Forward();   // of `values`: fills o
  absl::Status Backward();  // of the last Forward; of `gradients`: given o, fills all others, those
                            // of compressors with the part of this rank's blocks

  AttentionArrays values, gradients;

 private:
  explicit Attention(const tools::RankContext& context) : context_(context) {}

  const tools::RankContext context_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<SavedForward> saved_;
  ForwardInputs inputs_;
  Gradients wanted_;
};

}  // namespace nsa::training

#endif  // EXAMPLES_05_TRAINING_ATTENTION_H_
