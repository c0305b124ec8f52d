// Where tokens and queries lie: from documents and positions to addresses, and the query loop cut
// into items of work.
#ifndef KERNELS_CPU_ROWS_H_
#define KERNELS_CPU_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/tile_ops.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

inline const void* RowOf(const ConstTensor3& tensor, DType dtype, int64_t row, int64_t head) {
  return static_cast<const char*>(tensor.data) +
         (row * tensor.row_stride + head * tensor.head_stride) * SizeOf(dtype);
}

inline void* RowOf(const Tensor3& tensor, DType dtype, int64_t row, int64_t head) {
  return static_cast<char*>(tensor.data) +
         (row * tensor.row_stride + head * tensor.head_stride) * SizeOf(dtype);
}

// rows[i] = where token `position` + i of a document lies for `head`, own or halo; null for tokens
// that no segment covers.
void FindTokens(const TokenRows& tokens, DType dtype, int32_t document, int64_t position,
                int32_t count, int32_t head, const void** rows);

// rows[i] = where the gradient of that token goes, for gradients of `tokens`, whose rows are dense
// [Hkv,head_dim] ones.
void FindGradients(const TokenRows& tokens, const TokenGradients& gradients,
                   const AttentionDims& dims, int32_t head_dim, int32_t document, int64_t position,
                   int32_t count, int32_t head, float** rows);

// Consecutive tokens of a document.
struct TokenRun {
  int32_t document;
  int64_t position;
  int32_t num_tokens;
};

// The tokens of all segments in runs of at most `max_tokens`.
std::vector<TokenRun> SplitTokens(const TokenRows& tokens, int64_t max_tokens);

// `sums` [num_tokens,head_dim] go where the gradients of the run's tokens are, in place of what is
// there or added to it. All of the run are covered by segments; `rows` has room for num_tokens.
void StoreTokenGradients(const TokenRows& tokens, const TokenGradients& gradients,
                         const AttentionDims& dims, int32_t head_dim, const TokenRun& run,
                         int32_t head, const float* sums, float** rows);

// Compression blocks that the token at `position` of its document sees.
int64_t NumVisibleSummaries(const AttentionDims& dims, int64_t position);

// The tokens of [first_key, first_key + width) in the window of the token at `position`; at least
// one.
VisibleKeys WindowKeys(const AttentionDims& dims, int64_t position, int64_t first_key,
                       int32_t width);

struct BlockPlace {
  int32_t document;
  int64_t block;  // in the document
};

// Each block of the runs.
std::vector<BlockPlace> PlacesOfBlocks(const BlockRun* runs, int32_t num_runs, int64_t num_blocks);

// Consecutive queries of one document.
struct QueryRun {
  int32_t document = 0;
  int64_t position = 0;  // of the first one in its document
  int64_t row = 0;       // of the first one
  int64_t num_queries = 0;
};

// Queries [row_begin, row_end) in runs of at most `max_queries`; those late in their documents,
// which cost most, come first.
std::vector<QueryRun> SplitQueries(const Queries& queries, int64_t row_begin, int64_t row_end,
                                   int64_t max_queries);

// visit(run) for the queries of `document` at positions [begin, end), in runs of at most
// `max_queries`.
template <class Visit>
void ForEachRun(const Queries& queries, int32_t document, int64_t begin, int64_t end,
                int64_t max_queries, const Visit& visit) {
  for (int32_t i = 0; i < queries.num_segments; ++i) {
    const Segment& segment = queries.segments[i];
    if (segment.document != document) continue;
    const int64_t last = std::min(end, segment.position + segment.num_tokens);
    for (int64_t position = std::max(begin, segment.position); position < last;
         position += max_queries) {
      visit(QueryRun{.document = document,
                     .position = position,
                     .row = segment.row + (position - segment.position),
                     .num_queries = std::min(max_queries, last - position)});
    }
  }
}

// How many of `num_queries` queries of G heads a run has at most, for about `target_rows` rows of
// work at a time, and enough runs of the kv heads of `queries` to keep `num_threads` busy.
int64_t QueriesPerRun(const Queries& queries, const AttentionDims& dims, int64_t num_queries,
                      int64_t target_rows, int num_threads);

// Rows of the run's queries of `tensor` [T,Hq,head_dim] for the heads of `kv_head`, as f32: row
// i * G + g of [rows,head_dim].
void LoadQueries(const AttentionDims& dims, const ConstTensor3& tensor, int32_t head_dim,
                 const QueryRun& run, int32_t kv_head, float* rows);

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_ROWS_H_
