// The keys that a query attends to in each branch, as rows of that branch's k and v. The forward
// and its gradients walk over the same ones.
#ifndef TESTS_REFERENCE_ROWS_H_
#define TESTS_REFERENCE_ROWS_H_

#include <cstdint>
#include <vector>

#include "tests/reference/reference.h"

namespace nsa::reference {

struct QueryPosition {
  int64_t t = 0;                // in its document
  int64_t document_begin = 0;   // first token of its document in the packed sequence
  int64_t cmp_block_begin = 0;  // first compression block of its document among all
  int64_t num_cmp_blocks = 0;   // of its document
};

// `token` is a position in the packed sequence.
QueryPosition Locate(const ReferenceConfig& config, const std::vector<int64_t>& cu_seqlens,
                     int64_t token);

// Compression blocks that end at the query or before it.
std::vector<int64_t> CompressedRows(const ReferenceConfig& config, const QueryPosition& query);

// Tokens of `blocks` [n] (-1: none) up to the query.
std::vector<int64_t> SelectedRows(const ReferenceConfig& config, const QueryPosition& query,
                                  const int32_t* blocks);

// The last w tokens, the query's own counted in.
std::vector<int64_t> WindowRows(const ReferenceConfig& config, const QueryPosition& query);

}  // namespace nsa::reference

#endif  // TESTS_REFERENCE_ROWS_H_
