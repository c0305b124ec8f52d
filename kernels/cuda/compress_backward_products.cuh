// The products of matrices of compress_backward.cu.
#ifndef KERNELS_CUDA_COMPRESS_BACKWARD_PRODUCTS_CUH_
#define KERNELS_CUDA_COMPRESS_BACKWARD_PRODUCTS_CUH_

#include <cstdint>

#include "kernels/cuda/compress_backward_work.cuh"
#include "kernels/cuda/compress_tiles.cuh"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda::compress_backward {

// Tile [kTile rows, kTile columns] of the product of a head.
struct TilePlace {
  int32_t head = -1;  // kv head, or weight head; -1: there are fewer tiles
  int64_t row = 0;
  int64_t column = 0;
};

__device__ TilePlace FindTile(int64_t index, int64_t num_heads, int64_t num_rows,
                              int64_t num_columns) {
  const int64_t row_tiles = (num_rows + kTile - 1) / kTile;
  const int64_t column_tiles = (num_columns + kTile - 1) / kTile;
  const int64_t head =
      row_tiles * column_tiles == 0 ? num_heads : index / (row_tiles * column_tiles);
  if (head >= num_heads) return {};
  return {static_cast<int32_t>(head), index / column_tiles % row_tiles * kTile,
          index % column_tiles * kTile};
}

// The problems below each say what `product [rows,columns] = sum over depth of a * b` is: LoadA and
// LoadB give eight values at an index that is a multiple of eight, along the depth or along rows.

// h = W1 x + b1 and gelu of it: [N,F] of a kv head.
struct HiddenProblem : Context {
  static constexpr bool kADeep = true, kBDeep = true;
  using Tile = TilePlace;
  __device__ bool Find(int64_t index, Tile& tile) const {
    tile = FindTile(index, params.dims.num_kv_heads, params.num_blocks, work.padded_width);
    return tile.head >= 0;
  }
  __device__ int64_t depth() const { return block_values(); }
  __device__ void LoadA(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    if (tile.row + row < params.num_blocks) LoadTokens(tile.head, tile.row + row, k, to);
  }
  __device__ void LoadB(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    const int64_t f = tile.column + row, width = params.weights.hidden_width;
    if (f >= width) return;
    LoadFloats(params.weights.dtype, params.weights.w1,
               (WeightHead(tile.head) * width + f) * block_values() + k, to);
  }
  __device__ void Store(const Tile& tile, int32_t row, int32_t column, float value) const {
    const int64_t block = tile.row + row, f = tile.column + column;
    if (block >= params.num_blocks || f >= work.padded_width) return;
    const int32_t width = params.weights.hidden_width;
    const bool exists = f < width;
    const float h = exists ? value + LoadFloat(params.weights.dtype, params.weights.b1,
                                               WeightHead(tile.head) * int64_t{width} + f)
                           : 0.0f;
    const int64_t place = (tile.head * params.num_blocks + block) * int64_t{work.padded_width} + f;
    work.d_hidden[place] = h;
    work.hidden[place] = exists ? Gelu(h) : 0.0f;
  }
};

// The gradient of h: gelu'(h) * (W2^T dy), [N,F] of a kv head.
struct HiddenGradientProblem : Context {
  static constexpr bool kADeep = true, kBDeep = false;
  using Tile = TilePlace;
  __device__ bool Find(int64_t index, Tile& tile) const {
    tile = FindTile(index, params.dims.num_kv_heads, params.num_blocks, work.padded_width);
    return tile.head >= 0;
  }
  __device__ int64_t depth() const { return params.head_dim; }
  __device__ void LoadA(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    if (tile.row + row >= params.num_blocks) return;
    LoadFloats(DType::kF32, work.dy,
               (tile.head * params.num_blocks + tile.row + row) * params.head_dim + k, to);
  }
  __device__ void LoadB(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    const int64_t width = params.weights.hidden_width, f = tile.column + row;
    const int64_t place = (WeightHead(tile.head) * int64_t{params.head_dim} + k) * width + f;
    for (int i = 0; i < 8 && f + i < width; ++i) {
      to[i] = LoadFloat(params.weights.dtype, params.weights.w2, place + i);
    }
  }
  __device__ void Store(const Tile& tile, int32_t row, int32_t column, float value) const {
    const int64_t block = tile.row + row, f = tile.column + column;
    if (block >= params.num_blocks || f >= work.padded_width) return;
    float& place =
        work.d_hidden[(tile.head * params.num_blocks + block) * int64_t{work.padded_width} + f];
    const float h = place;
    const float density = 0.3989422804014327f * expf(-0.5f * h * h);
    place = value * fmaf(h, density, 0.5f * erfcf(h * -0.70710678118654752f));
  }
};

