// The backward of the window and of the compressed branch for any shape, on any GPU.
//
// Two kernels have the same inner step: a warp owns 16 rows and walks tiles of 32 columns, both
// q and dO, or k and v. It multiplies its rows with the tile's twice, for logits and for dP, makes
// weights of them, and multiplies those with one of the tile's two matrices. dQ: rows are queries,
// columns keys. dK and dV, one after the other: rows are keys, columns queries.
//
// Shared memory: the tile's two matrices in the layout of records (record_layout.h), [32,Dk] and
// [32,Dv]; the rows of the warps, [4][16,Dk] and [4][16,Dv]; statistics of 32 columns. 97 KiB at
// most.
#include <cstdint>

#include "kernels/cuda/attend_backward.cuh"
#include "kernels/cuda/pack_tokens.cuh"
#include "kernels/cuda/warp_attention.cuh"
#include "kernels/cuda/warp_rows.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = kThreads / 32 * kTileRows;  // of a CTA
constexpr int kColumns = 32;                      // of a tile: logits and dP stay in registers

// Statistics of a tile's columns.
struct ColumnStatistics {
  RowStatistics statistics[kColumns];
  KeyRange keys[kColumns];
};

struct SharedMap {
  int32_t tile_k, tile_v, rows_k, rows_v;  // bytes

  __host__ __device__ explicit SharedMap(const AttentionDims& dims)
      : tile_k(kColumns * dims.head_dim_qk * 2),
        tile_v(kColumns * dims.head_dim_v * 2),
        rows_k(kRows * dims.head_dim_qk * 2),
        rows_v(kRows * dims.head_dim_v * 2) {}
  __host__ __device__ int32_t num_bytes() const {
    return tile_k + tile_v + rows_k + rows_v + static_cast<int32_t>(sizeof(ColumnStatistics));
  }
};

// What a CTA has in shared memory.
struct Tiles {
  uint4* k;  // [32,Dk] of k or q
  uint4* v;  // [32,Dv] of v or dO
  SharedQ rows_k, rows_v;
  ColumnStatistics* columns;

  __device__ Tiles(char* memory, const AttentionDims& dims, const SharedMap& map, const void* any)
      : k(reinterpret_cast<uint4*>(memory)),
        v(reinterpret_cast<uint4*>(memory + map.tile_k)),
        rows_k(reinterpret_cast<uint4*>(memory + map.tile_k + map.tile_v) +
                   threadIdx.x / 32 * dims.head_dim_qk * 2,
               dims.head_dim_qk, any),
        rows_v(reinterpret_cast<uint4*>(memory + map.tile_k + map.tile_v + map.rows_k) +
                   threadIdx.x / 32 * dims.head_dim_v * 2,
               dims.head_dim_v, any),
        columns(reinterpret_cast<ColumnStatistics*>(memory + map.tile_k + map.tile_v + map.rows_k +
                                                    map.rows_v)) {}
};

// products [16,32] = rows * tile^T
template <class T>
__device__ void Multiply(const SharedQ& rows, const uint4* tile,
                         float (&products)[kColumns / 8][4]) {
  const uint32_t tile_lane = SharedAddress(tile) + threadIdx.x % 32 * 16;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) products[j][e] = 0.0f;
  }
  for (int group = 0; group < rows.num_groups(); ++group) {
    uint4 a[2];
    rows.Get(group, a);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      uint32_t b[4];
      LoadMatrices(b, tile_lane + (j * rows.num_groups() + group) * 512);
      MultiplyAdd<T>(products[j], a[0].x, a[0].y, a[0].z, a[0].w, b[0], b[1]);
      MultiplyAdd<T>(products[j], a[1].x, a[1].y, a[1].z, a[1].w, b[2], b[3]);
    }
  }
}

