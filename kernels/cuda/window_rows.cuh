// Rows of tiles of the window and of the summaries. A row is a (query, head) pair of one kv head:
// row q * G + h of the kv head is head h of its group and row q of the queries. A tile is a fixed
// number of rows, whatever G is. It is worked on in runs, each of queries of one segment: as a
// rule, a single one.
#ifndef KERNELS_CUDA_WINDOW_ROWS_CUH_
#define KERNELS_CUDA_WINDOW_ROWS_CUH_

#include <cstdint>

#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {

// Tiles of the kv heads of a call, one kv head after another. `Params` has dims and queries.
template <int kTileRows, class Params>
__host__ __device__ inline int64_t NumWindowTiles(const Params& params) {
  const int32_t group_size = params.dims.num_q_heads / params.dims.num_kv_heads;
  const int64_t num_rows = params.queries.num_tokens * group_size;
  return (num_rows + kTileRows - 1) / kTileRows * params.queries.kv_heads.size();
}

// Rows [begin, end) of a tile, all of one document; rows are counted inside the tile.
struct WindowRun {
  int32_t begin;
  int32_t end;
  int32_t document;
  int32_t kv_head;
  int32_t group_size;
  int32_t first_row;    // of the tile, among the rows of its first query
  int64_t first_query;  // of the tile, a row of q
  int64_t position;     // that first_query would have in this document

  __device__ int32_t QueryOf(int32_t row) const { return (first_row + row) / group_size; }
  __device__ int64_t Query(int32_t row) const { return first_query + QueryOf(row); }
  __device__ int64_t Head(int32_t row) const {
    return kv_head * group_size + (first_row + row) % group_size;
  }
  __device__ int64_t Position(int32_t row) const { return position + QueryOf(row); }
  __device__ bool Holds(int32_t row) const { return row >= begin && row < end; }

  // Keys that some row sees.
  __device__ int64_t FirstKey(int32_t window_tokens) const {
    const int64_t first = Position(begin) - window_tokens + 1;
    return first > 0 ? first : 0;
  }
  __device__ int64_t EndKey() const { return Position(end - 1) + 1; }
};

// Calls visit(run) for each run of tile `index`. All lanes of a warp.
template <int kTileRows, class Params, class Visit>
__device__ inline void ForEachRun(const Params& params, int64_t index, const Visit& visit) {
  const AttentionDims& dims = params.dims;
  const int64_t num_row_tiles = NumWindowTiles<kTileRows>(params) / params.queries.kv_heads.size();
  WindowRun run;
  run.group_size = dims.num_q_heads / dims.num_kv_heads;
  run.kv_head = params.queries.kv_heads.begin + static_cast<int32_t>(index / num_row_tiles);
  const int64_t first = index % num_row_tiles * kTileRows;
  const int64_t num_left = params.queries.num_tokens * run.group_size - first;
  const int32_t num_rows = static_cast<int32_t>(min(num_left, int64_t{kTileRows}));
  run.first_query = first / run.group_size;
  run.first_row = static_cast<int32_t>(first % run.group_size);
  for (run.begin = 0; run.begin < num_rows; run.begin = run.end) {
    const int32_t query = run.QueryOf(run.begin);
    const QueryPlace place = FindQuery(params.queries, run.first_query + query);
    const int64_t num_queries = place.document < 0 ? 1 : place.num_queries;
    run.document = place.document;
    run.position = place.position - query;
    run.end = static_cast<int32_t>(
        min((query + num_queries) * run.group_size - run.first_row, int64_t{num_rows}));
    if (run.document >= 0) visit(run);
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_WINDOW_ROWS_CUH_
