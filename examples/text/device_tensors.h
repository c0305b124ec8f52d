// The tensors of a rank where its kernels compute: the host's memory or a GPU's.
#ifndef EXAMPLES_TEXT_DEVICE_TENSORS_H_
#define EXAMPLES_TEXT_DEVICE_TENSORS_H_

#include <map>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "nsa/config.h"
#include "nsa/engine.h"

namespace nsa::examples {

class DeviceTensors {
 public:
  // Copies `host`, dense tensors without compressor parameters, to memory of `kernels`, and takes
  // memory for o (bf16) and block_indices there.
  static absl::StatusOr<DeviceTensors> Create(const ForwardInputs& host, const NsaConfig& config,
                                              kernels::Kernels& kernels);

  // Copies other tensors of the same shapes over them.
  absl::Status Update(const ForwardInputs& host, kernels::Kernels& kernels);

  const ForwardInputs& inputs() const { return inputs_; }
  const ForwardOutputs& outputs() const { return outputs_; }

 private:
  absl::StatusOr<void*> Allocate(int64_t num_bytes, kernels::Kernels& kernels);
  // Makes `tensor`, which lies on the host, one on the device.
  absl::Status Load(ConstTensor& tensor, kernels::Kernels& kernels);

  ForwardInputs inputs_;
  ForwardOutputs outputs_;
  std::map<const void*, void*> loaded_;  // by place on the host: branches may share tensors
  std::vector<std::unique_ptr<kernels::Memory>> memory_;
};

// Bytes of a token.
int64_t ORowBytes(const NsaConfig& config);
int64_t IndicesRowBytes(const NsaConfig& config);

}  // namespace nsa::examples

#endif  // EXAMPLES_TEXT_DEVICE_TENSORS_H_
