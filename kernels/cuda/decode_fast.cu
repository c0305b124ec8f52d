// Decoding on Hopper, where kernels of a step overlap.
#include "kernels/cuda/decode_launch.cuh"

namespace nsa::kernels::cuda {

cudaError_t LaunchAppendTokensFast(const AppendTokensParams& params, const Device&,
                                   cudaStream_t stream) {
  return LaunchAppendTokens<true>(params, stream);
}

cudaError_t LaunchDecodeSelectFast(const DecodeSelectParams& params, const Device& device,
                                   cudaStream_t stream) {
  return LaunchDecodeSelect<true>(params, device, stream);
}

cudaError_t LaunchDecodeAttendFast(const DecodeAttendParams& params, const Device& device,
                                   cudaStream_t stream) {
  return LaunchDecodeAttend<true>(params, device, stream);
}

}  // namespace nsa::kernels::cuda
