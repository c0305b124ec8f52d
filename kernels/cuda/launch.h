// The stages as plain functions that enqueue kernels: what .cu files offer to C++.
//
// Each returns the first CUDA error of its launches. Params are those of Kernels, of a 16-bit type,
// already checked for what these kernels ask of them (see CudaKernels).
#ifndef KERNELS_CUDA_LAUNCH_H_
#define KERNELS_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/backward_params.h"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

// Which kernels may be used.
enum class Path : int8_t {
  kHopper,    // those of compute capability 9.0 alone, where they serve the dims
  kPortable,  // those of compute capability 8.0 and up: they serve all dims
};

// What launches are fitted to.
struct Device {
  int32_t num_sms;
  int32_t max_shared_bytes;  // of a block
  Path path;
};

cudaError_t LaunchCopyRows(const CopyRowsParams& params, const Device& device, cudaStream_t stream);

// mean, weighted
cudaError_t LaunchCompressSum(const CompressParams& params, const Device& device,
                              cudaStream_t stream);
// linear, mlp
cudaError_t LaunchCompressMatrix(const CompressParams& params, const Device& device,
                                 cudaStream_t stream);
inline cudaError_t LaunchCompress(const CompressParams& params, const Device& device,
                                  cudaStream_t stream) {
  const bool has_matrix =
      params.compressor == Compressor::kLinear || params.compressor == Compressor::kMlp;
  return has_matrix ? LaunchCompressMatrix(params, device, stream)
                    : LaunchCompressSum(params, device, stream);
}

cudaError_t LaunchPackBlocks(const PackBlocksParams& params, const Device& device,
                             cudaStream_t stream);

cudaError_t LaunchPlanFetch(const PlanFetchParams& params, const Device& device,
                            cudaStream_t stream);

// The shapes that performance is about: (Dk, Dv) of (64,64), (128,128), (192,128).
bool HasFastAttendSelected(const AttentionDims& dims);
cudaError_t LaunchAttendSelectedFast(const AttendSelectedParams& params, const Device& device,
                                     cudaStream_t stream);
// Any shape, any GPU.
cudaError_t LaunchAttendSelectedAny(const AttendSelectedParams& params, const Device& device,
                                    cudaStream_t stream);

// (Dk, Dv) of (64,64), (128,128), (192,128).
bool HasFastAttendWindow(const AttentionDims& dims);
cudaError_t LaunchAttendWindowFast(const AttendWindowParams& params, const Device& device,
                                   cudaStream_t stream);
// Any shape, any GPU.
cudaError_t LaunchAttendWindowAny(const AttendWindowParams& params, const Device& device,
                                  cudaStream_t stream);

cudaError_t LaunchGateBackward(const GateBackwardParams& params, const Device& device,
                               cudaStream_t stream);

int64_t SelectedBackwardScratchBytes(const AttentionDims& dims, const BackwardLimits& limits);
// (Dk, Dv) of (64,64), (128,128); l' of 64; groups of at most 64 heads.
bool HasFastAttendSelectedBackward(const AttentionDims& dims);
cudaError_t LaunchAttendSelectedBackwardFast(const AttendSelectedBackwardParams& params,
                                             const Device& device, cudaStream_t stream);
// Any shape, any GPU.
cudaError_t LaunchAttendSelectedBackwardAny(const AttendSelectedBackwardParams& params,
                                            const Device& device, cudaStream_t stream);

int64_t CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                     int32_t hidden_width, int64_t num_blocks);
cudaError_t LaunchCompressBackward(const CompressBackwardParams& params, const Device& device,
                                   cudaStream_t stream);

cudaError_t LaunchUnpackGradients(const UnpackGradientsParams& params, const Device& device,
                                  cudaStream_t stream);
cudaError_t LaunchPlanReturn(const PlanReturnParams& params, const Device& device,
                             cudaStream_t stream);
cudaError_t LaunchAddIndexedRows(const AddIndexedRowsParams& params, const Device& device,
                                 cudaStream_t stream);
cudaError_t LaunchAddRows(const AddRowsParams& params, const Device& device, cudaStream_t stream);
cudaError_t LaunchStoreGradient(const StoreGradientParams& params, const Device& device,
                                cudaStream_t stream);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_LAUNCH_H_
