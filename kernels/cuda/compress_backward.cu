// The backward of all compressors.
//
// Tokens are given their gradients stride by stride: the d tokens of a stride lie in the same
// blocks, l / d of them, whose shares are summed from the last block to the first. Matrices, and
// gradients of them, are products of 64 x 64 tiles; each tile, and each sum over the blocks of the
// runs, has one CTA, and is summed over blocks in the order of kv heads and runs.
#include "kernels/cuda/compress_tiles.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kCtasPerSm = 8;

// A compression block of the runs.
struct BlockPlace {
  int32_t document;
  int32_t block;  // counted in the document
};

// The scratch, for the compressors that have parameters. N blocks of the runs, in their order.
struct Work {
  BlockPlace* blocks;  // [N]
  float* dy;           // [Hkv,N,D] of the summaries
  float* hidden;       // [Hkv,N,Fp] gelu(h), Fp the hidden width rounded up to whole kDepth
  float* d_hidden;     // [Hkv,N,Fp] h, then its gradient
  float* sums;         // [Hkv,max(D,Fp)] over blocks
  int32_t padded_width;
};

int64_t PlaceWork(int32_t num_heads, int32_t head_dim, Compressor compressor, int32_t hidden_width,
                  int64_t num_blocks, char* scratch, Work* work) {
  int64_t num_bytes = 0;
  const auto place = [&](auto*& pointer, int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<Element*>(scratch + num_bytes);
    num_bytes += (count * int64_t{sizeof(Element)} + 255) / 256 * 256;
  };
  *work = {};
  if (compressor == Compressor::kMean) return 0;
  const bool is_mlp = compressor == Compressor::kMlp;
  work->padded_width = is_mlp ? (hidden_width + kDepth - 1) / kDepth * kDepth : 0;
  const int64_t rows = num_heads * num_blocks;
  place(work->blocks, num_blocks);
  place(work->dy, rows * head_dim);
  place(work->hidden, rows * work->padded_width);
  place(work->d_hidden, rows * work->padded_width);
  place(work->sums,
        num_heads * int64_t{head_dim > work->padded_width ? head_dim : work->padded_width});
  return num_bytes;
}

struct Context {
  CompressBackwardParams params;
  Work work;

  __device__ int64_t block_values() const {
    return int64_t{params.dims.compress_block_tokens} * params.head_dim;
  }
  // Of a kv head's parameters.
  __device__ int32_t WeightHead(int32_t head) const {
    return params.weights.num_heads == 1 ? 0 : head;
  }
  // Rows of [Hkv,N,.] that share the parameters of a weight head: from weight_head * N on.
  __device__ int64_t rows_per_weight_head() const {
    return params.num_blocks * (params.dims.num_kv_heads / params.weights.num_heads);
  }
  // Eight values of x + pe, from value `k` of block `block` on: of token k / D of it.
  __device__ void LoadTokens(int32_t head, int64_t block, int64_t k, float (&to)[8]) const {
    const int32_t j = static_cast<int32_t>(k / params.head_dim);
    const BlockPlace place = work.blocks[block];
    const int64_t position = int64_t{place.block} * params.dims.compress_stride_tokens + j;
    const TokenRun run = FindTokens(params.tokens, 2, place.document, position, head);
    for (float& value : to) value = 0.0f;
    if (run.rows != nullptr) LoadFloats(params.dims.dtype, run.rows, k % params.head_dim, to);
    if (params.weights.pe != nullptr) {
      float pe[8];
      LoadFloats(params.weights.dtype, params.weights.pe, WeightHead(head) * block_values() + k,
                 pe);
      for (int i = 0; i < 8; ++i) to[i] += pe[i];
    }
  }
  // Index in the runs' order; -1: no run has the block.
  __device__ int64_t FindBlock(int32_t document, int64_t block) const {
    int64_t low = 0, high = params.num_blocks;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      const BlockPlace place = work.blocks[middle];
      const bool before =
          place.document != document ? place.document < document : place.block < block;
      if (before) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    const bool found = low < params.num_blocks && work.blocks[low].document == document &&
                       work.blocks[low].block == block;
    return found ? low : -1;
  }
};

