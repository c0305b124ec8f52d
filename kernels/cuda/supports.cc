#include "kernels/cuda/supports.h"

#include <cmath>
#include <cstdint>

#include "absl/strings/str_cat.h"

namespace nsa::kernels::cuda {
namespace {

constexpr int64_t kAlignmentElements = kAlignmentBytes / 2;
// What the shared memory of every GPU has room for (score_select_rank_any.cu).
constexpr int32_t kMaxStrides = 256;  // of a block
constexpr int32_t kMaxSelectedBlocks = 4096;

absl::Status Require(bool holds, absl::string_view field, double value, absl::string_view rule) {
  if (holds) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " = ", value, ": the CUDA kernels support ", rule));
}

bool IsHeadDim(int32_t dim) { return dim == 64 || dim == 128 || dim == 192 || dim == 256; }

bool IsMultiple(int32_t tokens, int32_t part) {
  return tokens > 0 && part > 0 && tokens % part == 0;
}

// A compression or select block.
bool IsBlock(int32_t tokens, int32_t stride) {
  return IsMultiple(tokens, stride) && tokens / stride <= kMaxStrides;
}

absl::Status CheckPointer(absl::string_view name, absl::string_view field, const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (address % kAlignmentBytes == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, ".", field, " = ", absl::Hex(address),
                   ": the CUDA kernels need addresses that are multiples of ", kAlignmentBytes));
}

}  // namespace

absl::Status SupportsDims(const AttentionDims& d) {
  constexpr absl::string_view kHeadDims = "64, 128, 192, 256";
  const absl::Status rules[] = {
      d.dtype == DType::kBF16 || d.dtype == DType::kF16
          ? absl::OkStatus()
          : absl::InvalidArgumentError(
                absl::StrCat("dtype = ", NameOf(d.dtype), ": the CUDA kernels support bf16, f16")),
      Require(d.num_kv_heads >= 1, "num_kv_heads", d.num_kv_heads, "1 and more"),
      Require(IsMultiple(d.num_q_heads, d.num_kv_heads), "num_q_heads", d.num_q_heads,
              "positive multiples of num_kv_heads"),
      Require(IsHeadDim(d.head_dim_qk), "head_dim_qk", d.head_dim_qk, kHeadDims),
      Require(IsHeadDim(d.head_dim_v), "head_dim_v", d.head_dim_v, kHeadDims),
      Require(IsMultiple(d.compress_stride_tokens, 16), "compress_stride_tokens",
              d.compress_stride_tokens, "positive multiples of 16"),
      Require(IsBlock(d.compress_block_tokens, d.compress_stride_tokens), "compress_block_tokens",
              d.compress_block_tokens, "1 to 256 times compress_stride_tokens"),
      Require(IsBlock(d.select_block_tokens, d.compress_stride_tokens), "select_block_tokens",
              d.select_block_tokens, "1 to 256 times compress_stride_tokens"),
      Require(d.num_initial_blocks >= 0, "num_initial_blocks", d.num_initial_blocks, "0 and more"),
      Require(d.num_local_blocks >= 1, "num_local_blocks", d.num_local_blocks, "1 and more"),
      Require(d.num_selected_blocks - d.num_local_blocks >= d.num_initial_blocks,
              "num_selected_blocks", d.num_selected_blocks,
              "num_initial_blocks + num_local_blocks and more"),
      Require(d.num_selected_blocks <= kMaxSelectedBlocks, "num_selected_blocks",
              d.num_selected_blocks, "4096 and fewer"),
      Require(d.window_tokens >= 1, "window_tokens", d.window_tokens, "1 and more"),
      Require(std::isfinite(d.softmax_scale) && d.softmax_scale > 0, "softmax_scale",
              d.softmax_scale, "finite and positive values"),
  };
  for (const absl::Status& rule : rules) {
    if (!rule.ok()) return rule;
  }
  return absl::OkStatus();
}

absl::Status CheckAligned(absl::string_view name, const ConstTensor3& tensor) {
  for (const auto& [field, stride] : {std::make_pair("row_stride", tensor.row_stride),
                                      std::make_pair("head_stride", tensor.head_stride)}) {
    if (stride % kAlignmentElements != 0) {
      return absl::InvalidArgumentError(absl::StrCat(name, ".", field, " = ", stride,
                                                     ": the CUDA kernels need multiples of ",
                                                     kAlignmentElements, " elements"));
    }
  }
  return CheckPointer(name, "data", tensor.data);
}

absl::Status CheckAligned(absl::string_view name, const Tensor3& tensor) {
  return CheckAligned(name, ConstTensor3{tensor.data, tensor.row_stride, tensor.head_stride});
}

absl::Status CheckAligned(absl::string_view name, const TokenRows& tokens) {
  const absl::Status status = CheckAligned(name, tokens.own);
  return status.ok() ? CheckAligned(absl::StrCat(name, ".halo"), tokens.halo) : status;
}

absl::Status CheckAligned(absl::string_view name, const CompressorWeights& weights) {
  for (const auto& [field, pointer] :
       {std::make_pair("pe", weights.pe), std::make_pair("w", weights.w),
        std::make_pair("w1", weights.w1)}) {
    const absl::Status status = CheckPointer(name, field, pointer);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace nsa::kernels::cuda
