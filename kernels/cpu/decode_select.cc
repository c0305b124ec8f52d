// Decoding, second stage: ScoreAndSelect on the summaries of pages.
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/cpu/decode_pages.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"

namespace nsa::kernels::cpu {

int64_t DecodeScratchBytes(const AttentionDims& dims, const DecodeLimits& limits) {
  return 2 * BranchOutputBytes(dims, limits.num_rows);
}

absl::Status DecodeSelect(const DecodeSelectParams& params, Workers& workers) {
  const AttentionDims& dims = params.dims;
  const std::vector<Segment> segments = SegmentsOf(params.rows, params.num_rows);
  const auto find_in = [&](char* SummaryRow::*part, int32_t head_dim) {
    return [&, part, head_dim](int32_t sequence, int64_t first, int32_t count, int32_t kv_head,
                               const void** rows) {
      const int64_t offset = kv_head * head_dim * SizeOf(dims.dtype);
      for (int32_t i = 0; i < count; ++i) {
        rows[i] = SummaryOf(dims, params.tables, sequence, first + i).*part + offset;
      }
    };
  };
  const Tensor3 o_cmp = BranchOutput(dims, params.scratch);
  const absl::Status status =
      ScoreAndSelect({.dims = dims,
                      .queries = QueriesOf(dims, params.q, segments, params.num_rows),
                      .kc = {},
                      .vc = {},
                      .num_cmp_blocks = 0,
                      .num_documents = 0,
                      .o_cmp = o_cmp,
                      .lse_cmp = params.lse_cmp,
                      .block_indices = params.block_indices,
                      .scratch = nullptr},
                     find_in(&SummaryRow::kc, dims.head_dim_qk),
                     find_in(&SummaryRow::vc, dims.head_dim_v), workers);
  if (!status.ok() || params.o_cmp.data == nullptr) return status;
  for (const Segment& segment : segments) {
    for (int64_t row = segment.row; row < segment.row + segment.num_tokens; ++row) {
      for (int32_t head = 0; head < dims.num_q_heads; ++head) {
        std::memcpy(RowOf(params.o_cmp, dims.dtype, row, head), RowOf(o_cmp, dims.dtype, row, head),
                    dims.head_dim_v * SizeOf(dims.dtype));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace nsa::kernels::cpu