// Strides [first_block, end_block) of a segment, whose number stands for the document.
__device__ BlockGroup FindStrides(const CompressBackwardParams& params, int32_t group,
                                  int64_t index) {
  const auto run_at = [&](int32_t i) {
    const Segment segment = params.tokens.segments[i];
    const int64_t stride = params.dims.compress_stride_tokens;
    const int64_t first = segment.position / stride;
    const int64_t end = (segment.position + segment.num_tokens + stride - 1) / stride;
    return BlockRun{i, first, segment.num_tokens > 0 ? end - first : 0};
  };
  return FindGroup(run_at, params.tokens.num_segments, group, index);
}

// Of a token of a segment; null when it is not in the segment.
__device__ float* TokenGradient(const CompressBackwardParams& params, const Segment& segment,
                                int64_t position, int32_t head) {
  const int64_t offset = position - segment.position;
  if (offset < 0 || offset >= segment.num_tokens) return nullptr;
  return (segment.is_halo ? params.d_tokens.halo : params.d_tokens.own) +
         ((segment.row + offset) * params.dims.num_kv_heads + head) * params.head_dim;
}

// Whether a run has the block. Runs are ascending.
__device__ bool HasBlock(const CompressBackwardParams& params, int32_t document, int64_t block) {
  int32_t low = 0, high = params.num_runs;  // the first run that ends behind the block
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    const BlockRun run = params.runs[middle];
    const bool before = run.document != document ? run.document < document
                                                 : run.first_block + run.num_blocks <= block;
    if (before) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < params.num_runs && params.runs[low].document == document &&
         params.runs[low].first_block <= block;
}

// Grid: any number of CTAs. A CTA owns every gridDim-th (stride of a segment, kv head); a thread
// four dimensions of some of its tokens.
template <bool kWeighted>
__global__ void __launch_bounds__(kThreads)
    SumTokensKernel(const __grid_constant__ CompressBackwardParams params) {
  const AttentionDims& dims = params.dims;
  const int32_t row_threads = params.head_dim / 4, stride = dims.compress_stride_tokens;
  const int32_t column = threadIdx.x % row_threads * 4, first_token = threadIdx.x / row_threads;
  const int32_t shares = dims.compress_block_tokens / stride;
  const float mean = 1.0f / static_cast<float>(dims.compress_block_tokens);
  for (int64_t index = blockIdx.x;; index += gridDim.x) {
    const int32_t head = static_cast<int32_t>(index % dims.num_kv_heads);
    const BlockGroup group = FindStrides(params, 1, index / dims.num_kv_heads);
    if (group.document < 0) return;
    if (first_token >= kThreads / row_threads) continue;
    const Segment segment = params.tokens.segments[group.document];
    const int64_t weight_place =
        (params.weights.num_heads == 1 ? 0 : head) * int64_t{dims.compress_block_tokens};
    const int64_t first_row = params.documents[segment.document].cmp_block_begin;
    for (int32_t a = first_token; a < stride; a += kThreads / row_threads) {
      float* const to = TokenGradient(params, segment, group.first_block * stride + a, head);
      if (to == nullptr) continue;
      float4 sum = make_float4(0, 0, 0, 0);
      for (int32_t u = 0; u < shares; ++u) {
        const int64_t block = group.first_block - u;
        if (block < 0 || !HasBlock(params, segment.document, block)) continue;
        const float4 dy = *reinterpret_cast<const float4*>(
            params.d_summaries + (first_row + block) * params.d_summaries_stride +
            head * params.head_dim + column);
        float weight = mean;
        if constexpr (kWeighted) {
          weight =
              LoadFloat(params.weights.dtype, params.weights.weight, weight_place + u * stride + a);
        }
        sum.x = fmaf(weight, dy.x, sum.x), sum.y = fmaf(weight, dy.y, sum.y);
        sum.z = fmaf(weight, dy.z, sum.z), sum.w = fmaf(weight, dy.w, sum.w);
      }
      float4* const place = reinterpret_cast<float4*>(to + column);
      if (params.d_tokens.adds) {
        const float4 before = *place;
        sum.x += before.x, sum.y += before.y, sum.z += before.z, sum.w += before.w;
      }
      *place = sum;
    }
  }
}

