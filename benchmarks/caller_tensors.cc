#include "benchmarks/caller_tensors.h"

#include <algorithm>
#include <utility>

#include "benchmarks/device_values.h"
#include "benchmarks/gpu_timer.h"

namespace nsa::benchmarks {

absl::StatusOr<CallerTensors> CallerTensors::Allocate(kernels::Kernels& kernels,
                                                      const NsaConfig& config,
                                                      const ShardPlan& plan, int rank,
                                                      bool trains) {
  CallerTensors tensors;
  tensors.chunks_ = plan.ChunksOfRank(rank);
  const int64_t num_tokens = plan.TokensOfRank(rank);
  auto allocate = [&](int part, int64_t heads, int64_t dim, int64_t element_bytes) -> absl::Status {
    const int64_t num_bytes = num_tokens * heads * dim * element_bytes;
    auto memory = kernels.Allocate(std::max<int64_t>(1, num_bytes));
    if (!memory.ok()) return memory.status();
    tensors.parts_[part] = {heads * dim, num_bytes, *std::move(memory)};
    return absl::OkStatus();
  };
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads;
  const int64_t dk = config.head_dim_qk, dv = config.head_dim_v;
  NSA_BENCHMARK_OK(allocate(kQ, hq, dk, 2));
  NSA_BENCHMARK_OK(allocate(kK, hkv, dk, 2));
  NSA_BENCHMARK_OK(allocate(kV, hkv, dv, 2));
  NSA_BENCHMARK_OK(allocate(kO, hq, dv, 2));
  NSA_BENCHMARK_OK(allocate(kGate, hq, 3, 4));
  if (trains) {
    NSA_BENCHMARK_OK(allocate(kDo, hq, dv, 2));
    NSA_BENCHMARK_OK(allocate(kDq, hq, dk, 2));
    NSA_BENCHMARK_OK(allocate(kDk, hkv, dk, 2));
    NSA_BENCHMARK_OK(allocate(kDv, hkv, dv, 2));
    NSA_BENCHMARK_OK(allocate(kDgate, hq, 3, 4));
  }

  const auto data = [&](int part) { return tensors.parts_[part].memory->data(); };
  tensors.inputs_.q = ConstTensor(data(kQ), DType::kBF16, {num_tokens, hq, dk});
  tensors.inputs_.SetSharedKv(ConstTensor(data(kK), DType::kBF16, {num_tokens, hkv, dk}),
                              ConstTensor(data(kV), DType::kBF16, {num_tokens, hkv, dv}));
  tensors.inputs_.gate = ConstTensor(data(kGate), DType::kF32, {num_tokens, hq, 3});
  tensors.outputs_.o = Tensor(data(kO), DType::kBF16, {num_tokens, hq, dv});
  if (trains) {
    tensors.d_o_ = ConstTensor(data(kDo), DType::kBF16, {num_tokens, hq, dv});
    tensors.gradients_.dq = Tensor(data(kDq), DType::kBF16, {num_tokens, hq, dk});
    tensors.gradients_.SetSharedKv(Tensor(data(kDk), DType::kBF16, {num_tokens, hkv, dk}),
                                   Tensor(data(kDv), DType::kBF16, {num_tokens, hkv, dv}));
    tensors.gradients_.dgate = Tensor(data(kDgate), DType::kF32, {num_tokens, hq, 3});
  }
  return tensors;
}

absl::Status CallerTensors::Fill(cudaStream_t stream) {
  for (int part : {kQ, kK, kV, kDo}) {
    if (parts_[part].memory == nullptr) continue;
    const int64_t row = parts_[part].row_elements;
    auto* values = static_cast<uint16_t*>(parts_[part].memory->data());
    for (const Chunk& chunk : chunks_) {
      const int64_t count = chunk.num_tokens * row;
      NSA_BENCHMARK_OK(
          CudaStatus(FillNormal(part + 1, chunk.begin * row, count, values, stream), "FillNormal"));
      values += count;
    }
  }
  const Part& gate = parts_[kGate];
  NSA_BENCHMARK_OK(CudaStatus(
      FillConstant(0.5f, gate.num_bytes / 4, static_cast<float*>(gate.memory->data()), stream),
      "FillConstant"));
  return CudaStatus(cudaStreamSynchronize(stream), "filling the inputs");
}

absl::Status CallerTensors::CopyInputs(const CallerTensors& other) {
  for (int part : {kQ, kK, kV, kGate}) {
    NSA_BENCHMARK_OK(
        CudaStatus(cudaMemcpy(parts_[part].memory->data(), other.parts_[part].memory->data(),
                              parts_[part].num_bytes, cudaMemcpyDefault),
                   "cudaMemcpy"));
  }
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> CallerTensors::Fingerprint(kernels::Kernels& kernels,
                                                    cudaStream_t stream) const {
  auto memory = kernels.Allocate(sizeof(uint64_t));
  if (!memory.ok()) return memory.status();
  auto* const sum = static_cast<uint64_t*>((*memory)->data());
  const Part& part = parts_[parts_[kDq].memory == nullptr ? kO : kDq];
  const int64_t row = part.row_elements;
  const auto* values = static_cast<const uint16_t*>(part.memory->data());
  for (const Chunk& chunk : chunks_) {
    const int64_t count = chunk.num_tokens * row;
    NSA_BENCHMARK_OK(CudaStatus(AddFingerprint(chunk.begin * row, count, values, sum, stream),
                                "AddFingerprint"));
    values += count;
  }
  uint64_t fingerprint = 0;
  NSA_BENCHMARK_OK(kernels.CopyToHost(&fingerprint, sum, sizeof(fingerprint), stream));
  NSA_BENCHMARK_OK(kernels.Synchronize(stream));
  return fingerprint;
}

absl::StatusOr<std::vector<uint16_t>> CallerTensors::OutputOnHost() const {
  std::vector<uint16_t> host(parts_[kO].num_bytes / 2);
  NSA_BENCHMARK_OK(CudaStatus(
      cudaMemcpy(host.data(), parts_[kO].memory->data(), parts_[kO].num_bytes, cudaMemcpyDefault),
      "cudaMemcpy"));
  return host;
}

}  // namespace nsa::benchmarks
