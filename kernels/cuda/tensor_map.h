// Tensors as the copy engine sees them: [rows][heads][dim], in boxes of whole rows of 128 bytes
// that lie in shared memory with the 128-byte swizzle.
#ifndef KERNELS_CUDA_TENSOR_MAP_H_
#define KERNELS_CUDA_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/types.h"

namespace nsa::kernels::cuda {

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

// Null when the driver has no such function.
inline EncodeTensorMap FindEncodeTensorMap() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr unsigned kVersion = 12000;  // the first with it
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             kVersion, cudaEnableDefault, &result);
  const bool found = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return found ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
}

// A tensor and the boxes it is moved in: 128 bytes of box_heads heads of box_rows rows.
struct TensorBoxes {
  DType dtype;
  const void* data;
  int64_t num_rows;
  int32_t num_heads;
  int32_t head_dim;
  int64_t row_stride;   // in elements
  int64_t head_stride;  // in elements; of a single head, anything
  int32_t box_heads;
  int32_t box_rows;
};

// False when the copy engine cannot be told of the tensor.
inline bool MakeTensorMap(EncodeTensorMap encode, const TensorBoxes& boxes, CUtensorMap* map) {
  const CUtensorMapDataType type = boxes.dtype == DType::kF32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                   : boxes.dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                                 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int64_t element_bytes = SizeOf(boxes.dtype);
  const int64_t head_stride = boxes.num_heads == 1 ? boxes.head_dim : boxes.head_stride;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(boxes.head_dim),
                               static_cast<cuuint64_t>(boxes.num_heads),
                               static_cast<cuuint64_t>(boxes.num_rows)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(head_stride * element_bytes),
                                 static_cast<cuuint64_t>(boxes.row_stride * element_bytes)};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(128 / element_bytes),
                             static_cast<cuuint32_t>(boxes.box_heads),
                             static_cast<cuuint32_t>(boxes.box_rows)};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(map, type, 3, const_cast<void*>(boxes.data), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_TENSOR_MAP_H_
