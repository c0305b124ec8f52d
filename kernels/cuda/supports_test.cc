#include "kernels/cuda/supports.h"

#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <utility>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nsa::kernels::cuda {
namespace {

using ::testing::HasSubstr;

AttentionDims GoodDims() {
  AttentionDims dims{};
  dims.dtype = DType::kBF16;
  dims.num_q_heads = 8;
  dims.num_kv_heads = 2;
  dims.head_dim_qk = 192;
  dims.head_dim_v = 128;
  dims.compress_block_tokens = 32;
  dims.compress_stride_tokens = 16;
  dims.select_block_tokens = 64;
  dims.num_selected_blocks = 16;
  dims.num_initial_blocks = 1;
  dims.num_local_blocks = 2;
  dims.window_tokens = 512;
  dims.softmax_scale = 0.1f;
  return dims;
}

TEST(SupportsTest, NamesTheFieldAndWhatWouldDo) {
  EXPECT_EQ(SupportsDims(GoodDims()), absl::OkStatus());
  const std::pair<std::string, std::function<void(AttentionDims&)>> kBad[] = {
      {"dtype = f32: the CUDA kernels support bf16, f16",
       [](AttentionDims& d) { d.dtype = DType::kF32; }},
      {"num_kv_heads = 0", [](AttentionDims& d) { d.num_kv_heads = 0; }},
      {"num_q_heads = 9", [](AttentionDims& d) { d.num_q_heads = 9; }},
      {"head_dim_qk = 80", [](AttentionDims& d) { d.head_dim_qk = 80; }},
      {"head_dim_v = 512", [](AttentionDims& d) { d.head_dim_v = 512; }},
      {"compress_stride_tokens = 8", [](AttentionDims& d) { d.compress_stride_tokens = 8; }},
      {"compress_block_tokens = 40", [](AttentionDims& d) { d.compress_block_tokens = 40; }},
      {"compress_block_tokens = 4112: the CUDA kernels support 1 to 256 times",
       [](AttentionDims& d) { d.compress_block_tokens = 4112; }},
      {"select_block_tokens = 4112: the CUDA kernels support 1 to 256 times",
       [](AttentionDims& d) { d.select_block_tokens = 4112; }},
      {"select_block_tokens = 0", [](AttentionDims& d) { d.select_block_tokens = 0; }},
      {"num_initial_blocks = -1", [](AttentionDims& d) { d.num_initial_blocks = -1; }},
      {"num_local_blocks = 0", [](AttentionDims& d) { d.num_local_blocks = 0; }},
      {"num_selected_blocks = 2", [](AttentionDims& d) { d.num_selected_blocks = 2; }},
      {"num_selected_blocks = 4097: the CUDA kernels support 4096 and fewer",
       [](AttentionDims& d) { d.num_selected_blocks = 4097; }},
      {"window_tokens = 0", [](AttentionDims& d) { d.window_tokens = 0; }},
      {"softmax_scale = 0", [](AttentionDims& d) { d.softmax_scale = 0.0f; }},
      {"softmax_scale = inf",
       [](AttentionDims& d) { d.softmax_scale = std::numeric_limits<float>::infinity(); }},
  };
  for (const auto& [message, spoil] : kBad) {
    AttentionDims dims = GoodDims();
    spoil(dims);
    const absl::Status status = SupportsDims(dims);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << message;
    EXPECT_THAT(status.message(), HasSubstr(message));
  }
}

TEST(SupportsTest, TakesWhatPortableKernelsServe) {
  for (int32_t strides : {1, 2, 5, 256}) {
    for (int32_t dim : {64, 128, 192, 256}) {
      for (int32_t n : {3, 4096}) {
        AttentionDims dims = GoodDims();
        dims.head_dim_qk = dim;
        dims.head_dim_v = 320 - dim;
        if (dim == 256) dims.head_dim_v = 256;
        dims.num_q_heads = 67 * dims.num_kv_heads;
        dims.compress_block_tokens = strides * dims.compress_stride_tokens;
        dims.select_block_tokens = strides * dims.compress_stride_tokens;
        dims.num_selected_blocks = n;
        EXPECT_EQ(SupportsDims(dims), absl::OkStatus());
      }
    }
  }
}

TEST(SupportsTest, NamesTheTensorThatIsNotAligned) {
  alignas(16) const char bytes[32] = {};
  EXPECT_EQ(CheckAligned("q", ConstTensor3{bytes, 1024, 64}), absl::OkStatus());
  EXPECT_EQ(CheckAligned("q", ConstTensor3{}), absl::OkStatus());
  EXPECT_THAT(CheckAligned("q", ConstTensor3{bytes, 1025, 64}).message(),
              HasSubstr("q.row_stride = 1025: the CUDA kernels need multiples of 8 elements"));
  EXPECT_THAT(CheckAligned("o", Tensor3{nullptr, 1024, 65}).message(),
              HasSubstr("o.head_stride = 65"));
  EXPECT_THAT(CheckAligned("q", ConstTensor3{bytes + 2, 1024, 64}).message(),
              HasSubstr("multiples of 16"));
  TokenRows tokens{{bytes, 64, 64}, {bytes, 4, 64}, nullptr, 0};
  EXPECT_THAT(CheckAligned("k", tokens).message(), HasSubstr("k.halo.row_stride = 4"));
  CompressorWeights weights;
  weights.w1 = bytes + 8;
  EXPECT_THAT(CheckAligned("weights", weights).message(), HasSubstr("weights.w1"));
}

}  // namespace
}  // namespace nsa::kernels::cuda
