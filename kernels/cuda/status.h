// CUDA errors as absl::Status.
#ifndef KERNELS_CUDA_STATUS_H_
#define KERNELS_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace nsa::kernels::cuda {

// Internal, with the expression that failed and CUDA's name for why.
absl::Status ToStatus(cudaError_t error, absl::string_view expression);

}  // namespace nsa::kernels::cuda

#define NSA_CUDA_STATUS(expression) ::nsa::kernels::cuda::ToStatus((expression), #expression)

#define NSA_RETURN_IF_CUDA_ERROR(expression)                      \
  do {                                                            \
    const absl::Status cuda_status = NSA_CUDA_STATUS(expression); \
    if (!cuda_status.ok()) return cuda_status;                    \
  } while (false)

#endif  // KERNELS_CUDA_STATUS_H_
