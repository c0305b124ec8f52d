// Brings summaries into the layout that wgmma reads, and cuts the queries into groups.
//
// Column 8j + 2c + e of a tile of keys is summary 32c + 2j + e: the thread at place c of its quad,
// whose accumulators are columns 8j + 2c + {0, 1}, then holds 32 summaries in a row, which are
// whole select blocks. Values are transposed, [Dv][summary], in the same order of summaries; their
// row 8j + 2c + e is dimension 32(j / 4) + 8c + 2(j % 4) + e, so that the thread holds eight
// dimensions in a row of the output.
#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/score_select_stages.h"
#include "kernels/cuda/score_select_tiles.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxValueDim = 128;

struct PackArgs {
  ConstTensor3 rows;
  char* tiles;
  int32_t head_dim;
};

struct PrepareArgs {
  PackArgs keys, values;
  const Document* documents;
  const Segment* segments;
  int32_t num_documents;
  int32_t num_segments;
  int32_t first_kv_head;
  int32_t num_tiles;
  int32_t attend_group;  // queries
  int32_t rank_group;
  int32_t* next_item;
  int32_t* attend_begin;
  int32_t* rank_begin;
};

__device__ int32_t SummaryOfColumn(int32_t column) {
  return 32 * ((column >> 1) & 3) + 2 * (column >> 3) + (column & 1);
}

__device__ int32_t DimensionOfRow(int32_t row) {
  const int32_t j = row >> 3;
  return 32 * (j >> 2) + 8 * ((row >> 1) & 3) + 2 * (j & 3) + (row & 1);
}

// Of the 128-byte swizzle: chunk c of row r.
__device__ int32_t SwizzledOffset(int32_t row, int32_t chunk) {
  return row * 128 + ((chunk ^ (row & 7)) << 4);
}

__device__ const uint16_t* RowOf(const PackArgs& args, const Tile& tile, int32_t summary,
                                 int32_t head) {
  return static_cast<const uint16_t*>(args.rows.data) +
         (tile.first_row + summary) * args.rows.row_stride + head * args.rows.head_stride;
}

__device__ void PackKeys(const PackArgs& args, const Tile& tile, int32_t head, char* to) {
  const int32_t chunks = args.head_dim / 8;
  for (int32_t i = threadIdx.x; i < kTileSummaries * chunks; i += kThreads) {
    const int32_t column = i / chunks, chunk = i % chunks;
    const int32_t summary = SummaryOfColumn(column);
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (summary < tile.num_present) {
      bits = *reinterpret_cast<const uint4*>(RowOf(args, tile, summary, head) + chunk * 8);
    }
    char* const panel = to + chunk / 8 * (kTileSummaries * 128);
    *reinterpret_cast<uint4*>(panel + SwizzledOffset(column, chunk % 8)) = bits;
  }
}

__device__ void PackValues(const PackArgs& args, const Tile& tile, int32_t head, char* to) {
  // Rows are read whole and left eight values further apart, so that a column meets few banks
  // twice.
  __shared__ __align__(16) uint16_t rows[kTileSummaries][kMaxValueDim + 8];
  const int32_t dims = args.head_dim, chunks = dims / 8;
  for (int32_t i = threadIdx.x; i < kTileSummaries * chunks; i += kThreads) {
    const int32_t summary = i / chunks, chunk = i % chunks;
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (summary < tile.num_present) {
      bits = *reinterpret_cast<const uint4*>(RowOf(args, tile, summary, head) + chunk * 8);
    }
    *reinterpret_cast<uint4*>(&rows[summary][chunk * 8]) = bits;
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < kTileSummaries / 8 * dims; i += kThreads) {
    const int32_t row = i % dims, chunk = i / dims;  // of eight summaries
    const int32_t dimension = DimensionOfRow(row);
    __align__(16) uint16_t values[8];
    for (int32_t v = 0; v < 8; ++v) values[v] = rows[SummaryOfColumn(chunk * 8 + v)][dimension];
    char* const panel = to + chunk / 8 * (dims * 128);
    *reinterpret_cast<uint4*>(panel + SwizzledOffset(row, chunk % 8)) =
        *reinterpret_cast<const uint4*>(values);
  }
}

