// The backward of all compressors.
//
// Tokens are given their gradients stride by stride: the d tokens of a stride lie in the same
// blocks, l / d of them, whose shares are summed from the last block to the first. Matrices, and
// gradients of them, are products of 64 x 64 tiles; each tile, and each sum over the blocks of the
// runs, has one CTA, and is summed over blocks in the order of kv heads and runs.
#include "kernels/cuda/compress_backward_products.cuh"
#include "kernels/cuda/compress_backward_sums.cuh"
#include "kernels/cuda/compress_backward_work.cuh"
#include "kernels/cuda/compress_tiles.cuh"
#include "kernels/cuda/launch.h"

namespace nsa::kernels::cuda {
namespace compress_backward {

constexpr int kCtasPerSm = 8;

template <class Problem>
void LaunchProduct(const Problem& problem, const Device& device, cudaStream_t stream) {
  ProductKernel<Problem><<<4 * device.num_sms, kThreads, 0, stream>>>(problem);
}

void LaunchColumnSums(const Context& context, const float* rows, int32_t width, float* bias,
                      int32_t bias_width, cudaStream_t stream) {
  const dim3 grid(width / kSumColumns, context.params.weights.num_heads);
  ColumnSumsKernel<<<grid, kThreads, 0, stream>>>(context, rows, width, bias, bias_width);
}

// From the sums of what the positions go to.
void LaunchPositions(const Context& context, const void* matrix, int32_t num_outputs,
                     int32_t sums_width, cudaStream_t stream) {
  const CompressBackwardParams& params = context.params;
  if (params.d_weights.pe == nullptr) return;
  const int32_t values = params.dims.compress_block_tokens * params.head_dim;
  const dim3 grid((values + kThreads - 1) / kThreads, params.weights.num_heads);
  PositionKernel<<<grid, kThreads, 0, stream>>>(context, matrix, num_outputs, sums_width);
}

cudaError_t Launch(const CompressBackwardParams& params, const Device& device,
                   cudaStream_t stream) {
  const AttentionDims& dims = params.dims;
  const CompressorWeights& weights = params.weights;
  const int32_t sum_grid = kCtasPerSm * device.num_sms;
  if (params.compressor == Compressor::kMean) {
    SumTokensKernel<false><<<sum_grid, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  }
  Context context{params, {}};
  const Work& work = context.work;
  PlaceWork(dims.num_kv_heads, params.head_dim, params.compressor, weights.hidden_width,
            params.num_blocks, static_cast<char*>(params.scratch), &context.work);
  if (params.num_blocks > 0) {
    const dim3 grid(static_cast<unsigned>(params.num_blocks), dims.num_kv_heads);
    GatherKernel<<<grid, kThreads, 0, stream>>>(context);
  }
  if (params.compressor == Compressor::kWeighted) {
    SumTokensKernel<true><<<sum_grid, kThreads, 0, stream>>>(params);
    const dim3 grid(dims.compress_block_tokens, weights.num_heads);
    WeightKernel<<<grid, kThreads, 0, stream>>>(context);
    LaunchColumnSums(context, work.dy, params.head_dim, nullptr, 0, stream);
    LaunchPositions(context, nullptr, 0, params.head_dim, stream);
    return cudaGetLastError();
  }
  FirstMatrix first{context, weights.w,       params.d_weights.w,
                    work.dy, params.head_dim, params.head_dim};
  float* first_bias = nullptr;
  if (params.compressor == Compressor::kMlp) {
    LaunchProduct(HiddenProblem{context}, device, stream);
    LaunchProduct(HiddenGradientProblem{context}, device, stream);
    LaunchProduct(SecondProblem{context}, device, stream);
    LaunchColumnSums(context, work.dy, params.head_dim, params.d_weights.b2, params.head_dim,
                     stream);
    first = {context,       weights.w1,           params.d_weights.w1,
             work.d_hidden, weights.hidden_width, work.padded_width};
    first_bias = params.d_weights.b1;
  }
  LaunchProduct(FirstProblem{first}, device, stream);
  LaunchProduct(TokensProblem{first}, device, stream);
  LaunchColumnSums(context, first.outputs, first.outputs_width, first_bias, first.num_outputs,
                   stream);
  LaunchPositions(context, first.matrix, first.num_outputs, first.outputs_width, stream);
  return cudaGetLastError();
}

}  // namespace compress_backward

int64_t CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                     int32_t hidden_width, int64_t num_blocks) {
  const int32_t widest = dims.head_dim_qk > dims.head_dim_v ? dims.head_dim_qk : dims.head_dim_v;
  compress_backward::Work work;
  return compress_backward::PlaceWork(dims.num_kv_heads, widest, compressor, hidden_width,
                                      num_blocks, nullptr, &work);
}

cudaError_t LaunchCompressBackward(const CompressBackwardParams& params, const Device& device,
                                   cudaStream_t stream) {
  return compress_backward::Launch(params, device, stream);
}

}  // namespace nsa::kernels::cuda