// The gradient of W2: dy^T gelu(h), [D,F] of a weight head, over blocks.
struct SecondProblem : Context {
  static constexpr bool kADeep = false, kBDeep = false;
  using Tile = TilePlace;
  __device__ bool Find(int64_t index, Tile& tile) const {
    tile = FindTile(index, params.weights.num_heads, params.head_dim, work.padded_width);
    return tile.head >= 0;
  }
  __device__ int64_t depth() const { return rows_per_weight_head(); }
  __device__ void LoadA(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    LoadFloats(DType::kF32, work.dy,
               (tile.head * params.num_blocks + k) * params.head_dim + tile.row + row, to);
  }
  __device__ void LoadB(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    if (tile.column + row >= work.padded_width) return;
    LoadFloats(DType::kF32, work.hidden,
               (tile.head * params.num_blocks + k) * int64_t{work.padded_width} + tile.column + row,
               to);
  }
  __device__ void Store(const Tile& tile, int32_t row, int32_t column, float value) const {
    const int64_t width = params.weights.hidden_width, f = tile.column + column;
    if (f >= width) return;
    params.d_weights.w2[(tile.head * int64_t{params.head_dim} + tile.row + row) * width + f] =
        value;
  }
};

// What the first matrix of a compressor gives, and its gradient.
struct FirstMatrix : Context {
  const void* matrix;    // [H',num_outputs,l*D]
  float* d_matrix;       // likewise
  const float* outputs;  // [Hkv,N,outputs_width] gradients of the outputs
  int32_t num_outputs;
  int32_t outputs_width;  // with zeros past num_outputs
};

// Its own gradient: outputs^T x, [num_outputs,l*D] of a weight head, over blocks.
struct FirstProblem : FirstMatrix {
  static constexpr bool kADeep = false, kBDeep = false;
  using Tile = TilePlace;
  __device__ bool Find(int64_t index, Tile& tile) const {
    tile = FindTile(index, params.weights.num_heads, num_outputs, block_values());
    return tile.head >= 0;
  }
  __device__ int64_t depth() const { return rows_per_weight_head(); }
  __device__ void LoadA(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    if (tile.row + row >= outputs_width) return;
    LoadFloats(DType::kF32, outputs,
               (tile.head * params.num_blocks + k) * int64_t{outputs_width} + tile.row + row, to);
  }
  __device__ void LoadB(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    const int64_t place = tile.head * params.num_blocks + k;
    LoadTokens(static_cast<int32_t>(place / params.num_blocks), place % params.num_blocks,
               tile.column + row, to);
  }
  __device__ void Store(const Tile& tile, int32_t row, int32_t column, float value) const {
    const int64_t o = tile.row + row;
    if (o >= num_outputs) return;
    d_matrix[(tile.head * int64_t{num_outputs} + o) * block_values() + tile.column + column] =
        value;
  }
};

