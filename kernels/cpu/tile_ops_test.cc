// The vector code with every instruction set that this host has.
#include "kernels/cpu/tile_ops.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/float_types.h"
#include "kernels/cpu/instruction_set.h"
#include "tests/testing/numeric.h"
#include "tests/testing/random.h"

namespace nsa::kernels::cpu {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> Normals(int64_t count, test::Random& random) {
  std::vector<float> values(count);
  for (float& x : values) x = static_cast<float>(random.Normal());
  return values;
}

class TileOpsTest : public ::testing::TestWithParam<int64_t> {
 protected:
  ScopedInstructionSet instruction_set_{GetParam()};
  test::Random random_{1};
};

TEST_P(TileOpsTest, EveryValueOfTheShortTypesConverts) {
  std::vector<uint16_t> bits(1 << 16);
  for (int i = 0; i < 1 << 16; ++i) bits[i] = static_cast<uint16_t>(i);
  std::vector<float> values(bits.size(), kNan);
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    ToFloat(dtype, bits.data(), values.size(), values.data());
    for (size_t i = 0; i < bits.size(); ++i) {
      const float expected =
          dtype == DType::kBF16 ? test::FloatFromBF16(bits[i]) : test::FloatFromF16(bits[i]);
      const float scalar = LoadFloat(dtype, bits.data(), i);
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(values[i]) && std::isnan(scalar)) << i;
      } else {
        ASSERT_EQ(std::bit_cast<uint32_t>(values[i]), std::bit_cast<uint32_t>(expected)) << i;
        ASSERT_EQ(std::bit_cast<uint32_t>(scalar), std::bit_cast<uint32_t>(expected)) << i;
      }
    }
  }
}

TEST_P(TileOpsTest, RoundsToNearestEven) {
  std::vector<float> values;
  for (int i = 0; i < 1 << 16; ++i) {
    // Around every value of either type, the half way points included.
    for (float x : {test::FloatFromBF16(i), test::FloatFromF16(i)}) {
      const uint32_t bits = std::bit_cast<uint32_t>(x);
      for (uint32_t offset : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u}) {
        values.push_back(std::bit_cast<float>(bits + offset));
      }
    }
  }
  for (int i = 0; i < 1 << 16; ++i) {
    values.push_back(std::bit_cast<float>(static_cast<uint32_t>(random_.Next())));
  }
  std::vector<uint16_t> bits(values.size());
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    FromFloat(dtype, values.data(), values.size(), bits.data());
    for (size_t i = 0; i < values.size(); ++i) {
      const float x = values[i] + 0.0f;
      if (std::isnan(x)) {
        ASSERT_TRUE(std::isnan(LoadFloat(dtype, bits.data(), i))) << x;
        continue;
      }
      const uint16_t expected =
          dtype == DType::kBF16 ? test::BF16FromFloat(x) : test::F16FromFloat(x);
      ASSERT_EQ(bits[i], expected) << NameOf(dtype) << " " << x;
    }
  }
}

TEST_P(TileOpsTest, NoMinusZeroIsStored) {
  const std::vector<float> zeros(kLanes, -0.0f);
  std::vector<uint32_t> bits(kLanes, 1);
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    FromFloat(dtype, zeros.data(), kLanes, bits.data());
    for (int i = 0; i < kLanes; ++i) {
      EXPECT_FALSE(std::signbit(LoadFloat(dtype, bits.data(), i))) << NameOf(dtype);
    }
  }
}

TEST_P(TileOpsTest, Transposes) {
  for (int32_t num_rows : {1, 3, 16, 17, 63, 64}) {
    for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
      const int64_t count = 64;
      std::vector<double> values(num_rows * count);
      for (double& x : values) x = random_.Normal();
      values = test::Rounded(dtype, values);
      const test::Bytes bytes = test::Encode(dtype, values);
      std::vector<const void*> rows(num_rows);
      for (int32_t r = 0; r < num_rows; ++r) {
        rows[r] = r % 5 == 2 ? nullptr : bytes.data() + r * count * SizeOf(dtype);
      }
      std::vector<float> out(count * kTileKeys, kNan);
      TransposeToFloat(dtype, rows.data(), num_rows, count, out.data());
      for (int64_t i = 0; i < count; ++i) {
        for (int32_t r = 0; r < (num_rows + 15) / 16 * 16; ++r) {
          const bool is_set = r < num_rows && rows[r] != nullptr;
          ASSERT_EQ(out[i * kTileKeys + r], is_set ? values[r * count + i] : 0.0) << r << " " << i;
        }
      }
    }
  }
}