// Exclusive sums over all segments of the groups that each is cut into.
__device__ void CountGroups(const PrepareArgs& args) {
  __shared__ int32_t warp_sums[2][kThreads / 32];
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t group[2] = {args.attend_group, args.rank_group};
  int32_t* const begin[2] = {args.attend_begin, args.rank_begin};
  int32_t before[2] = {0, 0};  // this round of kThreads segments
  for (int32_t first = 0; first <= args.num_segments; first += kThreads) {
    const int32_t segment = first + static_cast<int32_t>(threadIdx.x);
    const int64_t tokens =
        segment < args.num_segments ? args.segments[segment].num_tokens : int64_t{0};
    int32_t count[2], sum[2];
    for (int32_t k = 0; k < 2; ++k) {
      count[k] = static_cast<int32_t>((tokens + group[k] - 1) / group[k]);
      sum[k] = count[k];
      for (int32_t delta = 1; delta < 32; delta *= 2) {
        const int32_t other = __shfl_up_sync(kFullWarp, sum[k], delta);
        if (lane >= delta) sum[k] += other;
      }
      if (lane == 31) warp_sums[k][warp] = sum[k];
    }
    __syncthreads();
    for (int32_t k = 0; k < 2; ++k) {
      int32_t round = 0;
      for (int32_t w = 0; w < kThreads / 32; ++w) {
        if (w < warp) sum[k] += warp_sums[k][w];
        round += warp_sums[k][w];
      }
      if (segment <= args.num_segments) begin[k][segment] = before[k] + sum[k] - count[k];
      before[k] += round;
    }
    __syncthreads();
  }
}

// Grid: [1 + 2 * tiles, kv heads]. The first CTA of the first head counts groups; of the others,
// one owns the keys and one the values of a tile.
__global__ void __launch_bounds__(kThreads)
    PrepareScoreSelectKernel(const __grid_constant__ PrepareArgs args) {
  if (blockIdx.x == 0) {
    if (blockIdx.y != 0) return;
    if (threadIdx.x < 2) args.next_item[threadIdx.x] = 0;
    CountGroups(args);
    return;
  }
  const int32_t head = args.first_kv_head + blockIdx.y;
  const int32_t index = (blockIdx.x - 1) / 2;
  const Tile tile = FindTile(args.documents, args.num_documents, index);
  if (tile.num_present == 0) return;
  const bool is_values = (blockIdx.x - 1) % 2 != 0;
  const PackArgs& pack = is_values ? args.values : args.keys;
  char* const to = pack.tiles + (head * static_cast<int64_t>(args.num_tiles) + index) *
                                    (kTileSummaries * 2 * pack.head_dim);
  if (is_values) {
    PackValues(pack, tile, head, to);
  } else {
    PackKeys(pack, tile, head, to);
  }
}

}  // namespace

cudaError_t LaunchPrepareScoreSelect(const ScoreAndSelectParams& params,
                                     const ScoreSelectScratch& scratch, cudaStream_t stream) {
  const AttentionDims& dims = params.dims;
  const int32_t group_size = dims.group_size();
  PrepareArgs args{};
  args.keys = {params.kc, static_cast<char*>(scratch.keys), dims.head_dim_qk};
  args.values = {params.vc, static_cast<char*>(scratch.values), dims.head_dim_v};
  args.documents = params.queries.documents;
  args.segments = params.queries.segments;
  args.num_documents = params.num_documents;
  args.num_segments = params.queries.num_segments;
  args.first_kv_head = params.queries.kv_heads.begin;
  args.num_tiles = static_cast<int32_t>(scratch.num_tiles);
  args.attend_group = kAttendRows / group_size;
  args.rank_group = kRankRows / kRankWarpRows / RankWarpsPerQuery(group_size);
  args.next_item = scratch.next_item;
  args.attend_begin = scratch.attend_begin;
  args.rank_begin = scratch.rank_begin;
  const dim3 grid(static_cast<unsigned>(1 + 2 * scratch.num_tiles),
                  static_cast<unsigned>(params.queries.kv_heads.size()));
  PrepareScoreSelectKernel<<<grid, kThreads, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
