// Stages 7 and 8: attention over the selected blocks, then the gate.
//
// An item is a run of queries of one kv head.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/float_types.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/selected_picks.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

constexpr int64_t kTargetRows = 128;

struct Scratch {
  Scratch(const AttentionDims& dims, int64_t queries, char* memory)
      : Scratch(dims, queries, Carver(memory)) {}

  float* q;              // [rows,Dk]
  float* o;              // [rows,Dv]
  float* max;            // [rows]
  float* sums;           // [rows,kLanes]
  VisibleKeys* visible;  // [rows]
  Pick* picks;           // [queries,n]
  float* keys;           // [Dk,kTileKeys]
  float* values;         // [kTileKeys,Dv]
  float* gate;           // [kLanes] three are used
  float* o_cmp;          // [Dv]
  float* o_win;          // [Dv]
  int64_t num_bytes;

 private:
  Scratch(const AttentionDims& dims, int64_t queries, Carver carver) {
    const int64_t rows = queries * dims.group_size();
    q = carver.Take<float>(rows * dims.head_dim_qk);
    o = carver.Take<float>(rows * dims.head_dim_v);
    max = carver.Take<float>(rows);
    sums = carver.Take<float>(rows * kLanes);
    visible = carver.Take<VisibleKeys>(rows);
    picks = carver.Take<Pick>(queries * dims.num_selected_blocks);
    keys = carver.Take<float>(static_cast<int64_t>(dims.head_dim_qk) * kTileKeys);
    values = carver.Take<float>(static_cast<int64_t>(kTileKeys) * dims.head_dim_v);
    gate = carver.Take<float>(kLanes);
    o_cmp = carver.Take<float>(dims.head_dim_v);
    o_win = carver.Take<float>(dims.head_dim_v);
    num_bytes = carver.num_bytes();
  }
};

float LoadGate(const GateParams& gate, int64_t token, int64_t head, int32_t branch) {
  return LoadFloat(gate.gate_dtype, gate.gate,
                   token * gate.row_stride + head * gate.head_stride + branch);
}

class Item {
 public:
  Item(const AttendSelectedParams& params, FindRecord find_record, const QueryRun& run,
       int32_t kv_head, const Scratch& s)
      : params_(params),
        find_record_(find_record),
        dims_(params.dims),
        run_(run),
        kv_head_(kv_head),
        group_size_(dims_.group_size()),
        s_(s),
        rows_{.head_dim_qk = dims_.head_dim_qk,
              .head_dim_v = dims_.head_dim_v,
              .scale = dims_.softmax_scale,
              .q = s.q,
              .o = s.o,
              .max = s.max,
              .sums = s.sums} {}

  void Run() {
    LoadQueries(dims_, params_.queries.q, dims_.head_dim_qk, run_, kv_head_, s_.q);
    ResetRows(rows_, run_.num_queries * group_size_);
    const Pick* const end = CollectPicks(dims_, params_.block_indices, run_, kv_head_, s_.picks);
    KeyTile tile;
    WalkPicks(
        dims_, run_, s_.picks, end, s_.visible,
        [&](int32_t block, int32_t first_key) {
          const int64_t first_token =
              static_cast<int64_t>(block) * dims_.select_block_tokens + first_key;
          tile = LoadTile(find_record_(run_.document, block, kv_head_), first_key,
                          run_.position + run_.num_queries - first_token);
        },
        [&](int64_t row_begin, int64_t num_rows) {
          AttendTile(rows_, row_begin, num_rows, tile, s_.visible);
        });
    for (int64_t row = 0; row < run_.num_queries * group_size_; ++row) FinishRowAndGate(row);
  }

