// The product behind every stage: a few rows times a panel of columns, held in registers. Included
// once per instruction set: see tile_ops.cc.
#if defined(KERNELS_CPU_TILE_MATMUL_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KERNELS_CPU_TILE_MATMUL_INL_H_
#undef KERNELS_CPU_TILE_MATMUL_INL_H_
#else
#define KERNELS_CPU_TILE_MATMUL_INL_H_
#endif

#include <algorithm>
#include <cstdint>

#include "hwy/highway.h"
#include "kernels/cpu/tile_ops.h"

HWY_BEFORE_NAMESPACE();
namespace nsa::kernels::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Rows of the register block, and vectors across: with 32 registers 6 x 4 accumulators leave room
// for the panel's 4 vectors and a broadcast, with 16 registers 6 x 2 do.
constexpr int32_t kBlockRows = 6;
#if HWY_TARGET == HWY_AVX3
constexpr int32_t kBlockVectors = 4;
#else
constexpr int32_t kBlockVectors = 2;
#endif

// What becomes of a finished sum: how it enters c.
struct StoreScaled {  // c = factor * sum
  float factor;
  template <class D>
  HWY_INLINE void operator()(D d, int32_t, hn::Vec<D> sum, float* c) const {
    hn::StoreU(hn::Mul(sum, hn::Set(d, factor)), d, c);
  }
};

struct StoreAdded {  // c = c + sum
  template <class D>
  HWY_INLINE void operator()(D d, int32_t, hn::Vec<D> sum, float* c) const {
    hn::StoreU(hn::Add(hn::LoadU(d, c), sum), d, c);
  }
};

struct StoreRescaled {  // c = factors[row] * c + sum
  const float* factors;
  template <class D>
  HWY_INLINE void operator()(D d, int32_t row, hn::Vec<D> sum, float* c) const {
    hn::StoreU(hn::MulAdd(hn::LoadU(d, c), hn::Set(d, factors[row]), sum), d, c);
  }
};

// Rows of a and c start at the block's first; b and c at its first column.
template <int32_t kRows, int32_t kVectors, class Store>
HWY_INLINE void MatMulBlock(const MatMulArgs& args, const float* HWY_RESTRICT b,
                            float* HWY_RESTRICT c, const Store& store) {
  const hn::CappedTag<float, kLanes> d;
  using V = hn::Vec<decltype(d)>;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float* HWY_RESTRICT a = args.a;
  const int64_t a_stride = args.a_stride;
  const int64_t a_depth_stride = args.a_depth_stride;
  V sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int32_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int32_t v = 0; v < kVectors; ++v) sum[r][v] = hn::Zero(d);
  }
  for (int64_t k = 0; k < args.depth; ++k) {
    V panel[kVectors];
#pragma GCC unroll 8
    for (int32_t v = 0; v < kVectors; ++v) panel[v] = hn::LoadU(d, b + v * lanes);
#pragma GCC unroll 8
    for (int32_t r = 0; r < kRows; ++r) {
      const V value = hn::Set(d, a[r * a_stride + k * a_depth_stride]);
#pragma GCC unroll 8
      for (int32_t v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(value, panel[v], sum[r][v]);
    }
    b += args.b_stride;
  }
#pragma GCC unroll 8
  for (int32_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int32_t v = 0; v < kVectors; ++v) {
      store(d, r, sum[r][v], c + r * args.c_stride + v * lanes);
    }
  }
}

// All columns of at most kBlockRows rows.
template <int32_t kRows, class Store>
HWY_NOINLINE void MatMulRowsOf(const MatMulArgs& args, const Store& store) {
  const hn::CappedTag<float, kLanes> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t col = 0;
  for (; col + kBlockVectors * lanes <= args.cols; col += kBlockVectors * lanes) {
    MatMulBlock<kRows, kBlockVectors>(args, args.b + col, args.c + col, store);
  }
  for (; col < args.cols; col += lanes) {
    MatMulBlock<kRows, 1>(args, args.b + col, args.c + col, store);
  }
}

template <class Store>
HWY_INLINE void MatMulRows(const MatMulArgs& args, const Store& store) {
  switch (args.rows) {
    case 1:
      return MatMulRowsOf<1>(args, store);
    case 2:
      return MatMulRowsOf<2>(args, store);
    case 3:
      return MatMulRowsOf<3>(args, store);
    case 4:
      return MatMulRowsOf<4>(args, store);
    case 5:
      return MatMulRowsOf<5>(args, store);
    case 6:
      return MatMulRowsOf<6>(args, store);
  }
}

// How many of `rows` remaining rows the next block takes: as even as the remainder allows, since
// blocks of few rows wait for the adders.
HWY_INLINE int64_t RowsOfNextBlock(int64_t rows) {
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  return (rows + blocks - 1) / blocks;
}

template <class Store>
HWY_INLINE void MatMulAllRows(const MatMulArgs& args, const Store& store) {
  MatMulArgs block = args;
  for (int64_t row = 0; row < args.rows; row += block.rows) {
    block.rows = RowsOfNextBlock(args.rows - row);
    block.a = args.a + row * args.a_stride;
    block.c = args.c + row * args.c_stride;
    MatMulRows(block, store);
  }
}

void MatMul(const MatMulArgs& args, float factor) { MatMulAllRows(args, StoreScaled{factor}); }

void MatMulAdd(const MatMulArgs& args) { MatMulAllRows(args, StoreAdded{}); }

// NOLINTNEXTLINE(google-readability-namespace-comments)
}  // namespace HWY_NAMESPACE
}  // namespace nsa::kernels::cpu
HWY_AFTER_NAMESPACE();

#endif  // KERNELS_CPU_TILE_MATMUL_INL_H_
