// Stage 7, the window: each token attends to the last w tokens of its document, its own included.
//
// Tiles of keys are counted from the document's first token, so a query adds up the same tiles in
// the same order whoever computes it.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

// Rows of work in an item: enough to pay for the transposition of each tile of keys.
constexpr int64_t kTargetRows = 256;

struct Scratch {
  Scratch(const AttentionDims& dims, int64_t rows, char* memory)
      : Scratch(dims, rows, Carver(memory)) {}

  float* q;              // [rows,Dk]
  float* o;              // [rows,Dv]
  float* max;            // [rows]
  float* sums;           // [rows,kLanes]
  VisibleKeys* visible;  // [rows]
  float* keys;           // [Dk,kTileKeys]
  float* values;         // [kTileKeys,Dv]
  int64_t num_bytes;

 private:
  Scratch(const AttentionDims& dims, int64_t rows, Carver carver) {
    q = carver.Take<float>(rows * dims.head_dim_qk);
    o = carver.Take<float>(rows * dims.head_dim_v);
    max = carver.Take<float>(rows);
    sums = carver.Take<float>(rows * kLanes);
    visible = carver.Take<VisibleKeys>(rows);
    keys = carver.Take<float>(static_cast<int64_t>(dims.head_dim_qk) * kTileKeys);
    values = carver.Take<float>(static_cast<int64_t>(kTileKeys) * dims.head_dim_v);
    num_bytes = carver.num_bytes();
  }
};

void AttendRun(const AttendWindowParams& params, LoadWindowTile load_tile, const QueryRun& run,
               int32_t kv_head, const Scratch& s) {
  const AttentionDims& dims = params.dims;
  const int64_t group_size = dims.group_size();
  const SoftmaxRows rows{.head_dim_qk = dims.head_dim_qk,
                         .head_dim_v = dims.head_dim_v,
                         .scale = dims.softmax_scale,
                         .q = s.q,
                         .o = s.o,
                         .max = s.max,
                         .sums = s.sums};
  LoadQueries(dims, params.queries.q, dims.head_dim_qk, run, kv_head, s.q);
  ResetRows(rows, run.num_queries * group_size);

  const int64_t first_key = std::max<int64_t>(0, run.position - dims.window_tokens + 1);
  const int64_t end = run.position + run.num_queries;
  for (int64_t tile = first_key / kTileKeys * kTileKeys; tile < end; tile += kTileKeys) {
    // Queries that see a key of the tile: those at its first key and later, as long as their window
    // still reaches its last one.
    const int64_t query_begin = std::max<int64_t>(0, tile - run.position);
    const int64_t query_end = std::min<int64_t>(
        run.num_queries, tile + kTileKeys - 1 + dims.window_tokens - run.position);
    if (query_begin >= query_end) continue;
    for (int64_t i = query_begin; i < query_end; ++i) {
      const VisibleKeys visible = WindowKeys(dims, run.position + i, tile, kTileKeys);
      std::fill_n(s.visible + (i - query_begin) * group_size, group_size, visible);
    }
    load_tile(run.document, tile, kv_head,
              {.begin = WindowKeys(dims, run.position + query_begin, tile, kTileKeys).begin,
               .end = WindowKeys(dims, run.position + query_end - 1, tile, kTileKeys).end},
              s.keys, s.values);
    AttendTile(
        rows, query_begin * group_size, (query_end - query_begin) * group_size,
        KeyTile{.keys = s.keys, .key_stride = kTileKeys, .values = s.values, .width = kTileKeys},
        s.visible);
  }

  for (int64_t row = 0; row < run.num_queries * group_size; ++row) {
    const int64_t token = run.row + row / group_size;
    const int64_t head = kv_head * group_size + row % group_size;
    const float lse = FinishRow(rows, row);
    FromFloat(dims.dtype, s.o + row * dims.head_dim_v, dims.head_dim_v,
              RowOf(params.o_win, dims.dtype, token, head));
    if (params.lse_win != nullptr) params.lse_win[token * dims.num_q_heads + head] = lse;
  }
}

}  // namespace

absl::Status AttendWindow(const AttendWindowParams& params, Workers& workers) {
  const AttentionDims& dims = params.dims;
  // Tokens that are not here are zero: they are outside every window of this rank's queries.
  const auto load_tile = [&](int32_t document, int64_t tile, int32_t kv_head, VisibleKeys /*seen*/,
                             float* keys, float* values) {
    const void* tokens[kTileKeys];
    FindTokens(params.k, dims.dtype, document, tile, kTileKeys, kv_head, tokens);
    TransposeToFloat(dims.dtype, tokens, kTileKeys, dims.head_dim_qk, keys);
    FindTokens(params.v, dims.dtype, document, tile, kTileKeys, kv_head, tokens);
    for (int32_t i = 0; i < kTileKeys; ++i) {
      float* const value = values + i * dims.head_dim_v;
      if (tokens[i] == nullptr) {
        std::fill_n(value, dims.head_dim_v, 0.0f);
      } else {
        ToFloat(dims.dtype, tokens[i], dims.head_dim_v, value);
      }
    }
  };
  return AttendWindow(params, load_tile, workers);
}

absl::Status AttendWindow(const AttendWindowParams& params, LoadWindowTile load_tile,
                          Workers& workers) {
  const AttentionDims& dims = params.dims;
  const int64_t queries_per_run = QueriesPerRun(params.queries, dims, params.queries.num_tokens,
                                                kTargetRows, workers.num_threads());
  const int64_t max_rows = queries_per_run * dims.group_size();
  const std::vector<QueryRun> runs =
      SplitQueries(params.queries, 0, params.queries.num_tokens, queries_per_run);
  const int64_t scratch_bytes = Scratch(dims, max_rows, nullptr).num_bytes;
  const HeadRange& heads = params.queries.kv_heads;
  return workers.Run(static_cast<int64_t>(runs.size()) * heads.size(), scratch_bytes,
                     [&](int64_t item, char* scratch) {
                       AttendRun(params, load_tile, runs[item / heads.size()],
                                 heads.begin + static_cast<int32_t>(item % heads.size()),
                                 Scratch(dims, max_rows, scratch));
                     });
}

}  // namespace nsa::kernels::cpu
