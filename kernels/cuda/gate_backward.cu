// Gradients of the gates, and what the branches' backwards need of each row. Bound by memory.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowThreads = 16;  // that share a row: 128 values at 16 bytes each
constexpr int kCtasPerSm = 8;

// Grid: any number of CTAs; a CTA owns every gridDim-th query, and kRowThreads of its threads a
// head at a time.
__global__ void __launch_bounds__(kThreads) GateBackwardKernel(GateBackwardParams params) {
  const DType dtype = params.dims.dtype;
  const int32_t num_heads = params.dims.num_q_heads, head_dim = params.dims.head_dim_v;
  const int64_t num_rows = params.num_tokens * num_heads;
  const int32_t thread = threadIdx.x % kRowThreads;
  constexpr int32_t kCtaHeads = kThreads / kRowThreads;
  for (int64_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    // All threads of a warp take part in the shuffles, those without a head too.
#pragma unroll 2
    for (int32_t first = 0; first < num_heads; first += kCtaHeads) {
      const bool active = first + static_cast<int32_t>(threadIdx.x / kRowThreads) < num_heads;
      const int32_t head = active ? first + threadIdx.x / kRowThreads : 0;
      const auto place = [&](const ConstTensor3& tensor) {
        return token * tensor.row_stride + head * tensor.head_stride;
      };
      float sums[3] = {};
      for (int32_t i = thread * 8; i < head_dim; i += kRowThreads * 8) {
        float d_o[8], o[3][8];
        LoadFloats(dtype, params.d_o.data, place(params.d_o) + i, d_o);
        LoadFloats(dtype, params.o_cmp.data, place(params.o_cmp) + i, o[0]);
        LoadFloats(dtype, params.o_slc.data, place(params.o_slc) + i, o[1]);
        LoadFloats(dtype, params.o_win.data, place(params.o_win) + i, o[2]);
#pragma unroll
        for (int b = 0; b < 3; ++b) {
#pragma unroll
          for (int j = 0; j < 8; ++j) sums[b] = fmaf(d_o[j], o[b][j], sums[b]);
        }
      }
#pragma unroll
      for (int b = 0; b < 3; ++b) {
#pragma unroll
        for (int delta = kRowThreads / 2; delta > 0; delta /= 2) {
          sums[b] += __shfl_xor_sync(kFullWarp, sums[b], delta);
        }
      }
      if (!active || thread >= 3) continue;
      const float sum = thread == 0 ? sums[0] : thread == 1 ? sums[1] : sums[2];
      const float gate = LoadFloat(params.gate_dtype, params.gate,
                                   token * params.row_stride + head * params.head_stride + thread);
      const int64_t row = token * num_heads + head;
      params.d_gate[row * 3 + thread] = sum;
      params.gates[thread * num_rows + row] = gate;
      params.deltas[thread * num_rows + row] = gate * sum;
    }
  }
}

}  // namespace

cudaError_t LaunchGateBackward(const GateBackwardParams& params, const Device& device,
                               cudaStream_t stream) {
  if (params.num_tokens == 0) return cudaSuccess;
  GateBackwardKernel<<<kCtasPerSm * device.num_sms, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
