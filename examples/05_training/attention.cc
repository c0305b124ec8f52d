#include "examples/05_training/attention.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <functional>
#include <numeric>
#include <utility>

namespace nsa::training {
namespace {

// Rounds to nearest what is not NaN.
uint16_t Bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
float FloatOf(uint16_t bf16) { return std::bit_cast<float>(uint32_t{bf16} << 16); }

}  // namespace

absl::Status Array::Create(std::shared_ptr<kernels::Kernels> kernels, DType dtype, Dims shape) {
  host.resize(std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()));
  const int64_t num_bytes = static_cast<int64_t>(host.size()) * SizeOf(dtype);
  auto memory = kernels->Allocate(std::max<int64_t>(1, num_bytes));  // a rank may have no tokens
  if (!memory.ok()) return memory.status();
  kernels_ = std::move(kernels);
  memory_ = *std::move(memory);
  device_ = Tensor(memory_->data(), dtype, std::move(shape));
  return absl::OkStatus();
}

absl::Status Array::ToDevice() {
  std::vector<uint16_t> rounded(device_.dtype == DType::kF32 ? 0 : host.size());
  std::transform(host.begin(), host.begin() + rounded.size(), rounded.begin(), Bf16);
  const void* from = host.data();
  if (device_.dtype != DType::kF32) from = rounded.data();
  const int64_t num_bytes = static_cast<int64_t>(host.size()) * SizeOf(device_.dtype);
  absl::Status status = kernels_->CopyFromHost(device_.data, from, num_bytes, /*stream=*/nullptr);
  return status.ok() ? kernels_->Synchronize(/*stream=*/nullptr) : status;
}

absl::Status Array::ToHost() {
  std::vector<uint16_t> rounded(device_.dtype == DType::kF32 ? 0 : host.size());
  void* to = host.data();
  if (device_.dtype != DType::kF32) to = rounded.data();
  const int64_t num_bytes = static_cast<int64_t>(host.size()) * SizeOf(device_.dtype);
  absl::Status status = kernels_->CopyToHost(to, device_.data, num_bytes, /*stream=*/nullptr);
  if (status.ok()) status = kernels_->Synchronize(/*stream=*/nullptr);
  std::transform(rounded.begin(), rounded.end(), host.begin(), FloatOf);
  return status;
}

absl::StatusOr<std::unique_ptr<Attention>> Attention::Create(const NsaConfig& config, DType dtype,
                                                             const ShardPlan& plan,
                                                             const tools::RankContext& context) {
  std::unique_ptr<Attention> layer(new Attention(context));
  auto engine = Engine::Create({.config = config, .dtype = dtype, .has_backward = true}, plan,
                               context.communicator, context.kernels);
  if (!engine.ok()) return engine.status();
  layer->engine_ = *std::move(engine);
  auto saved = layer->engine_->CreateSavedForward();
  if (!saved.ok()) return saved.status();
  layer->saved_ = *std::move(saved);

  const int64_t tokens = plan.TokensOfRank(context.communicator->rank());
  const int64_t l = config.compress_block_tokens;
  const Dims q = {tokens, config.num_q_heads, config.head_dim_qk};
  const Dims kv = {tokens, config.num_kv_heads, config.head_dim_qk};
  const Dims gate = {tokens, config.num_q_heads, 3};
  const Dims weight = {1, l}, pe = {1, l, config.head_dim_qk};
  const Dims shapes[] = {q, kv, kv, gate, weight, pe, weight, pe};  // of Inputs()
  for (AttentionArrays* arrays : {&layer->values, &layer->gradients}) {
    absl::Status status = arrays->o.Create(context.kernels, dtype, q);
    const std::vector<Array*> inputs = arrays->Inputs();
    for (size_t i = 0; i < inputs.size() && status.ok(); ++i) {
      const bool is_activation = arrays == &layer->values && i < 3;
      status = inputs[i]->Create(context.kernels, is_activation ? dtype : DType::kF32, shapes[i]);
    }
    if (!status.ok()) return status;
  }

  const AttentionArrays& values = layer->values;
  ForwardInputs& inputs = layer->inputs_;
  inputs.q = values.q.device();
  inputs.SetSharedKv(values.k.device(), values.v.device());
  inputs.gate = values.gate.device();
  inputs.compress_k.weight = values.weight_k.device();
  inputs.compress_k.pe = values.pe_k.device();
  inputs.compress_v.weight = values.weight_v.device();
  inputs.compress_v.pe = values.pe_v.device();
  const AttentionArrays& gradients = layer->gradients;
  Gradients& wanted = layer->wanted_;
  wanted.dq = gradients.q.device();
  wanted.SetSharedKv(gradients.k.device(), gradients.v.device());
  wanted.dgate = gradients.gate.device();
  wanted.dcompress_k.weight = gradients.weight_k.device();
  wanted.dcompress_k.pe = gradients.pe_k.device();
  wanted.dcompress_v.weight = gradients.weight_v.device();
  wanted.dcompress_v.pe = gradients.pe_v.device();
  return layer;
}

absl::Status Attention::Forward() {
  absl::Status status;
  for (Array* input : values.Inputs()) status.Update(input->ToDevice());
  if (!status.ok()) return status;
  ForwardOutputs outputs;
  outputs.o = values.o.device();
  status = engine_->Forward(inputs_, outputs, /*stream=*/nullptr, saved_.get());
  if (status.ok()) status = context_.Wait();
  return status.ok() ? values.o.ToHost() : status;
}

absl::Status Attention::Backward() {
  absl::Status status = gradients.o.ToDevice();
  if (status.ok()) status = engine_->Backward(inputs_, gradients.o.device(), *saved_, wanted_);
  if (status.ok()) status = context_.Wait();
  if (!status.ok()) return status;
  for (Array* gradient : gradients.Inputs()) status.Update(gradient->ToHost());
  return status;
}

}  // namespace nsa::training