// Sums of a warp's 16 rows, kDim each.
template <class T, int kDim>
class WarpSums {
 public:
  __device__ void Reset() {
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums_[i][e] = 0.0f;
    }
  }

  // sums += weights * tile; weight(r, column, logit, dp) is that of the lane's row r.
  template <class Weight>
  __device__ void Add(const Tiles& tiles, const uint4* tile, const Weight& weight) {
    float logits[kColumns / 8][4], dp[kColumns / 8][4];
    Multiply<T>(tiles.rows_k, tiles.k, logits);
    Multiply<T>(tiles.rows_v, tiles.v, dp);
    uint32_t weights[kColumns / 8][2];
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int column = 8 * j + threadIdx.x % 4 * 2;
        weights[j][r] = Pack2<T>(weight(r, column, logits[j][2 * r], dp[j][2 * r]),
                                 weight(r, column + 1, logits[j][2 * r + 1], dp[j][2 * r + 1]));
      }
    }
    constexpr int kGroups = kDim / 32;
    const int lane = threadIdx.x % 32;
    const uint32_t tile_lane =
        SharedAddress(tile) + lane / 8 % 2 * (kGroups * 512) + lane / 16 * 128 + lane % 8 * 16;
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
#pragma unroll
      for (int m = 0; m < kDim / 8; m += 2) {
        uint32_t b[4];
        LoadMatricesTransposed(b, tile_lane + i * (kGroups * 1024) + m * 128);
        MultiplyAdd<T>(sums_[m], weights[2 * i][0], weights[2 * i][1], weights[2 * i + 1][0],
                       weights[2 * i + 1][1], b[0], b[1]);
        MultiplyAdd<T>(sums_[m + 1], weights[2 * i][0], weights[2 * i][1], weights[2 * i + 1][0],
                       weights[2 * i + 1][1], b[2], b[3]);
      }
    }
  }

  // Row r of the lane, times `scale`, to or onto `row`.
  __device__ void Store(int r, float scale, bool adds, float* row) const {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int group = 0; group < kDim / 32; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4* const to = reinterpret_cast<float4*>(row + group * 32 + c * 8 + half * 4);
        const int m = group * 4 + half * 2;
        float4 value = adds ? *to : make_float4(0, 0, 0, 0);
        value.x += scale * sums_[m][2 * r], value.y += scale * sums_[m][2 * r + 1];
        value.z += scale * sums_[m + 1][2 * r], value.w += scale * sums_[m + 1][2 * r + 1];
        *to = value;
      }
    }
  }

 private:
  float sums_[kDim / 8][4];
};

__device__ float ScaleLog2(const AttentionDims& dims) {
  return dims.softmax_scale * 1.4426950408889634f;
}

// Grid: one CTA for each 64 rows of queries, whose dq it owns.
template <class T, int kDk>
__global__ void __launch_bounds__(kThreads)
    QueryBackwardKernel(const __grid_constant__ AttendBackwardArgs args) {
  extern __shared__ __align__(128) char memory[];
  const AttentionDims& dims = args.dims;
  Tiles tiles(memory, dims, SharedMap(dims), args.queries.q.data);
  const float scale_log2 = ScaleLog2(dims);
  const int64_t num_heads = args.queries.kv_heads.size() * GroupSize(dims);
  WarpSums<T, kDk> sums;

  ForEachRun<kRows>(args, blockIdx.x, [&](const WindowRun& run) {
    LoadRows(args.queries.q, run, tiles.rows_k);
    LoadRows(args.outputs.d_o, run, tiles.rows_v);
    RowStatistics statistics[2];
    KeyRange keys[2];
    int64_t to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const LaneRow row(run, threadIdx.x / 32 * kTileRows + threadIdx.x % 32 / 4 + 8 * r);
      keys[r] = {0, 0};
      statistics[r] = {};
      to[r] = -1;
      if (!row.active) continue;
      statistics[r] = LoadStatistics(args.outputs, row.query * dims.num_q_heads + row.head);
      keys[r] = KeysOf(args.rule, row.position);
      to[r] = (row.query * num_heads + row.head -
               static_cast<int64_t>(args.queries.kv_heads.begin) * GroupSize(dims)) *
              kDk;
    }
    tiles.rows_v.WaitUntilLoaded();  // and rows_k
    sums.Reset();
    const int64_t end = KeysOf(args.rule, run.EndKey() - 1).end;
    int64_t key = KeysOf(args.rule, run.Position(run.begin)).begin / kColumns * kColumns;
    for (; key < end; key += kColumns) {
      __syncthreads();
      PackTokens<kThreads>(args.k, run.document, key, kColumns, run.kv_head, dims.head_dim_qk,
                           tiles.k);
      PackTokens<kThreads>(args.v, run.document, key, kColumns, run.kv_head, dims.head_dim_v,
                           tiles.v);
      __syncthreads();
      sums.Add(tiles, tiles.k, [&](int r, int column, float logit, float dp) {
        const bool visible = key + column >= keys[r].begin && key + column < keys[r].end;
        if (!visible) return 0.0f;
        const RowStatistics& row = statistics[r];
        const float gated = GatedProbability(logit, scale_log2, row.lse_log2, row.gate);
        return LogitGradient(gated, dp, row.mean_dp);
      });
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (to[r] < 0) continue;
      sums.Store(r, dims.softmax_scale, args.queries_gradients.adds,
                 args.queries_gradients.dq + to[r]);
    }
  });
}

