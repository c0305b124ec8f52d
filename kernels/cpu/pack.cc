// Copies: halo rows into a dense buffer, select blocks into records, and pieces of memory.
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

// dst [head_dim,num_tokens] = the transposed of rows [num_tokens][head_dim]; null rows are zero.
template <class Bits>
void TransposeRows(const void* const* rows, int64_t num_tokens, int64_t head_dim, void* dst) {
  Bits* const columns = static_cast<Bits*>(dst);
  // A line of dst gets its values from kLanes rows at a time, so that it stays in cache meanwhile.
  for (int64_t first = 0; first < num_tokens; first += kLanes) {
    for (int64_t i = 0; i < head_dim; ++i) {
      for (int64_t t = first; t < first + kLanes; ++t) {
        const Bits* const row = static_cast<const Bits*>(rows[t]);
        columns[i * num_tokens + t] = row == nullptr ? Bits{0} : row[i];
      }
    }
  }
}

}  // namespace

int64_t RecordBytes(const AttentionDims& dims) {
  const int64_t bytes = dims.select_block_tokens *
                        static_cast<int64_t>(dims.head_dim_qk + dims.head_dim_v) *
                        SizeOf(dims.dtype);
  return (bytes + 63) / 64 * 64;
}

absl::Status PackBlocks(const PackBlocksParams& params, Workers& workers) {
  const AttentionDims& dims = params.dims;
  const int64_t block_tokens = dims.select_block_tokens;
  const int64_t element_bytes = SizeOf(dims.dtype);
  const int64_t record_bytes = RecordBytes(dims);
  const std::vector<BlockPlace> places =
      PlacesOfBlocks(params.runs, params.num_runs, params.num_blocks);
  // An item is one record: [kv head, block].
  const int64_t num_items = params.num_blocks * dims.num_kv_heads;
  const int64_t scratch_bytes = block_tokens * static_cast<int64_t>(sizeof(void*));
  return workers.Run(num_items, scratch_bytes, [&](int64_t item, char* scratch) {
    const int32_t head = static_cast<int32_t>(item / params.num_blocks);
    const BlockPlace& place = places[item % params.num_blocks];
    const void** const rows = reinterpret_cast<const void**>(scratch);
    char* const record = static_cast<char*>(params.records) + item * record_bytes;
    const int64_t position = place.block * block_tokens;

    FindTokens(params.k, dims.dtype, place.document, position, block_tokens, head, rows);
    if (element_bytes == 2) {
      TransposeRows<uint16_t>(rows, block_tokens, dims.head_dim_qk, record);
    } else {
      TransposeRows<uint32_t>(rows, block_tokens, dims.head_dim_qk, record);
    }
    FindTokens(params.v, dims.dtype, place.document, position, block_tokens, head, rows);
    const int64_t v_row_bytes = dims.head_dim_v * element_bytes;
    char* v = record + block_tokens * dims.head_dim_qk * element_bytes;
    for (int64_t t = 0; t < block_tokens; ++t, v += v_row_bytes) {
      if (rows[t] == nullptr) {
        std::memset(v, 0, v_row_bytes);
      } else {
        std::memcpy(v, rows[t], v_row_bytes);
      }
    }
  });
}

void CopyRows(const CopyRowsParams& params) {
  const int64_t head_bytes = params.head_dim * SizeOf(params.dtype);
  char* dst = static_cast<char*>(params.dst);
  for (int32_t s = 0; s < params.num_segments; ++s) {
    const Segment& segment = params.segments[s];
    for (int64_t row = segment.row; row < segment.row + segment.num_tokens; ++row) {
      for (int32_t head = 0; head < params.num_heads; ++head) {
        std::memcpy(dst, RowOf(params.src, params.dtype, row, head), head_bytes);
        dst += head_bytes;
      }
    }
  }
}

absl::Status CopyPieces(const CopyPiecesParams& params, Workers& workers) {
  return workers.Run(params.count, 0, [&](int64_t i, char*) {
    std::memcpy(params.dst[i], params.src[i], params.num_bytes);
  });
}

}  // namespace nsa::kernels::cpu