TEST_P(TileOpsTest, MultipliesRowsApart) {
  const int64_t depth = 77;
  for (int64_t cols : {16, 48, 64, 192}) {
    const int64_t rows = 13;
    const std::vector<float> a = Normals(rows * depth, random_);
    const std::vector<float> b = Normals(depth * cols, random_);
    const std::vector<float> before = Normals(rows * cols, random_);
    const auto args = [&](int64_t row, int64_t num_rows, std::vector<float>& c) {
      return MatMulArgs{.a = a.data() + row * depth,
                        .a_stride = depth,
                        .b = b.data(),
                        .b_stride = cols,
                        .c = c.data() + row * cols,
                        .c_stride = cols,
                        .rows = num_rows,
                        .depth = depth,
                        .cols = cols};
    };
    std::vector<float> scaled(rows * cols, kNan), added = before;
    MatMul(args(0, rows, scaled), 0.25f);
    MatMulAdd(args(0, rows, added));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        double sum = 0.0;
        for (int64_t k = 0; k < depth; ++k) sum += double{a[r * depth + k]} * b[k * cols + c];
        ASSERT_NEAR(scaled[r * cols + c], 0.25 * sum, 3e-5);
        ASSERT_NEAR(added[r * cols + c], before[r * cols + c] + sum, 3e-5);
      }
    }
    for (int64_t num_rows = 1; num_rows <= 7; ++num_rows) {
      std::vector<float> pieces(rows * cols, kNan), added_pieces = before;
      for (int64_t row = 0; row < rows; row += num_rows) {
        MatMul(args(row, std::min(num_rows, rows - row), pieces), 0.25f);
        MatMulAdd(args(row, std::min(num_rows, rows - row), added_pieces));
      }
      EXPECT_EQ(std::memcmp(pieces.data(), scaled.data(), scaled.size() * 4), 0) << num_rows;
      EXPECT_EQ(std::memcmp(added_pieces.data(), added.data(), added.size() * 4), 0) << num_rows;
    }
  }
}

TEST_P(TileOpsTest, ExpIsAccurate) {
  double worst = 0.0;
  for (int i = 0; i < 20000; ++i) {
    std::vector<float> x(kLanes), sums(kLanes, 0.0f);
    for (float& v : x) v = static_cast<float>(-87.2 * random_.Uniform() * random_.Uniform());
    const std::vector<float> before = x;
    ExpAndSum(x.data(), kLanes, kLanes, 0.0f, sums.data());
    for (int k = 0; k < kLanes; ++k) {
      const double expected = std::exp(double{before[k]});
      worst = std::max(worst, std::fabs(x[k] - expected) / expected);
    }
  }
  EXPECT_LT(worst, 1.2e-7);
}

TEST_P(TileOpsTest, ExpAndSum) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int32_t count : {1, 15, 16, 17, 40, 48}) {
    std::vector<float> x = Normals(48, random_), sums(kLanes);
    for (int i = 0; i < kLanes; ++i) sums[i] = static_cast<float>(i);
    x[0] = 50.0f;
    if (count > 2) x[1] = -infinity, x[2] = -1e30f;
    const std::vector<float> before = x;
    ExpAndSum(x.data(), 48, count, 50.0f, sums.data());
    EXPECT_EQ(x[0], 1.0f);
    std::vector<double> expected_sums(kLanes);
    for (int i = 0; i < kLanes; ++i) expected_sums[i] = i;
    for (int32_t i = 0; i < 48; ++i) {
      const double expected = i < count ? std::exp(double{before[i] - 50.0f}) : 0.0;
      EXPECT_NEAR(x[i], expected, 1e-6 * expected);
      expected_sums[i % kLanes] += expected;
    }
    for (int i = 0; i < kLanes; ++i) EXPECT_NEAR(sums[i], expected_sums[i], 1e-5);
  }
}

