#include "kernels/cpu/rows.h"

#include <algorithm>
#include <utility>

#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {

void FindTokens(const TokenRows& tokens, DType dtype, int32_t document, int64_t position,
                int32_t count, int32_t head, const void** rows) {
  const Segment* const end = tokens.segments + tokens.num_segments;
  // The first segment that begins after `position`; the one before it may cover the position.
  const Segment* next =
      std::upper_bound(tokens.segments, end, std::make_pair(document, position),
                       [](const std::pair<int32_t, int64_t>& place, const Segment& segment) {
                         return place < std::make_pair(segment.document, segment.position);
                       });
  const Segment* segment = next == tokens.segments ? nullptr : next - 1;
  for (int32_t i = 0; i < count; ++i) {
    if (next != end && next->document == document && next->position == position + i) {
      segment = next++;
    }
    const bool covered = segment != nullptr && segment->document == document &&
                         position + i < segment->position + segment->num_tokens;
    rows[i] = covered ? RowOf(segment->is_halo != 0 ? tokens.halo : tokens.own, dtype,
                              segment->row + (position + i - segment->position), head)
                      : nullptr;
  }
}

void FindGradients(const TokenRows& tokens, const TokenGradients& gradients,
                   const AttentionDims& dims, int32_t head_dim, int32_t document, int64_t position,
                   int32_t count, int32_t head, float** rows) {
  const int64_t row_stride = static_cast<int64_t>(dims.num_kv_heads) * head_dim;
  const TokenRows places{.own = {gradients.own, row_stride, head_dim},
                         .halo = {gradients.halo, row_stride, head_dim},
                         .segments = tokens.segments,
                         .num_segments = tokens.num_segments};
  FindTokens(places, DType::kF32, document, position, count, head,
             const_cast<const void**>(reinterpret_cast<void**>(rows)));
}

std::vector<TokenRun> SplitTokens(const TokenRows& tokens, int64_t max_tokens) {
  std::vector<TokenRun> runs;
  for (int32_t i = 0; i < tokens.num_segments; ++i) {
    const Segment& segment = tokens.segments[i];
    for (int64_t t = 0; t < segment.num_tokens; t += max_tokens) {
      runs.push_back({segment.document, segment.position + t,
                      static_cast<int32_t>(std::min(max_tokens, segment.num_tokens - t))});
    }
  }
  return runs;
}

void StoreTokenGradients(const TokenRows& tokens, const TokenGradients& gradients,
                         const AttentionDims& dims, int32_t head_dim, const TokenRun& run,
                         int32_t head, const float* sums, float** rows) {
  FindGradients(tokens, gradients, dims, head_dim, run.document, run.position, run.num_tokens, head,
                rows);
  for (int32_t i = 0; i < run.num_tokens; ++i) {
    if (!gradients.adds) std::fill_n(rows[i], head_dim, 0.0f);
    AddScaled(sums + static_cast<int64_t>(i) * head_dim, head_dim, 1.0f, rows[i]);
  }
}

int64_t NumVisibleSummaries(const AttentionDims& dims, int64_t position) {
  const int64_t past_first = position + 1 - dims.compress_block_tokens;
  return past_first < 0 ? 0 : past_first / dims.compress_stride_tokens + 1;
}

VisibleKeys WindowKeys(const AttentionDims& dims, int64_t position, int64_t first_key,
                       int32_t width) {
  return {.begin = static_cast<int32_t>(
              std::max<int64_t>(0, position - dims.window_tokens + 1 - first_key)),
          .end = static_cast<int32_t>(std::min<int64_t>(width, position + 1 - first_key))};
}

std::vector<BlockPlace> PlacesOfBlocks(const BlockRun* runs, int32_t num_runs, int64_t num_blocks) {
  std::vector<BlockPlace> places;
  places.reserve(num_blocks);
  for (int32_t r = 0; r < num_runs; ++r) {
    for (int64_t b = 0; b < runs[r].num_blocks; ++b) {
      places.push_back({runs[r].document, runs[r].first_block + b});
    }
  }
  return places;
}

std::vector<QueryRun> SplitQueries(const Queries& queries, int64_t row_begin, int64_t row_end,
                                   int64_t max_queries) {
  std::vector<QueryRun> runs;
  for (int32_t i = 0; i < queries.num_segments; ++i) {
    const Segment& segment = queries.segments[i];
    const int64_t end = std::min(segment.row + segment.num_tokens, row_end);
    for (int64_t row = std::max(segment.row, row_begin); row < end; row += max_queries) {
      runs.push_back(QueryRun{.document = segment.document,
                              .position = segment.position + (row - segment.row),
                              .row = row,
                              .num_queries = std::min(max_queries, end - row)});
    }
  }
  std::stable_sort(runs.begin(), runs.end(), [](const QueryRun& a, const QueryRun& b) {
    return a.position + a.num_queries > b.position + b.num_queries;
  });
  return runs;
}

int64_t QueriesPerRun(const Queries& queries, const AttentionDims& dims, int64_t num_queries,
                      int64_t target_rows, int num_threads) {
  const int64_t wanted = target_rows / dims.group_size();
  // A few items a thread even out what they cost; one thread has nothing to even out.
  const int64_t items = num_threads == 1 ? 1 : 4 * num_threads;
  const int64_t balanced = (num_queries * queries.kv_heads.size() + items - 1) / items;
  return std::max<int64_t>(1, std::min(wanted, balanced));
}

void LoadQueries(const AttentionDims& dims, const ConstTensor3& tensor, int32_t head_dim,
                 const QueryRun& run, int32_t kv_head, float* rows) {
  const int32_t group_size = dims.group_size();
  for (int64_t i = 0; i < run.num_queries; ++i) {
    for (int32_t g = 0; g < group_size; ++g) {
      ToFloat(dims.dtype, RowOf(tensor, dims.dtype, run.row + i, kv_head * group_size + g),
              head_dim, rows);
      rows += head_dim;
    }
  }
}

}  // namespace nsa::kernels::cpu