// Grid: (N, Hkv). A CTA owns the row of `dy` of one block, and its place.
__global__ void __launch_bounds__(kThreads) GatherKernel(const __grid_constant__ Context context) {
  const CompressBackwardParams& params = context.params;
  const BlockGroup group = FindBlocks(params.runs, params.num_runs, 1, blockIdx.x);
  const int32_t head = blockIdx.y, head_dim = params.head_dim;
  if (group.document < 0) return;
  if (head == 0 && threadIdx.x == 0) {
    context.work.blocks[blockIdx.x] = {group.document, static_cast<int32_t>(group.first_block)};
  }
  const int64_t row = params.documents[group.document].cmp_block_begin + group.first_block;
  const float* const from = params.d_summaries + row * params.d_summaries_stride + head * head_dim;
  float* const to = context.work.dy + (head * params.num_blocks + blockIdx.x) * head_dim;
  for (int32_t i = threadIdx.x; i < head_dim; i += kThreads) to[i] = from[i];
}

// Sum over the CTA's threads, in a fixed order; the whole in thread 0.
__device__ float SumThreads(float value, float* warp_sums) {
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_xor_sync(kFullWarp, value, delta);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0.0f;
  for (int w = 0; w < kThreads / 32; ++w) sum += warp_sums[w];
  return sum;
}

// Grid: (l, H'). A CTA owns the gradient of one weight.
__global__ void __launch_bounds__(kThreads) WeightKernel(const __grid_constant__ Context context) {
  __shared__ float warp_sums[kThreads / 32];
  const CompressBackwardParams& params = context.params;
  const int32_t row_threads = params.head_dim / 8, j = blockIdx.x;
  const int32_t column = threadIdx.x % row_threads * 8, row_step = kThreads / row_threads;
  const int64_t first = blockIdx.y * params.num_blocks, count = context.rows_per_weight_head();
  float sum = 0.0f;
  for (int64_t i = threadIdx.x / row_threads; i < count && threadIdx.x < row_step * row_threads;
       i += row_step) {
    const int64_t row = first + i;
    float x[8], dy[8];
    context.LoadTokens(static_cast<int32_t>(row / params.num_blocks), row % params.num_blocks,
                       int64_t{j} * params.head_dim + column, x);
    LoadFloats(DType::kF32, context.work.dy, row * params.head_dim + column, dy);
    for (int e = 0; e < 8; ++e) sum = fmaf(x[e], dy[e], sum);
  }
  sum = SumThreads(sum, warp_sums);
  if (threadIdx.x == 0) {
    params.d_weights.weight[blockIdx.y * params.dims.compress_block_tokens + j] = sum;
  }
}

constexpr int kSumColumns = 32;
constexpr int kSumRows = kThreads / kSumColumns;

// Grid: (width / kSumColumns, H'). A CTA owns kSumColumns columns of `sums`, those of `rows`
// [Hkv,N,width] over all blocks; also writes the first `bias_width` to `bias`, nullable.
__global__ void __launch_bounds__(kThreads)
    ColumnSumsKernel(const __grid_constant__ Context context, const float* rows, int32_t width,
                     float* bias, int32_t bias_width) {
  __shared__ float parts[kSumRows][kSumColumns];
  const int32_t column = blockIdx.x * kSumColumns + threadIdx.x % kSumColumns;
  const int32_t part = threadIdx.x / kSumColumns;
  const int64_t first = blockIdx.y * context.params.num_blocks;
  const int64_t count = context.rows_per_weight_head();
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = part; i < count; i += kSumRows) sum += rows[(first + i) * width + column];
  parts[part][threadIdx.x % kSumColumns] = sum;
  __syncthreads();
  if (part != 0) return;
  for (int i = 1; i < kSumRows; ++i) sum += parts[i][threadIdx.x];
  context.work.sums[blockIdx.y * width + column] = sum;
  if (bias != nullptr && column < bias_width) bias[blockIdx.y * bias_width + column] = sum;
}

// Grid: covers [l,D] in x, H' in y; a thread owns one value of pe: the sum over the outputs that it
// goes to of their `sums` [H',sums_width] times the weight.
__global__ void __launch_bounds__(kThreads)
    PositionKernel(const __grid_constant__ Context context, const void* matrix, int32_t num_outputs,
                   int32_t sums_width) {
  const CompressBackwardParams& params = context.params;
  const int64_t k = blockIdx.x * int64_t{kThreads} + threadIdx.x, values = context.block_values();
  if (k >= values) return;
  const float* const sums = context.work.sums + int64_t{blockIdx.y} * sums_width;
  const DType dtype = params.weights.dtype;
  float sum = 0.0f;
  if (matrix == nullptr) {
    const int64_t j = k / params.head_dim;
    sum = sums[k % params.head_dim] *
          LoadFloat(dtype, params.weights.weight,
                    int64_t{blockIdx.y} * params.dims.compress_block_tokens + j);
  } else {
    for (int32_t o = 0; o < num_outputs; ++o) {
      const int64_t place = (int64_t{blockIdx.y} * num_outputs + o) * values + k;
      sum = fmaf(sums[o], LoadFloat(dtype, matrix, place), sum);
    }
  }
  params.d_weights.pe[blockIdx.y * values + k] = sum;
}

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

