// Launches of the kernels of decoding. kOverlaps: each kernel of a step but the first is launched
// while the one before still runs (compute capability 9.0 and up), to look up its work meanwhile.
#ifndef KERNELS_CUDA_DECODE_LAUNCH_CUH_
#define KERNELS_CUDA_DECODE_LAUNCH_CUH_

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/decode.h"
#include "kernels/cuda/decode_append.cuh"
#include "kernels/cuda/decode_attend.cuh"
#include "kernels/cuda/decode_select.cuh"

namespace nsa::kernels::cuda {

// `overlaps`: the kernel may start as soon as all CTAs of the one before have said so; it waits
// itself for what that one writes.
template <class... Params>
cudaError_t LaunchAfter(bool overlaps, void (*kernel)(Params...), dim3 grid, int threads,
                        int shared_bytes, cudaStream_t stream, const Params&... params) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params...);
}

template <bool kOverlaps>
cudaError_t LaunchAppendTokens(const AppendTokensParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const auto rows = static_cast<unsigned>(params.num_rows);
  const auto kv_heads = static_cast<unsigned>(params.dims.num_kv_heads);
  const cudaError_t error =
      LaunchAfter<AppendTokensParams>(false, AppendTokensKernel<kOverlaps>, dim3(rows, kv_heads),
                                      kAppendThreads, 0, stream, params);
  const bool has_matrix =
      params.compressor == Compressor::kLinear || params.compressor == Compressor::kMlp;
  if (error != cudaSuccess || !params.compresses || !has_matrix) return error;
  return LaunchAfter<AppendTokensParams>(kOverlaps, AppendMatrixSummariesKernel<kOverlaps>,
                                         dim3(rows, kv_heads, 2), kAppendThreads, 0, stream,
                                         params);
}

// Calls launch(T, Dk, Dv) with the dims as types: constants where performance is about them and the
// kernels overlap, 0 elsewhere.
template <bool kOverlaps, class Launch>
cudaError_t WithShape(const AttentionDims& dims, const Launch& launch) {
  const auto with_dims = [&](auto type) {
    if constexpr (kOverlaps) {
      if (dims.head_dim_qk == 128 && dims.head_dim_v == 128) {
        return launch(type, std::integral_constant<int, 128>(), std::integral_constant<int, 128>());
      }
    }
    return launch(type, std::integral_constant<int, 0>(), std::integral_constant<int, 0>());
  };
  return dims.dtype == DType::kBF16 ? with_dims(__nv_bfloat16()) : with_dims(__half());
}

template <bool kOverlaps>
cudaError_t LaunchDecodeSelect(const DecodeSelectParams& params, const Device& device,
                               cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const AttentionDims& dims = params.dims;
  const int64_t last = params.max_tokens - 1;
  const int64_t most_parts =
      std::clamp(SummaryKeys(dims, last).num_tiles(), 1, kMaxDecodeParts) +
      std::min((dims.window_tokens + 15 + kDecodeTileKeys - 1) / kDecodeTileKeys, kMaxDecodeParts);
  const int64_t most_items = params.num_rows * dims.num_kv_heads * NumHeadTiles(dims) * most_parts;
  const auto ctas = static_cast<unsigned>(
      std::min<int64_t>(most_items, int64_t{device.num_sms} * kDecodeSelectCtas));
  // Room for the scores of all blocks, if that leaves as many CTAs on an SM.
  constexpr int32_t kReservedBytes = 1024;  // of a CTA
  const int64_t score_bytes = (int64_t{NumCandidates(dims, last)} * 4 + 15) / 16 * 16;
  const int32_t most_bytes = (device.max_shared_bytes / kDecodeSelectCtas - kReservedBytes -
                              DecodeShared::OtherBytes(dims)) /
                             16 * 16;
  const auto values_bytes = static_cast<int32_t>(
      std::max<int64_t>(DecodeShared::TileBytes(dims), std::min<int64_t>(score_bytes, most_bytes)));
  return WithShape<kOverlaps>(dims, [&](auto type, auto dk, auto dv) {
    const auto kernel =
        DecodeSelectKernel<decltype(type), decltype(dk)::value, decltype(dv)::value, kOverlaps>;
    return LaunchAfter<DecodeSelectParams, DecodeScratch, int32_t>(
        kOverlaps, kernel, dim3(ctas), kDecodeThreads,
        values_bytes + DecodeShared::OtherBytes(dims), stream, params,
        MakeDecodeScratch(dims, params.max_tokens), values_bytes);
  });
}

template <bool kOverlaps>
cudaError_t LaunchDecodeAttend(const DecodeAttendParams& params, cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const AttentionDims& dims = params.dims;
  const dim3 grid(AttendItems(dims), dims.num_kv_heads * NumHeadTiles(dims),
                  static_cast<unsigned>(params.num_rows));
  return WithShape<kOverlaps>(dims, [&](auto type, auto dk, auto dv) {
    const auto kernel =
        DecodeAttendKernel<decltype(type), decltype(dk)::value, decltype(dv)::value, kOverlaps>;
    return LaunchAfter<DecodeAttendParams, DecodeScratch>(
        kOverlaps, kernel, grid, kDecodeThreads,
        DecodeShared::TileBytes(dims) + DecodeShared::OtherBytes(dims), stream, params,
        MakeDecodeScratch(dims, params.max_tokens));
  });
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_LAUNCH_CUH_