// Adds what the queries of a segment give to keys [begin, end) of its document.
template <class T, int kDim>
__device__ void AddQueries(const AttendBackwardArgs& args, const Segment& segment, int32_t kv_head,
                           int64_t begin, int64_t end, bool of_values, const Tiles& tiles,
                           WarpSums<T, kDim>& sums) {
  const AttentionDims& dims = args.dims;
  const int32_t group_size = GroupSize(dims);
  const float scale_log2 = ScaleLog2(dims);
  const KeyRange positions = QueriesOf(args.rule, begin, end);
  const int64_t first = max(positions.begin - segment.position, int64_t{0});
  const int64_t num_rows =
      (min(positions.end - segment.position, segment.num_tokens) - first) * group_size;
  for (int64_t step = 0; step < num_rows; step += kColumns) {
    const auto query_of = [&](int32_t column) { return first + (step + column) / group_size; };
    const auto head_of = [&](int32_t column) {
      return int64_t{kv_head} * group_size + (step + column) % group_size;
    };
    const auto pack = [&](const ConstTensor3& tensor, int32_t head_dim, uint4* to) {
      PackRows<kThreads>(
          kColumns, head_dim,
          [&](int32_t column) -> const char* {
            if (step + column >= num_rows) return nullptr;
            return static_cast<const char*>(tensor.data) +
                   ((segment.row + query_of(column)) * tensor.row_stride +
                    head_of(column) * tensor.head_stride) *
                       2;
          },
          to);
    };
    __syncthreads();
    pack(args.queries.q, dims.head_dim_qk, tiles.k);
    pack(args.outputs.d_o, dims.head_dim_v, tiles.v);
    if (threadIdx.x < kColumns) {
      const int32_t column = threadIdx.x;
      RowStatistics statistics{};
      KeyRange keys{0, 0};
      if (step + column < num_rows) {
        const int64_t query = query_of(column);
        statistics = LoadStatistics(args.outputs,
                                    (segment.row + query) * dims.num_q_heads + head_of(column));
        keys = KeysOf(args.rule, segment.position + query);
      }
      tiles.columns->statistics[column] = statistics;
      tiles.columns->keys[column] = keys;
    }
    __syncthreads();
    const int64_t key = begin + threadIdx.x / 32 * kTileRows + threadIdx.x % 32 / 4;
    sums.Add(tiles, of_values ? tiles.v : tiles.k, [&](int r, int column, float logit, float dp) {
      const KeyRange& keys = tiles.columns->keys[column];
      if (key + 8 * r < keys.begin || key + 8 * r >= keys.end) return 0.0f;
      const RowStatistics& row = tiles.columns->statistics[column];
      const float gated = GatedProbability(logit, scale_log2, row.lse_log2, row.gate);
      return of_values ? gated : LogitGradient(gated, dp, row.mean_dp);
    });
  }
}

// Grid: [any, kv heads]. A CTA owns dk or, `of_values`, dv of tiles i, i + gridDim.x, ... of 64
// rows of a kv head.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads)
    KeyBackwardKernel(const __grid_constant__ AttendBackwardArgs args, bool of_values) {
  extern __shared__ __align__(128) char memory[];
  const AttentionDims& dims = args.dims;
  Tiles tiles(memory, dims, SharedMap(dims), args.queries.q.data);
  const int32_t kv_head = args.queries.kv_heads.begin + static_cast<int32_t>(blockIdx.y);
  const TokenRows& rows = of_values ? args.v : args.k;
  const GradientRows& gradients = of_values ? args.dv : args.dk;
  WarpSums<T, kDim> sums;

  int64_t tile = blockIdx.x;
  for (int32_t s = 0; s < rows.num_segments; ++s) {
    const Segment segment = rows.segments[s];
    const int64_t num_tiles = (segment.num_tokens + kRows - 1) / kRows;
    for (; tile < num_tiles; tile += gridDim.x) {
      const int64_t begin = segment.position + tile * kRows;
      const int64_t end = min(begin + kRows, segment.position + segment.num_tokens);
      const auto load = [&](const TokenRows& tokens, SharedQ& to) {
        to.Load([&](int i) -> const char* {
          const int64_t key = begin + threadIdx.x / 32 * kTileRows + i;
          return key < end ? FindTokens(tokens, 2, segment.document, key, kv_head).rows : nullptr;
        });
      };
      load(args.k, tiles.rows_k);
      load(args.v, tiles.rows_v);
      tiles.rows_v.WaitUntilLoaded();  // and rows_k
      sums.Reset();
      for (int32_t i = 0; i < args.queries.num_segments; ++i) {
        const Segment queries = args.queries.segments[i];
        if (queries.document != segment.document) continue;
        AddQueries(args, queries, kv_head, begin, end, of_values, tiles, sums);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t key = begin + threadIdx.x / 32 * kTileRows + threadIdx.x % 32 / 4 + 8 * r;
        if (key >= end) continue;
        float* const base = segment.is_halo != 0 ? gradients.halo : gradients.own;
        sums.Store(r, of_values ? 1.0f : dims.softmax_scale, gradients.adds,
                   base + (segment.row + key - segment.position) * gradients.row_stride +
                       kv_head * gradients.head_stride);
      }
    }
    tile -= num_tiles;
  }
}

