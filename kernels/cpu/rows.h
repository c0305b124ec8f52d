// Where tokens and queries lie: from documents and positions to addresses, and the query loop cut
// into items of work.
#ifndef KERNELS_CPU_ROWS_H_
#define KERNELS_CPU_ROWS_H_

#include <cstdint>
#include <vector>

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

// Consecutive queries of one document.
struct QueryRun {
  int32_t document;
  int64_t position;  // of the first one in its document
  int64_t row;       // of the first one
  int64_t num_queries;
};

// Queries [row_begin, row_end) in runs of at most `max_queries`; those late in their documents,
// which cost most, come first.
std::vector<QueryRun> SplitQueries(const Queries& queries, int64_t row_begin, int64_t row_end,
                                   int64_t max_queries);

// How many of `num_queries` queries of G heads a run has at most, for about `target_rows` rows of
// work at a time, and enough runs of the kv heads of `queries` to keep `num_threads` busy.
int64_t QueriesPerRun(const Queries& queries, const AttentionDims& dims, int64_t num_queries,
                      int64_t target_rows, int num_threads);

// q of the run's queries for the heads of `kv_head`, as f32: row i * G + g of [rows,Dk].
void LoadQueries(const AttentionDims& dims, const Queries& queries, const QueryRun& run,
                 int32_t kv_head, float* q);

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_ROWS_H_
