// Gradients from one tensor to another: rows that are added to others, records to tokens, and sums
// in f32 to the caller's type. All are bound by memory: a thread moves 16 bytes at a time or more.
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kCtasPerSm = 8;

__device__ void AddTo(float4* to, const float4& value) {
  float4 sum = *to;
  sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
  *to = sum;
}

// Adds one row to another; the threads of the CTA share it.
__device__ void AddRow(float* to, const float* from, int64_t num_elements) {
  float4* const to4 = reinterpret_cast<float4*>(to);
  const float4* const from4 = reinterpret_cast<const float4*>(from);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < num_elements / 4; i += kThreads) AddTo(to4 + i, from4[i]);
}

// Grid: any number of CTAs; a CTA owns every gridDim-th row of src.
__global__ void __launch_bounds__(kThreads) AddIndexedRowsKernel(AddIndexedRowsParams params) {
  const int32_t count = *params.count;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    AddRow(params.dst + params.rows[i] * params.row_elements, params.src + i * params.row_elements,
           params.row_elements);
  }
}

// Grid: any number of CTAs; a CTA owns every gridDim-th row of src.
__global__ void __launch_bounds__(kThreads) AddRowsKernel(AddRowsParams params) {
  int32_t segment = 0;
  int64_t segment_begin = 0;  // its first row of src
  for (int64_t i = blockIdx.x;; i += gridDim.x) {
    while (segment < params.num_segments &&
           i >= segment_begin + params.segments[segment].num_tokens) {
      segment_begin += params.segments[segment++].num_tokens;
    }
    if (segment == params.num_segments) return;
    const int64_t row = params.segments[segment].row + i - segment_begin;
    AddRow(params.dst + row * params.row_elements, params.src + i * params.row_elements,
           params.row_elements);
  }
}

// Grid: any number of CTAs; a thread owns every (gridDim * kThreads)-th piece of 8 values.
__global__ void __launch_bounds__(kThreads) StoreGradientKernel(StoreGradientParams params) {
  const int64_t head_pieces = params.head_dim / 8, row_pieces = params.num_heads * head_pieces;
  const int64_t num_pieces = params.num_rows * row_pieces;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < num_pieces;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / row_pieces, head = i % row_pieces / head_pieces;
    const int64_t place =
        row * params.dst.row_stride + head * params.dst.head_stride + i % head_pieces * 8;
    float values[8];
    LoadFloats(DType::kF32, params.src, i * 8, values);
    if (params.adds) {
      float before[8];
      LoadFloats(params.dst_dtype, params.dst.data, place, before);
      for (int j = 0; j < 8; ++j) values[j] += before[j];
    }
    if (params.dst_dtype == DType::kF32) {
      float4* const to = reinterpret_cast<float4*>(static_cast<float*>(params.dst.data) + place);
      to[0] = make_float4(values[0], values[1], values[2], values[3]);
      to[1] = make_float4(values[4], values[5], values[6], values[7]);
    } else {
      StoreFloats(params.dst_dtype, params.dst.data, place, values);
    }
  }
}

// The same of any dimension and alignment; a thread owns every (gridDim * kThreads)-th value.
__global__ void __launch_bounds__(kThreads) StoreValuesKernel(StoreGradientParams params) {
  const int64_t row_values = params.num_heads * int64_t{params.head_dim};
  const int64_t num_values = params.num_rows * row_values;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < num_values;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = i / row_values, head = i % row_values / params.head_dim;
    const int64_t place =
        row * params.dst.row_stride + head * params.dst.head_stride + i % params.head_dim;
    const auto store = [&](auto* dst, auto from_float) {
      const float before = params.adds ? static_cast<float>(dst[place]) : 0.0f;
      dst[place] = from_float(params.adds ? before + params.src[i] : params.src[i]);
    };
    switch (params.dst_dtype) {
      case DType::kF32:
        store(static_cast<float*>(params.dst.data), [](float x) { return x; });
        break;
      case DType::kBF16:
        store(static_cast<__nv_bfloat16*>(params.dst.data), __float2bfloat16_rn);
        break;
      case DType::kF16:
        store(static_cast<__half*>(params.dst.data), __float2half_rn);
        break;
    }
  }
}

// Whether StoreGradientKernel can move it.
bool HasWholePieces(const StoreGradientParams& params) {
  const auto is_whole = [](int64_t bytes) { return bytes % 16 == 0; };
  const int64_t size = SizeOf(params.dst_dtype);
  return params.head_dim % 8 == 0 && is_whole(reinterpret_cast<uintptr_t>(params.dst.data)) &&
         is_whole(params.dst.row_stride * size) && is_whole(params.dst.head_stride * size);
}

// Adds rows [num_tokens,head_dim] of a record to those of its tokens that a segment covers; a warp
// at a time takes a row.
__device__ void AddTokens(const TokenRows& tokens, const TokenGradients& gradients,
                          int32_t document, int64_t position, int32_t num_tokens, int32_t num_heads,
                          int32_t head, int32_t head_dim, const float* record) {
  const int32_t lane = threadIdx.x % 32;
  for (int32_t token = threadIdx.x / 32; token < num_tokens; token += kWarps) {
    const TokenPlace place = FindPlace(tokens, document, position + token);
    if (place.row < 0) continue;
    float* const row = (place.is_halo ? gradients.halo : gradients.own) +
                       (place.row * num_heads + head) * head_dim;
    const float4* const from = reinterpret_cast<const float4*>(record + token * head_dim);
    for (int32_t i = lane; i < head_dim / 4; i += 32) {
      AddTo(reinterpret_cast<float4*>(row) + i, from[i]);
    }
  }
}

// Grid: (num_blocks, Hkv). A CTA owns one record.
__global__ void __launch_bounds__(kThreads) UnpackGradientsKernel(UnpackGradientsParams params) {
  const AttentionDims& dims = params.dims;
  const BlockGroup block = FindBlocks(params.runs, params.num_runs, 1, blockIdx.x);
  if (block.document < 0) return;
  const int32_t head = blockIdx.y, num_tokens = dims.select_block_tokens;
  const int64_t position = block.first_block * num_tokens;
  const int32_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  const float* const record =
      params.record_gradients + (head * params.num_blocks + blockIdx.x) * (dk + dv) * num_tokens;
  const TokenRows tokens{{}, {}, params.segments, params.num_segments};
  AddTokens(tokens, params.dk, block.document, position, num_tokens, dims.num_kv_heads, head, dk,
            record);
  AddTokens(tokens, params.dv, block.document, position, num_tokens, dims.num_kv_heads, head, dv,
            record + num_tokens * dk);
}

}  // namespace

cudaError_t LaunchAddIndexedRows(const AddIndexedRowsParams& params, const Device& device,
                                 cudaStream_t stream) {
  if (params.max_count == 0) return cudaSuccess;
  AddIndexedRowsKernel<<<kCtasPerSm * device.num_sms, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchAddRows(const AddRowsParams& params, const Device& device, cudaStream_t stream) {
  if (params.num_segments == 0) return cudaSuccess;
  AddRowsKernel<<<kCtasPerSm * device.num_sms, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchStoreGradient(const StoreGradientParams& params, const Device& device,
                                cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const auto kernel = HasWholePieces(params) ? StoreGradientKernel : StoreValuesKernel;
  kernel<<<kCtasPerSm * device.num_sms, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

cudaError_t LaunchUnpackGradients(const UnpackGradientsParams& params, const Device&,
                                  cudaStream_t stream) {
  if (params.num_blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(params.num_blocks), params.dims.num_kv_heads);
  UnpackGradientsKernel<<<grid, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