// Gradients of tokens: of token a of 64 strides of a segment, [strides,D] of a kv head. The depth
// is (block of the stride, output).
struct TokensProblem : FirstMatrix {
  static constexpr bool kADeep = true, kBDeep = false;
  struct Tile {
    BlockGroup strides;
    Segment segment;
    int32_t head;
    int32_t token;  // a
    int32_t column;
  };
  __device__ bool Find(int64_t index, Tile& tile) const {
    const int32_t column_tiles = params.head_dim / kTile;
    tile.column = static_cast<int32_t>(index % column_tiles) * kTile;
    index /= column_tiles;
    tile.token = static_cast<int32_t>(index % params.dims.compress_stride_tokens);
    index /= params.dims.compress_stride_tokens;
    tile.head = static_cast<int32_t>(index % params.dims.num_kv_heads);
    tile.strides = FindStrides(params, kTile, index / params.dims.num_kv_heads);
    if (tile.strides.document < 0) return false;
    tile.segment = params.tokens.segments[tile.strides.document];
    return true;
  }
  __device__ int64_t depth() const {
    return int64_t{params.dims.compress_block_tokens / params.dims.compress_stride_tokens} *
           outputs_width;
  }
  __device__ void LoadA(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    const int64_t stride = tile.strides.first_block + row, block = stride - k / outputs_width;
    if (stride >= tile.strides.end_block || block < 0) return;
    const int64_t index = FindBlock(tile.segment.document, block);
    if (index < 0) return;
    LoadFloats(DType::kF32, outputs,
               (tile.head * params.num_blocks + index) * outputs_width + k % outputs_width, to);
  }
  __device__ void LoadB(const Tile& tile, int64_t row, int64_t k, float (&to)[8]) const {
    const int64_t o = k % outputs_width;
    if (o >= num_outputs) return;
    const int64_t j = k / outputs_width * params.dims.compress_stride_tokens + tile.token;
    LoadFloats(params.weights.dtype, matrix,
               (WeightHead(tile.head) * int64_t{num_outputs} + o) * block_values() +
                   j * params.head_dim + tile.column + row,
               to);
  }
  __device__ void Store(const Tile& tile, int32_t row, int32_t column, float value) const {
    const int64_t stride = tile.strides.first_block + row;
    if (stride >= tile.strides.end_block) return;
    float* const to = TokenGradient(
        params, tile.segment, stride * params.dims.compress_stride_tokens + tile.token, tile.head);
    if (to == nullptr) return;
    float& place = to[tile.column + column];
    place = params.d_tokens.adds ? place + value : value;
  }
};

// Brings a 64 x 32 tile of an operand to shared memory; `load` gives eight values.
template <bool kDeep, class Load>
__device__ void LoadOperand(const Load& load, int64_t depth_begin, int64_t depth_end,
                            uint32_t (&to)[kTile][kDepthStride]) {
  float values[8] = {};
  const int32_t row = kDeep ? threadIdx.x / 4 : threadIdx.x % 8 * 8;
  const int32_t k = kDeep ? threadIdx.x % 4 * 8 : threadIdx.x / 8;
  if (depth_begin + k < depth_end) load(row, depth_begin + k, values);
  for (int i = 0; i < 8; ++i) {
    to[kDeep ? row : row + i][kDeep ? k + i : k] = RoundToTf32(values[i]);
  }
}

// Grid: any number of CTAs. A CTA owns every gridDim-th tile of the product.
// Shared memory: one tile of each operand.
template <class Problem>
__global__ void __launch_bounds__(kThreads) ProductKernel(const __grid_constant__ Problem problem) {
  __shared__ uint32_t a[kTile][kDepthStride];
  __shared__ uint32_t b[kTile][kDepthStride];
  typename Problem::Tile tile;
  for (int64_t index = blockIdx.x; problem.Find(index, tile); index += gridDim.x) {
    const int64_t depth = problem.depth();
    Product product = {};
    for (int64_t k = 0; k < depth; k += kDepth) {
      __syncthreads();  // the tiles have been read
      LoadOperand<Problem::kADeep>(
          [&](int64_t row, int64_t at, float(&to)[8]) { problem.LoadA(tile, row, at, to); }, k,
          depth, a);
      LoadOperand<Problem::kBDeep>(
          [&](int64_t row, int64_t at, float(&to)[8]) { problem.LoadB(tile, row, at, to); }, k,
          depth, b);
      __syncthreads();
      MultiplyTiles<kDepth / 8>(a, b, product);
    }
    ForEach(product,
            [&](int row, int column, float value) { problem.Store(tile, row, column, value); });
  }
}

}  // namespace nsa::kernels::cuda::compress_backward

#endif  // KERNELS_CUDA_COMPRESS_BACKWARD_PRODUCTS_CUH_
