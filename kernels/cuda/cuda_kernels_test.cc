#include "kernels/cuda/cuda_kernels.h"

#include <cuda_runtime_api.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/cuda/gpu_testing.h"
#include "tests/testing/random.h"

namespace nsa::kernels {
namespace {

using ::testing::HasSubstr;

TEST(CudaKernelsCreateTest, NamesADeviceThatIsNotThere) {
  for (int device : {-1, 1000}) {
    const auto kernels = CudaKernels::Create({.device = device});
    EXPECT_EQ(kernels.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(kernels.status().message(), HasSubstr("device = " + std::to_string(device)));
  }
}

class CudaKernelsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    NSA_SKIP_WITHOUT_GPU();
    auto kernels = CudaKernels::Create();
    ASSERT_TRUE(kernels.ok()) << kernels.status();
    kernels_ = *std::move(kernels);
  }

  std::unique_ptr<Memory> Upload(const void* data, int64_t num_bytes) {
    auto memory = kernels_->Allocate(num_bytes);
    EXPECT_TRUE(memory.ok()) << memory.status();
    EXPECT_TRUE(kernels_->CopyFromHost((*memory)->data(), data, num_bytes, nullptr).ok());
    return *std::move(memory);
  }

  template <class T>
  std::vector<T> Download(const void* data, int64_t count) {
    std::vector<T> values(count);
    EXPECT_TRUE(kernels_->CopyToHost(values.data(), data, count * sizeof(T), nullptr).ok());
    EXPECT_TRUE(kernels_->Synchronize(nullptr).ok());
    return values;
  }

  std::unique_ptr<Kernels> kernels_;
};

TEST_F(CudaKernelsTest, MemoryIsAlignedAndZero) {
  for (int64_t num_bytes : {0, 1, 255, 100000}) {
    const auto memory = kernels_->Allocate(num_bytes);
    ASSERT_TRUE(memory.ok()) << memory.status();
    EXPECT_EQ(reinterpret_cast<uintptr_t>((*memory)->data()) % 256, 0);
    for (char byte : Download<char>((*memory)->data(), num_bytes)) ASSERT_EQ(byte, 0);
  }
}

TEST_F(CudaKernelsTest, AbsurdRequestsAreRefused) {
  for (int64_t num_bytes : {int64_t{1} << 45, std::numeric_limits<int64_t>::max()}) {
    const auto memory = kernels_->Allocate(num_bytes);
    EXPECT_EQ(memory.status().code(), absl::StatusCode::kResourceExhausted) << memory.status();
    EXPECT_THAT(memory.status().message(), HasSubstr(std::to_string(num_bytes) + " bytes asked"));
    EXPECT_THAT(memory.status().message(), HasSubstr("bytes free"));
  }
  EXPECT_EQ(kernels_->Allocate(-1).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(kernels_->Allocate(1).ok());
}

TEST_F(CudaKernelsTest, WorksOnAStreamOfTheCaller) {
  cudaStream_t stream;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  const std::vector<char> from = {1, 2, 3};
  std::vector<char> to(3);
  auto memory = kernels_->Allocate(3);
  ASSERT_TRUE(memory.ok());
  EXPECT_TRUE(kernels_->CopyFromHost((*memory)->data(), from.data(), 3, stream).ok());
  EXPECT_TRUE(kernels_->CopyToHost(to.data(), (*memory)->data(), 3, stream).ok());
  EXPECT_TRUE(kernels_->Synchronize(stream).ok());
  EXPECT_EQ(from, to);
  EXPECT_TRUE(kernels_->CopyToHost(nullptr, nullptr, 0, stream).ok());
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST_F(CudaKernelsTest, CopiesRowsOfManySegments) {
  constexpr int64_t kRows = 5000, kHeads = 3, kDim = 64, kStride = 3 * 72;
  test::Random random(1);
  std::vector<uint16_t> src(kRows * kStride);
  for (uint16_t& value : src) value = static_cast<uint16_t>(random.Next());
  for (int64_t num_segments : {1, 5, 77}) {
    std::vector<Segment> segments;
    std::vector<uint16_t> expected;
    for (int64_t i = 0; i < num_segments; ++i) {
      const int64_t row = random.Int(0, kRows - 101), count = random.Int(0, 100);
      segments.push_back({row, count, 0, 0, 0});
      for (int64_t t = row; t < row + count; ++t) {
        for (int64_t h = 0; h < kHeads; ++h) {
          const auto begin = src.begin() + t * kStride + h * 72;
          expected.insert(expected.end(), begin, begin + kDim);
        }
      }
    }
    const auto device_src = Upload(src.data(), src.size() * 2);
    const auto device_segments = Upload(segments.data(), segments.size() * sizeof(Segment));
    const std::vector<uint16_t> poison(expected.size() + 8, 0xffff);
    const auto dst = Upload(poison.data(), poison.size() * 2);
    ASSERT_EQ(kernels_->CopyRows({.dtype = DType::kBF16,
                                  .num_heads = kHeads,
                                  .head_dim = kDim,
                                  .src = {device_src->data(), kStride, 72},
                                  .segments = static_cast<const Segment*>(device_segments->data()),
                                  .num_segments = static_cast<int32_t>(num_segments),
                                  .dst = dst->data()},
                                 nullptr),
              absl::OkStatus());
    expected.resize(poison.size(), 0xffff);  // nothing is written past the end
    EXPECT_EQ(expected, Download<uint16_t>(dst->data(), expected.size()));
  }
}

TEST_F(CudaKernelsTest, RefusesRowsThatAreNotAligned) {
  CopyRowsParams params{};
  params.src.row_stride = 3;
  EXPECT_EQ(kernels_->CopyRows(params, nullptr).code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace nsa::kernels
