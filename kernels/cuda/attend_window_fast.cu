// Sliding-window attention on Hopper's tensor cores, for the shapes that performance is about.
//
// A tile of rows is worked on by three consumer warpgroups of 64 rows each. One warp has the copy
// engine bring tiles of 64 keys and values into a ring; where a tile's tokens do not lie in one
// piece, it copies them itself, row by row. Three warps bring q, one for each consumer. While a
// consumer takes the exponentials of a tile, the tensor cores multiply the one before with its
// values.
#include "kernels/cuda/attend_window_consumer.cuh"
#include "kernels/cuda/attend_window_copies.cuh"
#include "kernels/cuda/attend_window_shared.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda {
namespace attend_window {
namespace {

// Grid: one CTA per SM; CTA i owns tiles i, i + gridDim, ... of rows, one kv head after another.
template <class T, int kDk, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
    AttendWindowKernel(const __grid_constant__ AttendWindowParams params,
                       const __grid_constant__ TensorMaps maps) {
  using Sizes = Shape<kDk, kDv>;
  extern __shared__ __align__(1024) char memory[];
  const Shared<Sizes> shared{SharedAddress(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < Sizes::kSlots; ++i) {
      BarrierInit(shared.Full(i), 1);
      BarrierInit(shared.Empty(i), 2 * kConsumerWarps);  // once for keys, once for values
    }
    for (int buffer = 0; buffer < Sizes::kQBuffers; ++buffer) {
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        BarrierInit(shared.QFull(buffer, consumer), 1);
        BarrierInit(shared.QEmpty(buffer, consumer), 4);
      }
    }
    BarrierInitFence();
  }
  __syncthreads();
  const int64_t num_tiles = NumWindowTiles<kTileRows>(params);
  const auto for_each_run = [&](auto& role) {
    for (int64_t tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
      ForEachRun<kTileRows>(params, tile, [&](const WindowRun& run) { role.Run(run); });
    }
  };
  const int warp = threadIdx.x / 32;
  if (warp >= kConsumerWarps) {
    LowerRegisters<kProducerRegisters>();
    if (warp == kConsumerWarps) {
      TileLoader<kDk, kDv> loader(params, maps, shared);
      for_each_run(loader);
    } else {
      QLoader<kDk, kDv> loader(params, shared, warp - kConsumerWarps - 1);
      for_each_run(loader);
    }
  } else {
    RaiseRegisters<kConsumerRegisters>();
    Consumer<T, kDk, kDv> consumer(params, shared);
    for_each_run(consumer);
  }
}

TensorMaps MakeTensorMaps(const AttendWindowParams& params) {
  TensorMaps maps{};
  const EncodeTensorMap encode = FindEncodeTensorMap();
  const AttentionDims& dims = params.dims;
  // The number of rows is not known; boxes are asked for only where all of their rows are tokens.
  const auto make = [&](const ConstTensor3& tensor, int32_t head_dim, CUtensorMap* map) {
    return tensor.data == nullptr ||  // never used
           MakeTensorMap(encode,
                         {dims.dtype, tensor.data, int64_t{1} << 31, dims.num_kv_heads, head_dim,
                          tensor.row_stride, tensor.head_stride, 1, kTileKeys},
                         map);
  };
  maps.are_set = encode != nullptr && make(params.k.own, dims.head_dim_qk, &maps.keys[0]) &&
                 make(params.k.halo, dims.head_dim_qk, &maps.keys[1]) &&
                 make(params.v.own, dims.head_dim_v, &maps.values[0]) &&
                 make(params.v.halo, dims.head_dim_v, &maps.values[1]);
  return maps;
}

template <class T, int kDk, int kDv>
cudaError_t LaunchShape(const AttendWindowParams& params, const Device& device,
                        cudaStream_t stream) {
  constexpr int kBytes = Shape<kDk, kDv>::kBytes;
  const auto kernel = AttendWindowKernel<T, kDk, kDv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<device.num_sms, kThreads, kBytes, stream>>>(params, MakeTensorMaps(params));
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const AttendWindowParams& params, const Device& device, cudaStream_t stream) {
  switch (params.dims.head_dim_qk) {
    case 64:
      return LaunchShape<T, 64, 64>(params, device, stream);
    case 128:
      return LaunchShape<T, 128, 128>(params, device, stream);
    default:
      return LaunchShape<T, 192, 128>(params, device, stream);
  }
}

}  // namespace
}  // namespace attend_window

bool HasFastAttendWindow(const AttentionDims& dims) {
  const int32_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  return (dk == 64 && dv == 64) || (dk == 128 && dv == 128) || (dk == 192 && dv == 128);
}

cudaError_t LaunchAttendWindowFast(const AttendWindowParams& params, const Device& device,
                                   cudaStream_t stream) {
  if (params.queries.num_tokens == 0) return cudaSuccess;
  return params.dims.dtype == DType::kBF16
             ? attend_window::Launch<__nv_bfloat16>(params, device, stream)
             : attend_window::Launch<__half>(params, device, stream);
}

}  // namespace nsa::kernels::cuda