TEST_P(TileOpsTest, Rows) {
  for (int64_t count : {1, 5, 16, 50, 64}) {
    const std::vector<float> x = Normals(count, random_);
    EXPECT_EQ(MaxOf(x.data(), count), *std::max_element(x.begin(), x.end()));
  }
  std::vector<float> lanes(kLanes);
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i * i);
  EXPECT_EQ(SumOfLanes(lanes.data()), 1240.0f);
  std::vector<float> dst(32, 2.0f);
  AddScaled(std::vector<float>(32, 3.0f).data(), 32, 0.5f, dst.data());
  Scale(4.0f, 32, dst.data());
  EXPECT_EQ(dst, std::vector<float>(32, 14.0f));
}

TEST_P(TileOpsTest, RowsWithoutKeys) {
  std::vector<float> q(64), o(64, kNan), max(1, kNan), sums(kLanes, kNan);
  const SoftmaxRows rows{.head_dim_qk = 64,
                         .head_dim_v = 64,
                         .scale = 1.0f,
                         .q = q.data(),
                         .o = o.data(),
                         .max = max.data(),
                         .sums = sums.data()};
  ResetRows(rows, 1);
  EXPECT_EQ(FinishRow(rows, 0), -std::numeric_limits<float>::infinity());
  EXPECT_EQ(o, std::vector<float>(64, 0.0f));
}

TEST_P(TileOpsTest, TransposedMatrixIsMultipliedInPlace) {
  const int64_t rows = 13, depth = 37, cols = 48;
  const std::vector<float> a = Normals(depth * rows, random_), b = Normals(depth * cols, random_);
  std::vector<float> transposed(rows * depth);
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t r = 0; r < rows; ++r) transposed[r * depth + k] = a[k * rows + r];
  }
  std::vector<float> c(rows * cols, 1.0f), expected = c;
  MatMulArgs args{.a = transposed.data(),
                  .a_stride = depth,
                  .b = b.data(),
                  .b_stride = cols,
                  .c = expected.data(),
                  .c_stride = cols,
                  .rows = rows,
                  .depth = depth,
                  .cols = cols};
  MatMulAdd(args);
  args.a = a.data();
  args.a_stride = 1;
  args.a_depth_stride = rows;
  args.c = c.data();
  MatMulAdd(args);
  EXPECT_EQ(c, expected);
}

TEST_P(TileOpsTest, ProductsAddUpInLanes) {
  const std::vector<float> a = Normals(320, random_), b = Normals(320, random_);
  std::vector<float> lanes(kLanes, 0.5f);
  AddProducts(a.data(), b.data(), 320, lanes.data());
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    double expected = 0.5;
    for (int32_t i = lane; i < 320; i += kLanes) expected += double(a[i]) * b[i];
    EXPECT_NEAR(lanes[lane], expected, 1e-5);
  }
}

TEST_P(TileOpsTest, SoftmaxBackward) {
  constexpr int32_t kWidth = 48;
  const std::vector<float> logits = Normals(kWidth, random_), dp = Normals(kWidth, random_);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const VisibleKeys visible : {VisibleKeys{0, kWidth}, {5, 6}, {17, 40}, {7, 7}}) {
    for (const float lse : {3.0f, infinity}) {
      std::vector<float> p = logits, ds = dp;
      SoftmaxBackward(p.data(), ds.data(), kWidth, visible,
                      {.lse = lse, .gate = 0.7f, .delta = 0.3f}, 0.125f);
      for (int32_t i = 0; i < kWidth; ++i) {
        if (i < visible.begin || i >= visible.end || lse == infinity) {
          EXPECT_EQ(p[i], 0.0f) << i;
          EXPECT_EQ(ds[i], 0.0f) << i;
          continue;
        }
        const double probability = std::exp(double(logits[i]) - lse);
        EXPECT_NEAR(p[i], 0.7 * probability, 1e-7) << i;
        EXPECT_NEAR(ds[i], 0.125 * probability * (0.7 * dp[i] - 0.3), 1e-7) << i;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(InstructionSets, TileOpsTest, ::testing::ValuesIn(InstructionSets()),
                         [](const auto& info) { return NameOfInstructionSet(info.param); });

}  // namespace
}  // namespace nsa::kernels::cpu
