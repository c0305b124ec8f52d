#include "kernels/cuda/status.h"

#include "absl/strings/str_cat.h"

namespace nsa::kernels::cuda {

absl::Status ToStatus(cudaError_t error, absl::string_view expression) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat(expression, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error)));
}

}  // namespace nsa::kernels::cuda