template <class Kernel>
cudaError_t AllowSharedBytes(Kernel kernel, int32_t num_bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_bytes);
}

template <class T, int kDk>
cudaError_t LaunchQueries(const AttendBackwardArgs& args, cudaStream_t stream) {
  const int32_t shared_bytes = SharedMap(args.dims).num_bytes();
  const auto kernel = QueryBackwardKernel<T, kDk>;
  const cudaError_t error = AllowSharedBytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  const unsigned grid = static_cast<unsigned>(NumWindowTiles<kRows>(args));
  if (grid == 0) return cudaSuccess;
  kernel<<<grid, kThreads, shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

template <class T, int kDim>
cudaError_t LaunchKeys(const AttendBackwardArgs& args, bool of_values, const Device& device,
                       cudaStream_t stream) {
  const int32_t shared_bytes = SharedMap(args.dims).num_bytes();
  const auto kernel = KeyBackwardKernel<T, kDim>;
  const cudaError_t error = AllowSharedBytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(2 * device.num_sms),
                  static_cast<unsigned>(args.queries.kv_heads.size()));
  kernel<<<grid, kThreads, shared_bytes, stream>>>(args, of_values);
  return cudaGetLastError();
}

template <class T, int kDim>
cudaError_t LaunchOf(const AttendBackwardArgs& args, const Device& device, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (args.dims.head_dim_qk == kDim) {
    error = LaunchQueries<T, kDim>(args, stream);
    if (error == cudaSuccess) error = LaunchKeys<T, kDim>(args, false, device, stream);
  }
  if (error == cudaSuccess && args.dims.head_dim_v == kDim) {
    error = LaunchKeys<T, kDim>(args, true, device, stream);
  }
  return error;
}

template <class T>
cudaError_t Launch(const AttendBackwardArgs& args, const Device& device, cudaStream_t stream) {
  for (const auto launch :
       {LaunchOf<T, 64>, LaunchOf<T, 128>, LaunchOf<T, 192>, LaunchOf<T, 256>}) {
    const cudaError_t error = launch(args, device, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Grid: any. A thread owns documents i, i + gridDim * blockDim, ...
__global__ void ListSummariesKernel(const Document* documents, int32_t num_documents,
                                    Segment* segments) {
  for (int32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < num_documents;
       i += gridDim.x * blockDim.x) {
    segments[i] = {documents[i].cmp_block_begin, documents[i].num_cmp_blocks, 0, i, 0};
  }
}

}  // namespace

cudaError_t LaunchListSummaries(const Document* documents, int32_t num_documents, Segment* segments,
                                cudaStream_t stream) {
  if (num_documents == 0) return cudaSuccess;
  const auto kernel = ListSummariesKernel;
  const unsigned grid = static_cast<unsigned>((num_documents + kThreads - 1) / kThreads);
  kernel<<<grid, kThreads, 0, stream>>>(documents, num_documents, segments);
  return cudaGetLastError();
}

cudaError_t LaunchAttendBackwardAny(const AttendBackwardArgs& args, const Device& device,
                                    cudaStream_t stream) {
  return args.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(args, device, stream)
                                         : Launch<__half>(args, device, stream);
}

}  // namespace nsa::kernels::cuda
