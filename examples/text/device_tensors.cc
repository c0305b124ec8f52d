#include "examples/text/device_tensors.h"

#include <cstdint>
#include <utility>

namespace nsa::examples {
namespace {

constexpr ConstTensor ForwardInputs::*kTensors[] = {
    &ForwardInputs::q,     &ForwardInputs::k_cmp, &ForwardInputs::v_cmp, &ForwardInputs::k_slc,
    &ForwardInputs::v_slc, &ForwardInputs::k_win, &ForwardInputs::v_win, &ForwardInputs::gate};

int64_t NumBytes(const ConstTensor& dense) {
  return dense.shape[0] * dense.strides[0] * SizeOf(dense.dtype);
}

}  // namespace

absl::StatusOr<DeviceTensors> DeviceTensors::Create(const ForwardInputs& host,
                                                    const NsaConfig& config,
                                                    kernels::Kernels& kernels) {
  DeviceTensors tensors;
  ForwardInputs& inputs = tensors.inputs_;
  inputs = host;
  for (ConstTensor ForwardInputs::*tensor : kTensors) {
    if (absl::Status status = tensors.Load(inputs.*tensor, kernels); !status.ok()) return status;
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

absl::Status DeviceTensors::Update(const ForwardInputs& host, kernels::Kernels& kernels) {
  for (ConstTensor ForwardInputs::*tensor : kTensors) {
    const ConstTensor& from = host.*tensor;
    void* const to = const_cast<void*>((inputs_.*tensor).data);
    absl::Status status = kernels.CopyFromHost(to, from.data, NumBytes(from), /*stream=*/nullptr);
    if (!status.ok()) return status;
  }
  return kernels.Synchronize(nullptr);
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
    const int64_t num_bytes = NumBytes(tensor);
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

}  // namespace nsa::examples
