// Decoding on any GPU.
#include "kernels/cuda/decode_launch.cuh"

namespace nsa::kernels::cuda {

cudaError_t LaunchAppendTokensAny(const AppendTokensParams& params, const Device&,
                                  cudaStream_t stream) {
  return LaunchAppendTokens<false>(params, stream);
}

cudaError_t LaunchDecodeSelectAny(const DecodeSelectParams& params, const Device& device,
                                  cudaStream_t stream) {
  return LaunchDecodeSelect<false>(params, device, stream);
}

cudaError_t LaunchDecodeAttendAny(const DecodeAttendParams& params, const Device& device,
                                  cudaStream_t stream) {
  return LaunchDecodeAttend<false>(params, device, stream);
}

}  // namespace nsa::kernels::cuda
