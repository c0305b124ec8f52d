// Gradients on their way: from records to tokens, from rank to rank, to the caller.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

// Elements that StoreGradient converts at a time.
constexpr int64_t kChunk = 256;

}  // namespace

absl::Status UnpackGradients(const UnpackGradientsParams& params, Workers& workers) {
  const AttentionDims& dims = params.dims;
  const int64_t block_tokens = dims.select_block_tokens;
  const int64_t record_values =
      block_tokens * static_cast<int64_t>(dims.head_dim_qk + dims.head_dim_v);
  const TokenRows tokens{
      .own = {}, .halo = {}, .segments = params.segments, .num_segments = params.num_segments};
  const std::vector<BlockPlace> places =
      PlacesOfBlocks(params.runs, params.num_runs, params.num_blocks);
  // An item is one record: [kv head, block]. Blocks do not overlap.
  const int64_t num_items = params.num_blocks * dims.num_kv_heads;
  const int64_t scratch_bytes = block_tokens * static_cast<int64_t>(sizeof(float*));
  return workers.Run(num_items, scratch_bytes, [&](int64_t item, char* scratch) {
    const int32_t head = static_cast<int32_t>(item / params.num_blocks);
    const BlockPlace& place = places[item % params.num_blocks];
    float** const rows = reinterpret_cast<float**>(scratch);
    const float* src = params.record_gradients + item * record_values;
    const auto add = [&](const TokenGradients& gradients, int32_t head_dim) {
      FindGradients(tokens, gradients, dims, head_dim, place.document, place.block * block_tokens,
                    dims.select_block_tokens, head, rows);
      for (int64_t t = 0; t < block_tokens; ++t, src += head_dim) {
        if (rows[t] != nullptr) AddScaled(src, head_dim, 1.0f, rows[t]);
      }
    };
    add(params.dk, dims.head_dim_qk);
    add(params.dv, dims.head_dim_v);
  });
}

void PlanReturn(const PlanReturnParams& params) {
  const BlockOwners& owners = params.owners;
  int32_t count = 0;
  for (int32_t head = params.kv_heads.begin; head < params.kv_heads.end; ++head) {
    for (int64_t block = 0; block < owners.num_blocks; ++block) {
      if (owners.rank[block] != owners.this_rank) continue;
      const int64_t location = params.peer_locations[head * owners.num_blocks + block];
      if (location < 0) continue;
      params.peers[count] = params.peer;
      params.offsets[count] = (location - params.peer_own_records) * params.record_gradient_bytes;
      params.own_records[count] = static_cast<int32_t>(
          head * owners.blocks_of_rank[owners.this_rank] + owners.ordinal[block]);
      ++count;
    }
  }
  *params.count = count;
}

absl::Status AddIndexedRows(const AddIndexedRowsParams& params, Workers& workers) {
  const int64_t n = params.row_elements;
  return workers.Run(*params.count, 0, [&](int64_t i, char*) {
    AddScaled(params.src + i * n, n, 1.0f, params.dst + params.rows[i] * n);
  });
}

absl::Status AddRows(const AddRowsParams& params, Workers& workers) {
  std::vector<int64_t> begins(1, 0);  // in src, of each segment
  for (int32_t s = 0; s < params.num_segments; ++s) {
    begins.push_back(begins.back() + params.segments[s].num_tokens);
  }
  const int64_t n = params.row_elements;
  return workers.Run(params.num_segments, 0, [&](int64_t s, char*) {
    const Segment& segment = params.segments[s];
    AddScaled(params.src + begins[s] * n, segment.num_tokens * n, 1.0f,
              params.dst + segment.row * n);
  });
}

absl::Status StoreGradient(const StoreGradientParams& params, Workers& workers) {
  const DType dtype = params.dst_dtype;
  return workers.Run(params.num_rows, 0, [&](int64_t row, char*) {
    // Whole lanes, also of the last piece of a row.
    float sum[kChunk] = {}, before[kChunk];
    alignas(float) char stored[kChunk * sizeof(float)] = {};
    for (int32_t head = 0; head < params.num_heads; ++head) {
      char* dst = static_cast<char*>(RowOf(params.dst, dtype, row, head));
      const float* src = params.src + (row * params.num_heads + head) * params.head_dim;
      for (int64_t first = 0; first < params.head_dim; first += kChunk) {
        const int64_t count = std::min(kChunk, params.head_dim - first);
        const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
        const int64_t num_bytes = count * SizeOf(dtype);
        std::copy_n(src + first, count, sum);
        if (params.adds) {
          std::memcpy(stored, dst, num_bytes);
          ToFloat(dtype, stored, padded, before);
          AddScaled(before, padded, 1.0f, sum);
        }
        FromFloat(dtype, sum, padded, stored);
        std::memcpy(dst, stored, num_bytes);
        dst += num_bytes;
      }
    }
  });
}

}  // namespace nsa::kernels::cpu
