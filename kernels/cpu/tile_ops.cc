#include "kernels/cpu/tile_ops.h"

#include <algorithm>
#include <cmath>
#include <limits>

// AVX-512, AVX2 and the baseline; the instruction sets between them would only add compile time.
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/tile_ops.cc"
#include "hwy/foreach_target.h"
// After foreach_target.h, which includes this file again for each instruction set.
#include "hwy/highway.h"
#include "kernels/cpu/tile_attention-inl.h"
#include "kernels/cpu/tile_convert-inl.h"
#include "kernels/cpu/tile_matmul-inl.h"
#include "kernels/cpu/tile_rows-inl.h"

#if HWY_ONCE
namespace nsa::kernels::cpu {

HWY_EXPORT(ToFloat);
HWY_EXPORT(FromFloat);
HWY_EXPORT(TransposeToFloat);
HWY_EXPORT(AddScaled);
HWY_EXPORT(Scale);
HWY_EXPORT(MaxOf);
HWY_EXPORT(ExpAndSum);
HWY_EXPORT(AddProducts);
HWY_EXPORT(MatMul);
HWY_EXPORT(MatMulAdd);
HWY_EXPORT(AttendTile);
HWY_EXPORT(SoftmaxBackward);

void ToFloat(DType dtype, const void* src, int64_t count, float* dst) {
  HWY_DYNAMIC_DISPATCH(ToFloat)(dtype, src, count, dst);
}

void FromFloat(DType dtype, const float* src, int64_t count, void* dst) {
  HWY_DYNAMIC_DISPATCH(FromFloat)(dtype, src, count, dst);
}

void TransposeToFloat(DType dtype, const void* const* rows, int32_t num_rows, int64_t count,
                      float* dst) {
  HWY_DYNAMIC_DISPATCH(TransposeToFloat)(dtype, rows, num_rows, count, dst);
}

void AddScaled(const float* src, int64_t count, float factor, float* dst) {
  HWY_DYNAMIC_DISPATCH(AddScaled)(src, count, factor, dst);
}

void Scale(float factor, int64_t count, float* dst) {
  HWY_DYNAMIC_DISPATCH(Scale)(factor, count, dst);
}

float MaxOf(const float* x, int64_t count) { return HWY_DYNAMIC_DISPATCH(MaxOf)(x, count); }

void ExpAndSum(float* x, int32_t width, int32_t count, float max, float* sums) {
  HWY_DYNAMIC_DISPATCH(ExpAndSum)(x, width, count, max, sums);
}

float SumOfLanes(const float* lanes) {
  float sum[kLanes];
  std::copy(lanes, lanes + kLanes, sum);
  for (int32_t half = kLanes / 2; half > 0; half /= 2) {
    for (int32_t i = 0; i < half; ++i) sum[i] += sum[i + half];
  }
  return sum[0];
}

void AddProducts(const float* a, const float* b, int64_t count, float* lanes) {
  HWY_DYNAMIC_DISPATCH(AddProducts)(a, b, count, lanes);
}

void MatMul(const MatMulArgs& args, float factor) { HWY_DYNAMIC_DISPATCH(MatMul)(args, factor); }

void MatMulAdd(const MatMulArgs& args) { HWY_DYNAMIC_DISPATCH(MatMulAdd)(args); }

void ResetRows(const SoftmaxRows& rows, int64_t num_rows) {
  std::fill_n(rows.o, num_rows * rows.head_dim_v, 0.0f);
  std::fill_n(rows.max, num_rows, -std::numeric_limits<float>::infinity());
  std::fill_n(rows.sums, num_rows * kLanes, 0.0f);
}

void AttendTile(const SoftmaxRows& rows, int64_t row_begin, int64_t num_rows, const KeyTile& tile,
                const VisibleKeys* visible) {
  HWY_DYNAMIC_DISPATCH(AttendTile)(rows, row_begin, num_rows, tile, visible);
}

void SoftmaxBackward(float* p, float* ds, int32_t width, VisibleKeys visible, const RowOutputs& row,
                     float scale) {
  HWY_DYNAMIC_DISPATCH(SoftmaxBackward)(p, ds, width, visible, row, scale);
}

float FinishRow(const SoftmaxRows& rows, int64_t row) {
  const float sum = SumOfLanes(rows.sums + row * kLanes);
  if (sum == 0.0f) return -std::numeric_limits<float>::infinity();
  Scale(1.0f / sum, rows.head_dim_v, rows.o + row * rows.head_dim_v);
  return static_cast<float>(rows.max[row] + std::log(static_cast<double>(sum)));
}

}  // namespace nsa::kernels::cpu
#endif  // HWY_ONCE
