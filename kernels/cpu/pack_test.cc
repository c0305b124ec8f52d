#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/workers.h"

namespace nsa::kernels::cpu {
namespace {

// Every element is a number of its own: token, head and dim can be read off it.
template <class Bits>
void ExpectRecords(DType dtype) {
  AttentionDims dims{};
  dims.dtype = dtype;
  dims.num_kv_heads = 2;
  dims.head_dim_qk = 64;
  dims.head_dim_v = 128;
  dims.select_block_tokens = 48;
  // 100 tokens: the third block ends with 44 that do not exist. Tokens 30 to 79 come from the halo.
  const Document document{.token_begin = 0,
                          .num_tokens = 100,
                          .cmp_block_begin = 0,
                          .num_cmp_blocks = 0,
                          .slc_block_begin = 0,
                          .num_slc_blocks = 3};
  const Segment segments[] = {{0, 30, 0, 0, 0}, {0, 50, 30, 0, 1}, {30, 20, 80, 0, 0}};
  const auto value = [](int64_t token, int64_t head, int64_t i) {
    return static_cast<Bits>(1 + token * 512 + head * 256 + i);
  };
  const auto tensor = [&](int64_t dim, bool is_halo) {
    std::vector<Bits> rows(50 * 2 * dim, Bits{0xffff});
    for (const Segment& segment : segments) {
      if ((segment.is_halo != 0) != is_halo) continue;
      for (int64_t t = 0; t < segment.num_tokens; ++t) {
        for (int64_t head = 0; head < 2; ++head) {
          for (int64_t i = 0; i < dim; ++i) {
            rows[((segment.row + t) * 2 + head) * dim + i] = value(segment.position + t, head, i);
          }
        }
      }
    }
    return rows;
  };
  const auto k_own = tensor(64, false), k_halo = tensor(64, true);
  const auto v_own = tensor(128, false), v_halo = tensor(128, true);
  const BlockRun runs[] = {{0, 2, 1}, {0, 0, 2}};  // blocks 2, 0, 1
  const int64_t blocks[] = {2, 0, 1};
  const int64_t record_values = 48 * (64 + 128);
  ASSERT_EQ(RecordBytes(dims), record_values * static_cast<int64_t>(sizeof(Bits)));
  std::vector<Bits> records(2 * 3 * record_values, Bits{0xffff});
  auto workers = Workers::Create(2);
  ASSERT_TRUE(workers.ok());
  const absl::Status status = PackBlocks({.dims = dims,
                                          .k = {.own = {k_own.data(), 128, 64},
                                                .halo = {k_halo.data(), 128, 64},
                                                .segments = segments,
                                                .num_segments = 3},
                                          .v = {.own = {v_own.data(), 256, 128},
                                                .halo = {v_halo.data(), 256, 128},
                                                .segments = segments,
                                                .num_segments = 3},
                                          .documents = &document,
                                          .runs = runs,
                                          .num_runs = 2,
                                          .num_blocks = 3,
                                          .records = records.data()},
                                         **workers);
  ASSERT_TRUE(status.ok());
  for (int64_t head = 0; head < 2; ++head) {
    for (int64_t b = 0; b < 3; ++b) {
      const Bits* const k = records.data() + (head * 3 + b) * record_values;
      const Bits* const v = k + 64 * 48;
      for (int64_t t = 0; t < 48; ++t) {
        const int64_t token = blocks[b] * 48 + t;
        const bool exists = token < 100;
        for (int64_t i = 0; i < 64; ++i) {
          ASSERT_EQ(k[i * 48 + t], exists ? value(token, head, i) : 0) << token;
        }
        for (int64_t i = 0; i < 128; ++i) {
          ASSERT_EQ(v[t * 128 + i], exists ? value(token, head, i) : 0) << token;
        }
      }
    }
  }
}

TEST(PackTest, RecordsOfShortTypes) { ExpectRecords<uint16_t>(DType::kBF16); }
TEST(PackTest, RecordsOfFloat) { ExpectRecords<uint32_t>(DType::kF32); }

TEST(PackTest, NoBlocks) {
  AttentionDims dims{};
  dims.num_kv_heads = 2;
  auto workers = Workers::Create(2);
  ASSERT_TRUE(workers.ok());
  EXPECT_TRUE(PackBlocks({.dims = dims,
                          .k = {},
                          .v = {},
                          .documents = nullptr,
                          .runs = nullptr,
                          .num_runs = 0,
                          .num_blocks = 0,
                          .records = nullptr},
                         **workers)
                  .ok());
}

TEST(CopyRowsTest, TakesRowsOfSegmentsInOrder) {
  // [6 rows, 2 heads, 2 values], heads 3 and rows 8 elements apart.
  std::vector<uint16_t> src(6 * 8);
  for (size_t i = 0; i < src.size(); ++i) src[i] = static_cast<uint16_t>(i);
  const Segment segments[] = {{4, 1, 0, 0, 0}, {1, 2, 0, 0, 0}};
  std::vector<uint16_t> dst(12, 0xffff);
  CopyRows({.dtype = DType::kF16,
            .num_heads = 2,
            .head_dim = 2,
            .src = {src.data(), 8, 3},
            .segments = segments,
            .num_segments = 2,
            .dst = dst.data()});
  EXPECT_EQ(dst, (std::vector<uint16_t>{32, 33, 35, 36, 8, 9, 11, 12, 16, 17, 19, 20}));
}

}  // namespace
}  // namespace nsa::kernels::cpu
