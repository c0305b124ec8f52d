#include "comm/cuda_status.h"

#include "absl/strings/str_cat.h"

namespace nsa::comm {

absl::Status CudaStatus(cudaError_t error, absl::string_view expression) {
  if (error == cudaSuccess) return absl::OkStatus();
  const absl::StatusCode code = error == cudaErrorMemoryAllocation
                                    ? absl::StatusCode::kResourceExhausted
                                    : absl::StatusCode::kInternal;
  return absl::Status(code, absl::StrCat(expression, ": ", cudaGetErrorName(error), ": ",
                                         cudaGetErrorString(error)));
}

}  // namespace nsa::comm
