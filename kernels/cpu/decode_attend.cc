// Decoding, last stage: AttendWindow and AttendSelected on the records of pages.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/decode_pages.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {

absl::Status DecodeAttend(const DecodeAttendParams& params, Workers& workers) {
  const AttentionDims& dims = params.dims;
  const int64_t block_tokens = dims.select_block_tokens;
  const int64_t dk = dims.head_dim_qk, dv = dims.head_dim_v;
  const int64_t element_bytes = SizeOf(dims.dtype);
  const std::vector<Segment> segments = SegmentsOf(params.rows, params.num_rows);
  const Queries queries = QueriesOf(dims, params.q, segments, params.num_rows);
  const Tensor3 o_cmp = BranchOutput(dims, params.scratch);
  const Tensor3 o_win = params.o_win.data != nullptr
                            ? params.o_win
                            : BranchOutput(dims, static_cast<char*>(params.scratch) +
                                                     BranchOutputBytes(dims, params.num_rows));

  // A tile is a part of a page, or parts of some; only pages with a token that is seen are there.
  const auto load_tile = [&](int32_t sequence, int64_t tile, int32_t kv_head, VisibleKeys seen,
                             float* keys, float* values) {
    std::fill_n(values, kTileKeys * dv, 0.0f);
    const int64_t end = tile + seen.end;
    for (int64_t token = tile + seen.begin, next; token < end; token = next) {
      const int64_t page_begin = token / block_tokens * block_tokens;
      next = std::min(end, page_begin + block_tokens);
      const char* const record = RecordOf(dims, params.tables, params.tables.win, sequence,
                                          page_begin / block_tokens, kv_head);
      // Tiles and pages begin and end at multiples of kLanes.
      const int64_t first = token / kLanes * kLanes;
      const int64_t count = (next - first + kLanes - 1) / kLanes * kLanes;
      for (int64_t i = 0; i < dk; ++i) {
        ToFloat(dims.dtype, record + (i * block_tokens + first - page_begin) * element_bytes, count,
                keys + i * kTileKeys + (first - tile));
      }
      ToFloat(dims.dtype, record + (block_tokens * dk + (token - page_begin) * dv) * element_bytes,
              (next - token) * dv, values + (token - tile) * dv);
    }
  };
  const absl::Status status = AttendWindow({.dims = dims,
                                            .queries = queries,
                                            .k = {},
                                            .v = {},
                                            .o_win = o_win,
                                            .lse_win = params.lse_win},
                                           load_tile, workers);
  if (!status.ok()) return status;

  const auto find_record = [&](int32_t sequence, int64_t block, int32_t kv_head) {
    return RecordOf(dims, params.tables, params.tables.slc, sequence, block, kv_head);
  };
  return AttendSelected({.dims = dims,
                         .queries = queries,
                         .query_begin = 0,
                         .query_end = params.num_rows,
                         .block_indices = params.block_indices,
                         .locations = nullptr,
                         .num_blocks = 0,
                         .own_records = nullptr,
                         .num_own_records = 0,
                         .slots = nullptr,
                         .o_slc = params.o_slc,
                         .lse_slc = params.lse_slc,
                         .gate = {.gate = params.gate,
                                  .gate_dtype = params.gate_dtype,
                                  .row_stride = params.gate_row_stride,
                                  .head_stride = params.gate_head_stride,
                                  .o_cmp = {o_cmp.data, o_cmp.row_stride, o_cmp.head_stride},
                                  .o_win = {o_win.data, o_win.row_stride, o_win.head_stride},
                                  .o = params.o}},
                        find_record, workers);
}

}  // namespace nsa::kernels::cpu
