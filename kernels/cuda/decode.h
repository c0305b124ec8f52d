// The stages of decoding as plain functions that enqueue kernels, as launch.h has them.
#ifndef KERNELS_CUDA_DECODE_H_
#define KERNELS_CUDA_DECODE_H_

#include <cuda_runtime_api.h>

#include "kernels/cuda/launch.h"
#include "kernels/decode_params.h"

namespace nsa::kernels::cuda {

// Any shape, any GPU.
cudaError_t LaunchAppendTokensAny(const AppendTokensParams& params, const Device& device,
                                  cudaStream_t stream);
cudaError_t LaunchDecodeSelectAny(const DecodeSelectParams& params, const Device& device,
                                  cudaStream_t stream);
cudaError_t LaunchDecodeAttendAny(const DecodeAttendParams& params, const Device& device,
                                  cudaStream_t stream);

// Any shape, on Hopper, where the kernels of a step overlap: what a step is given (rows, tables, q)
// has to be there before its first kernel begins.
cudaError_t LaunchAppendTokensFast(const AppendTokensParams& params, const Device& device,
                                   cudaStream_t stream);
cudaError_t LaunchDecodeSelectFast(const DecodeSelectParams& params, const Device& device,
                                   cudaStream_t stream);
cudaError_t LaunchDecodeAttendFast(const DecodeAttendParams& params, const Device& device,
                                   cudaStream_t stream);

cudaError_t LaunchCopyPieces(const CopyPiecesParams& params, const Device& device,
                             cudaStream_t stream);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_H_
