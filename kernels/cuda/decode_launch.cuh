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
#include "kernels/cuda/decode_choose.cuh"
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

// Of a StreamParts kernel: as many stages as fit, and as many CTAs as run at a time.
template <int kDv>
struct StreamLaunch {
  dim3 grid;
  int32_t num_stages = kMaxStages;
  int shared_bytes;

  StreamLaunch(const AttentionDims& dims, const Device& device, bool keeps_p, int64_t most_parts)
      : grid(static_cast<unsigned>(std::min<int64_t>(most_parts, device.num_sms))) {
    const auto bytes = [&] {
      return StreamShared(dims, nullptr, kStreamWarps<kDv>, num_stages).Bytes(keeps_p);
    };
    while (num_stages > 1 && bytes() > device.max_shared_bytes) --num_stages;
    shared_bytes = bytes();
  }
};

constexpr int64_t MostParts(int64_t keys) {
  const int64_t tiles = (keys + kDecodeTileKeys - 1) / kDecodeTileKeys;
  return std::min<int64_t>(tiles, kMaxDecodeParts);
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
  const DecodeScratch layout = MakeDecodeScratch(dims, params.max_tokens);
  const int64_t row_heads = params.num_rows * dims.num_kv_heads;
  const int64_t parts =
      std::max<int64_t>(MostParts(SummaryKeys(dims, last).end), 1) * row_heads * NumHeadTiles(dims);
  const cudaError_t error = WithShape<kOverlaps>(dims, [&](auto type, auto dk, auto dv) {
    constexpr int kDk = decltype(dk)::value, kDv = decltype(dv)::value;
    const StreamLaunch<kDv> launch(dims, device, true, parts);
    return LaunchAfter<DecodeSelectParams, DecodeScratch, int32_t>(
        kOverlaps, DecodeSelectKernel<decltype(type), kDk, kDv, kOverlaps>, launch.grid,
        kStreamThreads<kDv>, launch.shared_bytes, stream, params, layout, launch.num_stages);
  });
  if (error != cudaSuccess) return error;

  // As many CTAs choose as find room at once, but enough that scores fit, if that can be.
  constexpr int32_t kMostScores = 8192;
  const int32_t blocks = NumCandidates(dims, last);
  const int64_t most = std::min(MostChunks(blocks), kMaxDecodeChunks);
  const int64_t least = std::min<int64_t>((blocks + kMostScores - 1) / kMostScores, most);
  const auto choosers = static_cast<int32_t>(
      std::clamp<int64_t>(kChooseCtas * int64_t{device.num_sms} / row_heads - 1, least, most));
  const ChooseShared shared(dims, layout, nullptr);
  const auto scores_bytes = static_cast<int32_t>(
      std::min<int64_t>(std::min<int64_t>((blocks + choosers - 1) / choosers, kMostScores) * 4,
                        device.max_shared_bytes - shared.BytesBeforeScores()));
  return LaunchAfter<DecodeSelectParams, DecodeScratch, int32_t, int32_t>(
      kOverlaps, DecodeChooseKernel<kOverlaps>,
      dim3(choosers + NumHeadTiles(dims), dims.num_kv_heads,
           static_cast<unsigned>(params.num_rows)),
      kChooseThreads, shared.BytesBeforeScores() + scores_bytes, stream, params, layout, choosers,
      scores_bytes);
}

template <bool kOverlaps>
cudaError_t LaunchDecodeAttend(const DecodeAttendParams& params, const Device& device,
                               cudaStream_t stream) {
  if (params.num_rows == 0) return cudaSuccess;
  const AttentionDims& dims = params.dims;
  const DecodeScratch layout = MakeDecodeScratch(dims, params.max_tokens);
  const int64_t heads = int64_t{dims.num_kv_heads} * NumHeadTiles(dims);
  const int64_t parts = (MostParts(int64_t{dims.num_selected_blocks} * dims.select_block_tokens) +
                         MostParts(dims.window_tokens + 15)) *
                        heads * params.num_rows;
  const cudaError_t error = WithShape<kOverlaps>(dims, [&](auto type, auto dk, auto dv) {
    constexpr int kDk = decltype(dk)::value, kDv = decltype(dv)::value;
    const StreamLaunch<kDv> launch(dims, device, false, parts);
    return LaunchAfter<DecodeAttendParams, DecodeScratch, int32_t>(
        kOverlaps, DecodeAttendKernel<decltype(type), kDk, kDv, kOverlaps>, launch.grid,
        kStreamThreads<kDv>, launch.shared_bytes, stream, params, layout, launch.num_stages);
  });
  if (error != cudaSuccess) return error;
  return LaunchAfter<DecodeAttendParams, DecodeScratch>(
      kOverlaps, DecodeGateKernel<kOverlaps>,
      dim3(static_cast<unsigned>(heads), static_cast<unsigned>(params.num_rows)), kGateThreads, 0,
      stream, params, layout);
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_LAUNCH_CUH_
