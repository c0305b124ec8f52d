#include "nsa/c_api_testlib.h"

#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "comm/loopback/loopback.h"
#include "kernels/cpu/cpu_kernels.h"
#include "nsa/engine.h"

namespace nsa {
namespace {

Tensor ToTensor(const nsa_tensor& t) {
  return Tensor(t.data, DType::kF32, Dims(t.shape, t.shape + t.ndim));
}

absl::Status Run(const nsa_config& c, std::vector<int64_t> cu_seqlens, ExpectedRun& run) {
  EngineOptions options;
  options.config.num_q_heads = c.num_q_heads;
  options.config.num_kv_heads = c.num_kv_heads;
  options.config.head_dim_qk = c.head_dim_qk;
  options.config.head_dim_v = c.head_dim_v;
  options.config.num_selected_blocks = c.num_selected_blocks;
  options.config.window_tokens = c.window_tokens;
  options.config.compressor = Compressor::kMlp;
  options.dtype = DType::kF32;
  options.has_backward = true;
  options.max_hidden_width = run.inputs[kKW1].shape[1];
  const int64_t num_tokens = cu_seqlens.back();
  auto plan =
      ShardPlan::Create(num_tokens, 1, ContiguousChunks(num_tokens, 1), std::move(cu_seqlens));
  if (!plan.ok()) return plan.status();
  auto group = comm::LoopbackGroup::Create(1);
  if (!group.ok()) return group.status();
  auto kernels = kernels::CpuKernels::Create();
  if (!kernels.ok()) return kernels.status();
  auto engine =
      Engine::Create(options, *std::move(plan), std::move((*group)[0]), *std::move(kernels));
  if (!engine.ok()) return engine.status();

  std::vector<Tensor> in, grad;
  for (int i = 0; i < kNumInputs; ++i) {
    in.push_back(ToTensor(run.inputs[i]));
    grad.push_back(ToTensor(run.gradients[i]));
  }
  ForwardInputs inputs;
  inputs.q = in[kQ];
  inputs.k_cmp = in[kKCmp];
  inputs.v_cmp = in[kVCmp];
  inputs.k_slc = in[kKSlc];
  inputs.v_slc = in[kVSlc];
  inputs.k_win = in[kKWin];
  inputs.v_win = in[kVWin];
  inputs.gate = in[kGate];
  inputs.compress_k = {.weight = {},
                       .pe = in[kKPe],
                       .w = {},
                       .w1 = in[kKW1],
                       .b1 = in[kKB1],
                       .w2 = in[kKW2],
                       .b2 = in[kKB2]};
  inputs.compress_v = {.weight = {},
                       .pe = in[kVPe],
                       .w = {},
                       .w1 = in[kVW1],
                       .b1 = in[kVB1],
                       .w2 = in[kVW2],
                       .b2 = in[kVB2]};
  ForwardOutputs outputs;
  outputs.o = ToTensor(run.o);
  outputs.lse_cmp = run.lse[0];
  outputs.lse_slc = run.lse[1];
  outputs.lse_win = run.lse[2];
  outputs.block_indices = run.block_indices;
  absl::Status status = (*engine)->Forward(inputs, outputs);
  if (!status.ok()) return status;

  auto saved = (*engine)->CreateSavedForward();
  if (!saved.ok()) return saved.status();
  ForwardOutputs only_o;
  only_o.o = outputs.o;
  status = (*engine)->Forward(inputs, only_o, nullptr, saved->get());
  if (!status.ok()) return status;
  Gradients gradients;
  gradients.dq = grad[kQ];
  gradients.dk_cmp = grad[kKCmp];
  gradients.dv_cmp = grad[kVCmp];
  gradients.dk_slc = grad[kKSlc];
  gradients.dv_slc = grad[kVSlc];
  gradients.dk_win = grad[kKWin];
  gradients.dv_win = grad[kVWin];
  gradients.dgate = grad[kGate];
  gradients.dcompress_k = {.weight = {},
                           .pe = grad[kKPe],
                           .w = {},
                           .w1 = grad[kKW1],
                           .b1 = grad[kKB1],
                           .w2 = grad[kKW2],
                           .b2 = grad[kKB2]};
  gradients.dcompress_v = {.weight = {},
                           .pe = grad[kVPe],
                           .w = {},
                           .w1 = grad[kVW1],
                           .b1 = grad[kVB1],
                           .w2 = grad[kVW2],
                           .b2 = grad[kVB2]};
  return (*engine)->Backward(inputs, ToTensor(run.d_o), **saved, gradients);
}

}  // namespace
}  // namespace nsa

int RunCppEngine(const nsa_config* config, const int64_t* cu_seqlens, int64_t num_cu_seqlens,
                 ExpectedRun* run) {
  const absl::Status status = nsa::Run(*config, {cu_seqlens, cu_seqlens + num_cu_seqlens}, *run);
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return status.ok() ? 1 : 0;
}
