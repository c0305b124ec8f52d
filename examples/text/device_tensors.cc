#include "examples/02_demo/device_tensors.h"

#include <cstdint>
#include <utility>

namespace nsa::demo {

absl::StatusOr<DeviceTensors> DeviceTensors::Create(const ForwardInputs& host,
                                                    const NsaConfig& config,
                                                    kernels::Kernels& kernels) {
  DeviceTensors tensors;
  ForwardInputs& inputs = tensors.inputs_;
  inputs = host;
  for (ConstTensor* tensor : {&inputs.q, &inputs.k_cmp, &inputs.v_cmp, &inputs.k_slc, &inputs.v_slc,
                              &inputs.k_win, &inputs.v_win, &inputs.gate}) {
    if (absl::Status status = tensors.Load(*tensor, kernels); !status.ok()) return status;
  }
  if (absl::Status status = kernels.Synchronize(nullptr); !status.ok()) return status;

  const int64_t num_tokens = host.q.shape[0];
  absl::StatusOr<void*> o = tensors.Allocate(num_tokens * ORowBytes(config), kernels);
  if (!o.ok()) return o.status();
  absl::StatusOr<void*> indices = tensors.Allocate(num_tokens * IndicesRowBytes(config), kernels);
  if (!indices.ok()) return indices.status();
  tensors.outputs_.o =
      Tensor(*o, DType::kBF16, {num_tokens, config.num_q_heads, config.head_dim_v});
  tensors.outputs_.block_indices = static_cast<int32_t*>(*indices);
  return tensors;
}

absl::StatusOr<void*> DeviceTensors::Allocate(int64_t num_bytes, kernels::Kernels& kernels) {
  auto memory = kernels.Allocate(num_bytes);
  if (!memory.ok()) return memory.status();
  memory_.push_back(*std::move(memory));
  return memory_.back()->data();
}

absl::Status DeviceTensors::Load(ConstTensor& tensor, kernels::Kernels& kernels) {
  const auto [place, is_new] = loaded_.try_emplace(tensor.data, nullptr);
  if (is_new) {
    const int64_t num_bytes = tensor.shape[0] * tensor.strides[0] * SizeOf(tensor.dtype);
    absl::StatusOr<void*> data = Allocate(num_bytes, kernels);
    if (!data.ok()) return data.status();
    absl::Status status = kernels.CopyFromHost(*data, tensor.data, num_bytes, /*stream=*/nullptr);
    if (!status.ok()) return status;
    place->second = *data;
  }
  tensor.data = place->second;
  return absl::OkStatus();
}

int64_t ORowBytes(const NsaConfig& config) {
  return int64_t{config.num_q_heads} * config.head_dim_v * int64_t{sizeof(uint16_t)};
}

int64_t IndicesRowBytes(const NsaConfig& config) {
  return int64_t{config.num_kv_heads} * config.num_selected_blocks * int64_t{sizeof(int32_t)};
}

}  // namespace nsa::demo
