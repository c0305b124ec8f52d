// What the CUDA kernels ask of their arguments beyond what the types say.
#ifndef KERNELS_CUDA_SUPPORTS_H_
#define KERNELS_CUDA_SUPPORTS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

// InvalidArgument, naming the field and what is supported, when no kernel can serve `dims`.
absl::Status SupportsDims(const AttentionDims& dims);

// Rows are read and written so many bytes at a time.
constexpr int64_t kAlignmentBytes = 16;
// InvalidArgument, naming the tensor and its field,
// when a row or head of `tensor` with 16-bit elements does not begin at a multiple of that.
absl::Status CheckAligned(absl::string_view name, const ConstTensor3& tensor);
absl::Status CheckAligned(absl::string_view name, const Tensor3& tensor);
absl::Status CheckAligned(absl::string_view name, const TokenRows& tokens);
absl::Status CheckAligned(absl::string_view name, const CompressorWeights& weights);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_SUPPORTS_H_
