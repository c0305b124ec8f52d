#include <cstdint>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/workers.h"
#include "tests/testing/numeric.h"
#include "tests/testing/random.h"

namespace nsa::kernels::cpu {
namespace {

class GradientsTest : public ::testing::Test {
 protected:
  std::vector<float> Normals(int64_t count) {
    std::vector<float> values(count);
    for (float& x : values) x = static_cast<float>(random_.Normal());
    return values;
  }

  const std::unique_ptr<Workers> workers_ = *Workers::Create(3);
  test::Random random_{1};
};

// Rank 1 owns blocks 1, 2 and 4 of 5; the peer has 7 own records and fetched some of ours.
TEST_F(GradientsTest, PlanReturnTakesTheSlotsWithOwnRecords) {
  const int32_t rank[] = {0, 1, 1, 2, 1}, ordinal[] = {0, 0, 1, 0, 2};
  const int64_t blocks_of_rank[] = {1, 3, 1};
  const int32_t locations[] = {2,  8,  -1, 9,  7,    // head 0
                               -1, 5,  6,  -1, -1,   // head 1, not of this call
                               3,  -1, 10, 11, 12};  // head 2
  int32_t peers[9], own_records[9], count = -1;
  int64_t offsets[9];
  PlanReturnParams params{.dims = {},
                          .kv_heads = {0, 1},
                          .peer_locations = locations,
                          .peer_own_records = 7,
                          .peer = 2,
                          .owners = {.rank = rank,
                                     .ordinal = ordinal,
                                     .blocks_of_rank = blocks_of_rank,
                                     .num_blocks = 5,
                                     .num_ranks = 3,
                                     .this_rank = 1},
                          .record_gradient_bytes = 1000,
                          .capacity = 9,
                          .peers = peers,
                          .offsets = offsets,
                          .own_records = own_records,
                          .count = &count};
  PlanReturn(params);
  EXPECT_EQ(std::vector<int32_t>(own_records, own_records + count), (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(std::vector<int64_t>(offsets, offsets + count), (std::vector<int64_t>{1000, 0}));
  EXPECT_EQ(std::vector<int32_t>(peers, peers + count), (std::vector<int32_t>{2, 2}));
  params.kv_heads = {2, 3};
  PlanReturn(params);
  EXPECT_EQ(std::vector<int32_t>(own_records, own_records + count), (std::vector<int32_t>{7, 8}));
  EXPECT_EQ(std::vector<int64_t>(offsets, offsets + count), (std::vector<int64_t>{3000, 5000}));
}

TEST_F(GradientsTest, AddIndexedRows) {
  const int64_t n = 80;
  const std::vector<float> before = Normals(6 * n), src = Normals(4 * n);
  const int32_t rows[] = {5, 0, 3, 1}, count = 3;
  std::vector<float> dst = before;
  ASSERT_TRUE(AddIndexedRows({.dst = dst.data(),
                              .src = src.data(),
                              .rows = rows,
                              .count = &count,
                              .max_count = 4,
                              .row_elements = n},
                             *workers_)
                  .ok());
  std::vector<float> expected = before;
  for (int64_t i = 0; i < 3; ++i) {
    for (int64_t c = 0; c < n; ++c) expected[rows[i] * n + c] += src[i * n + c];
  }
  EXPECT_EQ(dst, expected);
}

TEST_F(GradientsTest, AddRows) {
  const int64_t n = 48;
  const std::vector<float> before = Normals(10 * n), src = Normals(6 * n);
  const Segment segments[] = {
      {.row = 7, .num_tokens = 2, .position = 0, .document = 0, .is_halo = 0},
      {.row = 1, .num_tokens = 4, .position = 2, .document = 0, .is_halo = 0}};
  const int64_t rows[] = {7, 8, 1, 2, 3, 4};
  std::vector<float> dst = before;
  ASSERT_TRUE(AddRows({.dst = dst.data(),
                       .src = src.data(),
                       .segments = segments,
                       .num_segments = 2,
                       .row_elements = n},
                      *workers_)
                  .ok());
  std::vector<float> expected = before;
  for (int64_t i = 0; i < 6; ++i) {
    for (int64_t c = 0; c < n; ++c) expected[rows[i] * n + c] += src[i * n + c];
  }
  EXPECT_EQ(dst, expected);
}

// Also rows that are no multiple of a vector, as those of a gate; what lies between rows stays.
TEST_F(GradientsTest, StoreGradient) {
  const int64_t rows = 5;
  const int32_t heads = 2;
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int32_t dim : {3, 64, 300}) {
      for (bool adds : {false, true}) {
        SCOPED_TRACE(testing::Message() << NameOf(dtype) << " " << dim << " " << adds);
        const int64_t head_stride = dim + 2, row_stride = heads * head_stride + 5;
        const std::vector<float> src = Normals(rows * heads * dim);
        const std::vector<float> drawn = Normals(rows * row_stride);
        const std::vector<double> before = test::Rounded(dtype, test::ToDoubles(drawn));
        test::Bytes dst = test::Encode(dtype, before);
        ASSERT_TRUE(StoreGradient({.src = src.data(),
                                   .num_rows = rows,
                                   .num_heads = heads,
                                   .head_dim = dim,
                                   .dst = {dst.data(), row_stride, head_stride},
                                   .dst_dtype = dtype,
                                   .adds = adds},
                                  *workers_)
                        .ok());
        std::vector<double> expected = before;
        for (int64_t i = 0; i < rows * heads * dim; ++i) {
          double& value =
              expected[i / (heads * dim) * row_stride + i / dim % heads * head_stride + i % dim];
          value = adds ? static_cast<float>(value) + src[i] : src[i];
        }
        EXPECT_EQ(test::Decode(dtype, dst), test::Rounded(dtype, expected));
      }
    }
  }
}

}  // namespace
}  // namespace nsa::kernels::cpu
