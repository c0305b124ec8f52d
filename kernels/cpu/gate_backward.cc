// The backward of the gates, and what the branches' backwards need of each row.
#include <algorithm>
#include <cstdint>

#include "kernels/cpu/float_types.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

constexpr int64_t kTokensPerItem = 64;

}  // namespace

absl::Status GateBackward(const GateBackwardParams& params, Workers& workers) {
  const AttentionDims& dims = params.dims;
  const int64_t num_heads = dims.num_q_heads, head_dim = dims.head_dim_v;
  const ConstTensor3 outputs[3] = {params.o_cmp, params.o_slc, params.o_win};
  const int64_t num_items = (params.num_tokens + kTokensPerItem - 1) / kTokensPerItem;
  const int64_t scratch_bytes = 2 * head_dim * static_cast<int64_t>(sizeof(float));
  return workers.Run(num_items, scratch_bytes, [&](int64_t item, char* scratch) {
    float* const d_o = reinterpret_cast<float*>(scratch);
    float* const o = d_o + head_dim;
    const int64_t end = std::min(params.num_tokens, (item + 1) * kTokensPerItem);
    for (int64_t token = item * kTokensPerItem; token < end; ++token) {
      for (int64_t head = 0; head < num_heads; ++head) {
        ToFloat(dims.dtype, RowOf(params.d_o, dims.dtype, token, head), head_dim, d_o);
        const int64_t row = token * num_heads + head;
        for (int64_t branch = 0; branch < 3; ++branch) {
          ToFloat(dims.dtype, RowOf(outputs[branch], dims.dtype, token, head), head_dim, o);
          float lanes[kLanes] = {};
          AddProducts(d_o, o, head_dim, lanes);
          const float d_gate = SumOfLanes(lanes);
          const float gate =
              LoadFloat(params.gate_dtype, params.gate,
                        token * params.row_stride + head * params.head_stride + branch);
          params.d_gate[row * 3 + branch] = d_gate;
          params.gates[branch * params.num_tokens * num_heads + row] = gate;
          params.deltas[branch * params.num_tokens * num_heads + row] = gate * d_gate;
        }
      }
    }
  });
}

}  // namespace nsa::kernels::cpu
