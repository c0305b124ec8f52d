// The vector code of this backend: everything that is compiled once per instruction set and chosen
// when the program runs. Stages are ordinary C++ that calls these on tiles in cache.
//
// Bits. Every function treats the rows of a tile alike and apart: what a row becomes does not
// depend on how many rows are passed with it, and sums over keys run either one after another or in
// kLanes lanes that are added in a fixed order, whatever the vector's width. AVX2 and AVX-512 give
// the same bits; a host without FMA gives others, the same on every such host.
#ifndef KERNELS_CPU_TILE_OPS_H_
#define KERNELS_CPU_TILE_OPS_H_

#include <cstdint>

#include "kernels/types.h"

namespace nsa::kernels::cpu {

// Lanes of every horizontal sum; also what tile widths and head dims are multiples of.
constexpr int32_t kLanes = 16;
// Keys (tokens or summaries) of a tile, counted from the document's first.
constexpr int32_t kTileKeys = 64;

// ------------------------------------------------------------------ conversion, tile_convert-inl.h

// `count` is a multiple of kLanes.
void ToFloat(DType dtype, const void* src, int64_t count, float* dst);
// Nearest, ties to even. Minus zero becomes plus zero: sums that differ only in how many zeros they
// added agree then bit for bit.
void FromFloat(DType dtype, const float* src, int64_t count, void* dst);
// dst[i * kTileKeys + r] = rows[r][i] for r < num_rows, i < count; 0 for the r up to the next
// multiple of kLanes and for a null row. num_rows is at most kTileKeys.
void TransposeToFloat(DType dtype, const void* const* rows, int32_t num_rows, int64_t count,
                      float* dst);

// ---------------------------------------------------------------------------- rows,
// tile_rows-inl.h

// dst += factor * src
void AddScaled(const float* src, int64_t count, float factor, float* dst);
// dst *= factor
void Scale(float factor, int64_t count, float* dst);
// Largest of x[0, count), count >= 1.
float MaxOf(const float* x, int64_t count);
// x[i] = exp(x[i] - max) for i < count and 0 for count <= i < width; adds lane i % kLanes into
// sums. width is a multiple of kLanes and max at least as large as each x[i].
void ExpAndSum(float* x, int32_t width, int32_t count, float max, float* sums);
// Sum of the kLanes lanes, as a tree.
float SumOfLanes(const float* lanes);
// lanes[i % kLanes] += a[i] * b[i]. count is a multiple of kLanes.
void AddProducts(const float* a, const float* b, int64_t count, float* lanes);

// ----------------------------------------------------------------------- product,
// tile_matmul-inl.h

// Row-major matrices: a [rows, depth], b [depth, cols], c [rows, cols]; strides in elements; cols a
// multiple of kLanes. Each element is one chain of fused multiply-adds over ascending depth.
struct MatMulArgs {
  const float* a;
  int64_t a_stride;
  int64_t a_depth_stride = 1;  // along a row of a: a transposed matrix is read in place
  const float* b;
  int64_t b_stride;
  float* c;
  int64_t c_stride;
  int64_t rows;
  int64_t depth;
  int64_t cols;
};
// c = factor * (a b)
void MatMul(const MatMulArgs& args, float factor);
// c = c + a b
void MatMulAdd(const MatMulArgs& args);

// ---------------------------------------------------------------- attention, tile_attention-inl.h

// Rows of an online softmax; a row is one query of one head.
struct SoftmaxRows {
  int32_t head_dim_qk;  // Dk
  int32_t head_dim_v;   // Dv
  float scale;
  const float* q;  // [rows,Dk]
  float* o;        // [rows,Dv] not yet divided by the sum
  float* max;      // [rows] largest logit so far
  float* sums;     // [rows,kLanes] sum of exp(logit - max) so far
};

// Keys and values, ready for the product.
struct KeyTile {
  const float* keys;    // [Dk,width] a column is a key
  int64_t key_stride;   // in elements, of a row of `keys`
  const float* values;  // [width,Dv] dense
  int32_t width;        // multiple of kLanes, at most kTileKeys
};

// The keys [begin, end) of a tile that a row sees; at least one in AttendTile.
struct VisibleKeys {
  int32_t begin;
  int32_t end;
};

// Starts a softmax over no key.
void ResetRows(const SoftmaxRows& rows, int64_t num_rows);
// Adds a tile's keys to rows [row_begin, row_begin + num_rows), of which row row_begin + i sees
// visible[i].
void AttendTile(const SoftmaxRows& rows, int64_t row_begin, int64_t num_rows, const KeyTile& tile,
                const VisibleKeys* visible);
// Divides by the sum, and returns the natural log of it: the row's LSE. -inf, and o = 0, for a row
// without keys.
float FinishRow(const SoftmaxRows& rows, int64_t row);

// What the backward knows of a row.
struct RowOutputs {
  float lse;  // +inf for a row without keys
  float gate;
  float delta;  // gate * (dO . o)
};

// One row and tile of the backward. With P = exp(logit - lse) of the visible keys and 0 of the
// others: p, the logits, becomes gate * P; ds, the values' products with dO, becomes the gradient
// of q.k, scale * P * (gate * ds - delta).
void SoftmaxBackward(float* p, float* ds, int32_t width, VisibleKeys visible, const RowOutputs& row,
                     float scale);

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_TILE_OPS_H_