 private:
  // Keys [first_key, first_key + kTileKeys) of a record, or those that are left, of which the run
  // sees the first `num_seen`; f32 is used in place. Values past those may be NaN: they become
  // zero.
  KeyTile LoadTile(const char* record, int32_t first_key, int64_t num_seen) const {
    const int64_t element_bytes = SizeOf(dims_.dtype);
    const int32_t block_tokens = dims_.select_block_tokens;
    const int32_t width = std::min(kTileKeys, block_tokens - first_key);
    const int64_t seen = std::min<int64_t>(width, num_seen) * dims_.head_dim_v;
    const char* const keys = record + first_key * element_bytes;
    const char* const values = record + (static_cast<int64_t>(block_tokens) * dims_.head_dim_qk +
                                         static_cast<int64_t>(first_key) * dims_.head_dim_v) *
                                            element_bytes;
    const bool in_place = dims_.dtype == DType::kF32;
    const bool sees_all = num_seen >= width;
    if (!in_place || !sees_all) {
      ToFloat(dims_.dtype, values, seen, s_.values);
      std::fill(s_.values + seen, s_.values + static_cast<int64_t>(width) * dims_.head_dim_v, 0.0f);
    }
    if (in_place) {
      return KeyTile{.keys = reinterpret_cast<const float*>(keys),
                     .key_stride = block_tokens,
                     .values = sees_all ? reinterpret_cast<const float*>(values) : s_.values,
                     .width = width};
    }
    if (width == block_tokens) {
      ToFloat(dims_.dtype, keys, static_cast<int64_t>(width) * dims_.head_dim_qk, s_.keys);
    } else {
      for (int64_t i = 0; i < dims_.head_dim_qk; ++i) {
        ToFloat(dims_.dtype, keys + i * block_tokens * element_bytes, width, s_.keys + i * width);
      }
    }
    return KeyTile{.keys = s_.keys, .key_stride = width, .values = s_.values, .width = width};
  }

  void FinishRowAndGate(int64_t row) {
    const int64_t token = run_.row + row / group_size_;
    const int64_t head = kv_head_ * group_size_ + row % group_size_;
    const GateParams& gate = params_.gate;
    float* const o = s_.o + row * dims_.head_dim_v;
    const float lse = FinishRow(rows_, row);
    if (params_.lse_slc != nullptr) params_.lse_slc[token * dims_.num_q_heads + head] = lse;
    if (params_.o_slc.data != nullptr) {
      FromFloat(dims_.dtype, o, dims_.head_dim_v, RowOf(params_.o_slc, dims_.dtype, token, head));
    }
    // Both are read before o is written, which may be o_cmp's memory.
    ToFloat(dims_.dtype, RowOf(gate.o_cmp, dims_.dtype, token, head), dims_.head_dim_v, s_.o_cmp);
    ToFloat(dims_.dtype, RowOf(gate.o_win, dims_.dtype, token, head), dims_.head_dim_v, s_.o_win);
    Scale(LoadGate(gate, token, head, 1), dims_.head_dim_v, o);
    AddScaled(s_.o_cmp, dims_.head_dim_v, LoadGate(gate, token, head, 0), o);
    AddScaled(s_.o_win, dims_.head_dim_v, LoadGate(gate, token, head, 2), o);
    FromFloat(dims_.dtype, o, dims_.head_dim_v, RowOf(gate.o, dims_.dtype, token, head));
  }

  const AttendSelectedParams& params_;
  const FindRecord find_record_;
  const AttentionDims& dims_;
  const QueryRun& run_;
  const int32_t kv_head_;
  const int64_t group_size_;
  const Scratch& s_;
  const SoftmaxRows rows_;
};

}  // namespace

absl::Status AttendSelected(const AttendSelectedParams& params, Workers& workers) {
  const int64_t record_bytes = RecordBytes(params.dims);
  const auto find_record = [&](int32_t document, int64_t block, int32_t kv_head) {
    return RecordAt(params, LocationOf(params, document, block, kv_head), record_bytes);
  };
  return AttendSelected(params, find_record, workers);
}

absl::Status AttendSelected(const AttendSelectedParams& params, FindRecord find_record,
                            Workers& workers) {
  const AttentionDims& dims = params.dims;
  const int64_t num_queries = params.query_end - params.query_begin;
  const int64_t queries_per_run =
      QueriesPerRun(params.queries, dims, num_queries, kTargetRows, workers.num_threads());
  const std::vector<QueryRun> runs =
      SplitQueries(params.queries, params.query_begin, params.query_end, queries_per_run);
  const int64_t num_runs = static_cast<int64_t>(runs.size());
  const int64_t scratch_bytes = Scratch(dims, queries_per_run, nullptr).num_bytes;
  // One kv head after another: neighbouring runs then find each other's blocks in cache.
  const HeadRange& heads = params.queries.kv_heads;
  return workers.Run(num_runs * heads.size(), scratch_bytes, [&](int64_t item, char* scratch) {
    Item(params, find_record, runs[item % num_runs],
         heads.begin + static_cast<int32_t>(item / num_runs),
         Scratch(dims, queries_per_run, scratch))
        .Run();
  });
}

}  // namespace nsa::kernels::cpu
