// Selected attention for any shape, q in shared memory.
#include "kernels/cuda/attend_selected.cuh"

namespace nsa::kernels::cuda {
namespace {

template <class T, int kDv>
cudaError_t LaunchShape(const AttendSelectedParams& params, const Device& device,
                        cudaStream_t stream) {
  const SelectedGeometry geometry = MakeSelectedGeometry(params, device, /*q_in_registers=*/false);
  if (geometry.num_tiles == 0) return cudaSuccess;
  const auto kernel = AttendSelectedKernel<T, 0, kDv, 0>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, geometry.shared_bytes);
  if (error != cudaSuccess) return error;
  const int32_t grid = geometry.num_tiles < device.num_sms ? geometry.num_tiles : device.num_sms;
  kernel<<<static_cast<unsigned>(grid), kSelectedThreads, geometry.shared_bytes, stream>>>(
      params, geometry);
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const AttendSelectedParams& params, const Device& device, cudaStream_t stream) {
  switch (params.dims.head_dim_v) {
    case 64:
      return LaunchShape<T, 64>(params, device, stream);
    case 128:
      return LaunchShape<T, 128>(params, device, stream);
    case 192:
      return LaunchShape<T, 192>(params, device, stream);
    default:
      return LaunchShape<T, 256>(params, device, stream);
  }
}

}  // namespace

cudaError_t LaunchAttendSelectedAny(const AttendSelectedParams& params, const Device& device,
                                    cudaStream_t stream) {
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, device, stream)
                                           : Launch<__half>(params, device, stream);
}

}  // namespace nsa::kernels::cuda
