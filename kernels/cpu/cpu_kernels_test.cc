#include "kernels/cpu/cpu_kernels.h"

#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nsa::kernels {
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

std::unique_ptr<Kernels> MakeKernels() {
  auto kernels = CpuKernels::Create();
  EXPECT_TRUE(kernels.ok()) << kernels.status();
  return *std::move(kernels);
}

TEST(CpuKernelsTest, NumberOfThreads) {
  EXPECT_TRUE(CpuKernels::Create({.num_threads = 3}).ok());
  const auto kernels = CpuKernels::Create({.num_threads = -1});
  EXPECT_EQ(kernels.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(kernels.status().message(), HasSubstr("num_threads = -1"));
}

TEST(CpuKernelsTest, SupportsNamesTheFieldAndWhatWouldDo) {
  const auto kernels = MakeKernels();
  EXPECT_EQ(kernels->Supports(GoodDims()), absl::OkStatus());
  const std::pair<std::string, std::function<void(AttentionDims&)>> kBad[] = {
      {"dtype = 7", [](AttentionDims& d) { d.dtype = static_cast<DType>(7); }},
      {"num_kv_heads = 0", [](AttentionDims& d) { d.num_kv_heads = 0; }},
      {"num_q_heads = 9", [](AttentionDims& d) { d.num_q_heads = 9; }},
      {"num_q_heads = 0", [](AttentionDims& d) { d.num_q_heads = 0; }},
      {"head_dim_qk = 80", [](AttentionDims& d) { d.head_dim_qk = 80; }},
      {"head_dim_v = 512", [](AttentionDims& d) { d.head_dim_v = 512; }},
      {"compress_stride_tokens = 8", [](AttentionDims& d) { d.compress_stride_tokens = 8; }},
      {"compress_block_tokens = 40", [](AttentionDims& d) { d.compress_block_tokens = 40; }},
      {"select_block_tokens = 0", [](AttentionDims& d) { d.select_block_tokens = 0; }},
      {"num_initial_blocks = -1", [](AttentionDims& d) { d.num_initial_blocks = -1; }},
      {"num_local_blocks = 0", [](AttentionDims& d) { d.num_local_blocks = 0; }},
      {"num_selected_blocks = 2", [](AttentionDims& d) { d.num_selected_blocks = 2; }},
      {"window_tokens = 0", [](AttentionDims& d) { d.window_tokens = 0; }},
      {"softmax_scale = inf",
       [](AttentionDims& d) { d.softmax_scale = std::numeric_limits<float>::infinity(); }},
  };
  for (const auto& [message, spoil] : kBad) {
    AttentionDims dims = GoodDims();
    spoil(dims);
    const absl::Status status = kernels->Supports(dims);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << message;
    EXPECT_THAT(status.message(), HasSubstr(message));
  }
}

TEST(CpuKernelsTest, RecordsHoldKAndV) {
  const auto kernels = MakeKernels();
  EXPECT_EQ(kernels->RecordBytes(GoodDims()), 64 * (192 + 128) * 2);
  AttentionDims dims = GoodDims();
  dims.dtype = DType::kF32;
  dims.select_block_tokens = 16;
  EXPECT_EQ(kernels->RecordBytes(dims), 16 * (192 + 128) * 4);
  EXPECT_EQ(kernels->RecordBytes(dims) % 64, 0);
}

TEST(CpuKernelsTest, MemoryIsAlignedAndZero) {
  const auto kernels = MakeKernels();
  for (int64_t num_bytes : {0, 1, 255, 100000}) {
    const auto memory = kernels->Allocate(num_bytes);
    ASSERT_TRUE(memory.ok()) << memory.status();
    const char* const data = static_cast<const char*>((*memory)->data());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 256, 0);
    for (int64_t i = 0; i < num_bytes; ++i) ASSERT_EQ(data[i], 0);
  }
}

TEST(CpuKernelsTest, AbsurdRequestsAreRefused) {
  const auto kernels = MakeKernels();
  for (int64_t num_bytes : {int64_t{1} << 45, std::numeric_limits<int64_t>::max()}) {
    const auto memory = kernels->Allocate(num_bytes);
    EXPECT_EQ(memory.status().code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(memory.status().message(), HasSubstr(std::to_string(num_bytes) + " bytes asked"));
    EXPECT_THAT(memory.status().message(), HasSubstr("bytes free"));
  }
  EXPECT_EQ(kernels->Allocate(-1).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(CpuKernelsTest, CopiesAndSynchronizes) {
  const auto kernels = MakeKernels();
  const std::vector<char> from = {1, 2, 3};
  std::vector<char> to(3);
  auto memory = kernels->Allocate(3);
  ASSERT_TRUE(memory.ok());
  EXPECT_TRUE(kernels->CopyFromHost((*memory)->data(), from.data(), 3, nullptr).ok());
  EXPECT_TRUE(kernels->CopyToHost(to.data(), (*memory)->data(), 3, nullptr).ok());
  EXPECT_EQ(from, to);
  EXPECT_TRUE(kernels->CopyToHost(nullptr, nullptr, 0, nullptr).ok());
  EXPECT_TRUE(kernels->Synchronize(nullptr).ok());
}

}  // namespace
}  // namespace nsa::kernels