template <class Problem>
void LaunchProduct(const Problem& problem, const Device& device, cudaStream_t stream) {
  ProductKernel<Problem><<<4 * device.num_sms, kThreads, 0, stream>>>(problem);
}

void LaunchColumnSums(const Context& context, const float* rows, int32_t width, float* bias,
                      int32_t bias_width, cudaStream_t stream) {
  const dim3 grid(width / kSumColumns, context.params.weights.num_heads);
  ColumnSumsKernel<<<grid, kThreads, 0, stream>>>(context, rows, width, bias, bias_width);
}

// From the sums of what the positions go to.
void LaunchPositions(const Context& context, const void* matrix, int32_t num_outputs,
                     int32_t sums_width, cudaStream_t stream) {
  const CompressBackwardParams& params = context.params;
  if (params.d_weights.pe == nullptr) return;
  const int32_t values = params.dims.compress_block_tokens * params.head_dim;
  const dim3 grid((values + kThreads - 1) / kThreads, params.weights.num_heads);
  PositionKernel<<<grid, kThreads, 0, stream>>>(context, matrix, num_outputs, sums_width);
}

}  // namespace

int64_t CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                     int32_t hidden_width, int64_t num_blocks) {
  const int32_t widest = dims.head_dim_qk > dims.head_dim_v ? dims.head_dim_qk : dims.head_dim_v;
  Work work;
  return PlaceWork(dims.num_kv_heads, widest, compressor, hidden_width, num_blocks, nullptr, &work);
}

cudaError_t LaunchCompressBackward(const CompressBackwardParams& params, const Device& device,
                                   cudaStream_t stream) {
  const AttentionDims& dims = params.dims;
  const CompressorWeights& weights = params.weights;
  const int32_t sum_grid = kCtasPerSm * device.num_sms;
  if (params.compressor == Compressor::kMean) {
    SumTokensKernel<false><<<sum_grid, kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  }
  Context context{params, {}};
  const Work& work = context.work;
  PlaceWork(dims.num_kv_heads, params.head_dim, params.compressor, weights.hidden_width,
            params.num_blocks, static_cast<char*>(params.scratch), &context.work);
  if (params.num_blocks > 0) {
    const dim3 grid(static_cast<unsigned>(params.num_blocks), dims.num_kv_heads);
    GatherKernel<<<grid, kThreads, 0, stream>>>(context);
  }
  if (params.compressor == Compressor::kWeighted) {
    SumTokensKernel<true><<<sum_grid, kThreads, 0, stream>>>(params);
    const dim3 grid(dims.compress_block_tokens, weights.num_heads);
    WeightKernel<<<grid, kThreads, 0, stream>>>(context);
    LaunchColumnSums(context, work.dy, params.head_dim, nullptr, 0, stream);
    LaunchPositions(context, nullptr, 0, params.head_dim, stream);
    return cudaGetLastError();
  }
  FirstMatrix first{context, weights.w,       params.d_weights.w,
                    work.dy, params.head_dim, params.head_dim};
  float* first_bias = nullptr;
  if (params.compressor == Compressor::kMlp) {
    LaunchProduct(HiddenProblem{context}, device, stream);
    LaunchProduct(HiddenGradientProblem{context}, device, stream);
    LaunchProduct(SecondProblem{context}, device, stream);
    LaunchColumnSums(context, work.dy, params.head_dim, params.d_weights.b2, params.head_dim,
                     stream);
    first = {context,       weights.w1,           params.d_weights.w1,
             work.d_hidden, weights.hidden_width, work.padded_width};
    first_bias = params.d_weights.b1;
  }
  LaunchProduct(FirstProblem{first}, device, stream);
  LaunchProduct(TokensProblem{first}, device, stream);
  LaunchColumnSums(context, first.outputs, first.outputs_width, first_bias, first.num_outputs,
                   stream);
  LaunchPositions(context, first.matrix, first.num_outputs, first.outputs_width, stream);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
