// K and V of whole select blocks into records.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/pack_tokens.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;

// Grid: (num_blocks, Hkv). A CTA owns one record.
__global__ void __launch_bounds__(kThreads) PackBlocksKernel(PackBlocksParams params) {
  const AttentionDims& dims = params.dims;
  const BlockGroup block = FindBlocks(params.runs, params.num_runs, 1, blockIdx.x);
  if (block.document < 0) return;
  const int32_t head = blockIdx.y;
  const int32_t num_tokens = dims.select_block_tokens;
  const int64_t position = block.first_block * num_tokens;
  char* const record = static_cast<char*>(params.records) +
                       (head * params.num_blocks + blockIdx.x) * RecordBytes(dims);
  const int64_t k_bytes = static_cast<int64_t>(num_tokens) * dims.head_dim_qk * 2;
  PackTokens<kThreads>(params.k, block.document, position, num_tokens, head, dims.head_dim_qk,
                       reinterpret_cast<uint4*>(record));
  PackTokens<kThreads>(params.v, block.document, position, num_tokens, head, dims.head_dim_v,
                       reinterpret_cast<uint4*>(record + k_bytes));
}

}  // namespace

cudaError_t LaunchPackBlocks(const PackBlocksParams& params, const Device&, cudaStream_t stream) {
  if (params.num_blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(params.num_blocks), params.dims.num_kv_heads);
  PackBlocksKernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
