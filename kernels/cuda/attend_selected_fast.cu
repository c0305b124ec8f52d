// Selected attention for the shapes that performance is about, q in registers.
#include "kernels/cuda/attend_selected.cuh"

namespace nsa::kernels::cuda {

bool HasFastAttendSelected(const AttentionDims& dims) {
  const int32_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  return (dk == 64 && dv == 64) || (dk == 128 && dv == 128) || (dk == 192 && dv == 128);
}

namespace {

template <class T, int kDk, int kDv>
cudaError_t LaunchShape(const AttendSelectedParams& params, const Device& device,
                        cudaStream_t stream) {
  const SelectedGeometry geometry = MakeSelectedGeometry(params, device, kDv * 2);
  if (geometry.num_tiles == 0) return cudaSuccess;
  const auto kernel = params.dims.select_block_tokens == kTileKeys
                          ? AttendSelectedKernel<T, kDk, kDv, kTileKeys>
                          : AttendSelectedKernel<T, kDk, kDv, 0>;
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

cudaError_t LaunchAttendSelectedFast(const AttendSelectedParams& params, const Device& device,
                                     cudaStream_t stream) {
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, device, stream)
                                           : Launch<__half>(params, device, stream);
}

}  // namespace nsa::kernels::cuda
