// Gradients of the gates, and what the branches' backwards need of each row. Bound by memory.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowThreads = 16;  // that share a row: 128 values at 16 bytes each
constexpr int kCtasPerSm = 6;

// sum + the product of two pairs.
template <class T>
__device__ float AddProducts(uint32_t a, uint32_t b, float sum) {
  const float2 x = Unpack2<T>(a), y = Unpack2<T>(b);
  return fmaf(x.y, y.y, fmaf(x.x, y.x, sum));
}

// Grid: any number of CTAs; a CTA owns every gridDim-th query, and kRowThreads of its threads a
// head at a time.
template <class T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    GateBackwardKernel(const __grid_constant__ GateBackwardParams params) {
  const int32_t num_heads = params.dims.num_q_heads, head_dim = params.dims.head_dim_v;
  const int64_t num_rows = params.num_tokens * num_heads;
  const int32_t thread = threadIdx.x % kRowThreads;
  constexpr int32_t kCtaHeads = kThreads / kRowThreads;
  for (int64_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    // All threads of a warp take part in the shuffles, those without a head too.
    for (int32_t first = 0; first < num_heads; first += kCtaHeads) {
      const bool active = first + static_cast<int32_t>(threadIdx.x / kRowThreads) < num_heads;
      const int32_t head = active ? first + threadIdx.x / kRowThreads : 0;
      const auto load = [&](const ConstTensor3& tensor, int32_t i) {
        return *reinterpret_cast<const uint4*>(
            static_cast<const T*>(tensor.data) +
            (token * tensor.row_stride + head * tensor.head_stride + i));
      };
      const bool has_gate = active && thread < 3;
      float sums[3] = {}, gate = 0.0f;
      for (int32_t i = thread * 8; i < head_dim; i += kRowThreads * 8) {
        // All loads are on their way before any is waited for.
        const uint4 d_o = load(params.d_o, i);
        const uint4 o[3] = {load(params.o_cmp, i), load(params.o_slc, i), load(params.o_win, i)};
        if (i == thread * 8 && has_gate) {
          gate = LoadFloat(params.gate_dtype, params.gate,
                           token * params.row_stride + head * params.head_stride + thread);
        }
#pragma unroll
        for (int b = 0; b < 3; ++b) {
          sums[b] = AddProducts<T>(d_o.x, o[b].x, sums[b]);
          sums[b] = AddProducts<T>(d_o.y, o[b].y, sums[b]);
          sums[b] = AddProducts<T>(d_o.z, o[b].z, sums[b]);
          sums[b] = AddProducts<T>(d_o.w, o[b].w, sums[b]);
        }
      }
#pragma unroll
      for (int b = 0; b < 3; ++b) {
#pragma unroll
        for (int delta = kRowThreads / 2; delta > 0; delta /= 2) {
          sums[b] += __shfl_xor_sync(kFullWarp, sums[b], delta);
        }
      }
      if (!has_gate) continue;
      const float sum = thread == 0 ? sums[0] : thread == 1 ? sums[1] : sums[2];
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
  const auto kernel = params.dims.dtype == DType::kBF16 ? GateBackwardKernel<__nv_bfloat16>
                                                        : GateBackwardKernel<__half>;
  kernel<<<kCtasPerSm * device.num_sms, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
