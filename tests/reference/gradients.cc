#include "tests/reference/gradients.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "tests/reference/dot.h"
#include "tests/reference/rows.h"

namespace nsa::reference {
namespace {

// One branch: what it attends to, what came out, and where the gradients go.
struct Branch {
  const std::vector<double>& k;
  const std::vector<double>& v;
  const std::vector<double>& o;
  const std::vector<double>& lse;
  std::vector<double>* dk;
  std::vector<double>* dv;
};

// Adds, for one query head (`q_row` of [S,Hq]) that attends to `rows` of k and v of head g, the
// gradients of q, k, v and the gate.
void AttendBackward(const ReferenceConfig& config, const ReferenceInputs& inputs,
                    const std::vector<double>& d_o, const Branch& branch,
                    const std::vector<int64_t>& rows, int64_t q_row, int64_t g, int64_t gate_index,
                    ReferenceGradients* gradients) {
  const int64_t head_dim_qk = config.head_dim_qk, head_dim_v = config.head_dim_v;
  const double scale = config.softmax_scale.value_or(1.0 / std::sqrt(double(head_dim_qk)));
  const double* q = &inputs.q[q_row * head_dim_qk];
  const double* d_o_row = &d_o[q_row * head_dim_v];
  const double gate = inputs.gate[gate_index];
  const double dgate = Dot(d_o_row, &branch.o[q_row * head_dim_v], head_dim_v);
  gradients->dgate[gate_index] = dgate;
  for (int64_t row : rows) {
    const int64_t kv_row = row * config.num_kv_heads + g;
    const double* k = &branch.k[kv_row * head_dim_qk];
    const double p = std::exp(scale * Dot(q, k, head_dim_qk) - branch.lse[q_row]);
    const double dp = gate * Dot(d_o_row, &branch.v[kv_row * head_dim_v], head_dim_v);
    // The softmax takes from each dp their mean under p, which is gate * d_o . o = gate * dgate.
    const double dlogit = scale * p * (dp - gate * dgate);
    for (int64_t c = 0; c < head_dim_qk; ++c) {
      gradients->dq[q_row * head_dim_qk + c] += dlogit * k[c];
      (*branch.dk)[kv_row * head_dim_qk + c] += dlogit * q[c];
    }
    for (int64_t c = 0; c < head_dim_v; ++c) {
      (*branch.dv)[kv_row * head_dim_v + c] += p * gate * d_o_row[c];
    }
  }
}

absl::Status CheckSize(const char* name, const std::vector<double>& values, int64_t expected) {
  if (static_cast<int64_t>(values.size()) == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " has ", values.size(), " elements, must have ", expected));
}

}  // namespace

absl::StatusOr<ReferenceGradients> Backward(const ReferenceConfig& config,
                                            const ReferenceInputs& inputs,
                                            const std::vector<int32_t>& block_indices,
                                            const std::vector<double>& d_o, int num_threads,
                                            Rounding rounding) {
  // Checks all but what only the gradients need.
  auto forward = Forward(config, inputs,
                         {.summary_rounding = rounding,
                          .given_block_indices = &block_indices,
                          .num_threads = num_threads});
  if (!forward.ok()) return forward.status();
  ReferenceOutputs& out = *forward;
  for (auto* o : {&out.o_cmp, &out.o_slc, &out.o_win}) {
    for (double& x : *o) x = Round(rounding, x);
  }
  const int64_t s = inputs.cu_seqlens.back();
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads;
  absl::Status valid = CheckSize("d_o", d_o, s * hq * config.head_dim_v);
  valid.Update(CheckSize("gate", inputs.gate, s * hq * 3));
  if (!valid.ok()) return valid;

  ReferenceGradients gradients;
  gradients.dq.assign(inputs.q.size(), 0.0);
  gradients.dgate.assign(inputs.gate.size(), 0.0);
  gradients.dkc.assign(out.kc.size(), 0.0);
  gradients.dvc.assign(out.vc.size(), 0.0);
  for (auto* dk : {&gradients.dk_slc, &gradients.dk_win}) dk->assign(inputs.k_slc.size(), 0.0);
  for (auto* dv : {&gradients.dv_slc, &gradients.dv_win}) dv->assign(inputs.v_slc.size(), 0.0);
  // In the order of their gates.
  const Branch branches[3] = {
      {out.kc, out.vc, out.o_cmp, out.lse_cmp, &gradients.dkc, &gradients.dvc},
      {inputs.k_slc, inputs.v_slc, out.o_slc, out.lse_slc, &gradients.dk_slc, &gradients.dv_slc},
      {inputs.k_win, inputs.v_win, out.o_win, out.lse_win, &gradients.dk_win, &gradients.dv_win},
  };

  // Nothing of one key/value head's group meets another's until the compressors' parameters.
  const auto backward_of_group = [&](int64_t g) {
    for (int64_t token = 0; token < s; ++token) {
      const QueryPosition query = Locate(config, inputs.cu_seqlens, token);
      const int32_t* blocks = &block_indices[(token * hkv + g) * config.num_selected_blocks];
      const std::vector<int64_t> rows[3] = {CompressedRows(config, query),
                                            SelectedRows(config, query, blocks),
                                            WindowRows(config, query)};
      for (int64_t h = g * (hq / hkv); h < (g + 1) * (hq / hkv); ++h) {
        for (int64_t b = 0; b < 3; ++b) {
          AttendBackward(config, inputs, d_o, branches[b], rows[b], token * hq + h, g,
                         (token * hq + h) * 3 + b, &gradients);
        }
      }
    }
  };
  const int64_t stride = std::max(1, num_threads);
  const auto work = [&](int64_t thread) {
    for (int64_t g = thread; g < hkv; g += stride) backward_of_group(g);
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < std::min(stride, hkv); ++i) threads.emplace_back(work, i);
  work(0);
  for (std::thread& thread : threads) thread.join();

  gradients.dcompress_k =
      CompressBackward(config, inputs.compress_k, inputs.cu_seqlens, inputs.k_cmp,
                       config.head_dim_qk, gradients.dkc, &gradients.dk_cmp);
  gradients.dcompress_v =
      CompressBackward(config, inputs.compress_v, inputs.cu_seqlens, inputs.v_cmp,
                       config.head_dim_v, gradients.dvc, &gradients.dv_cmp);
  return gradients;
}

}  // namespace nsa::reference
