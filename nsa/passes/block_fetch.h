// Step 6: own select blocks as records that peers may read, and theirs into slots.
#ifndef NSA_PASSES_BLOCK_FETCH_H_
#define NSA_PASSES_BLOCK_FETCH_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nsa/passes/context.h"
#include "nsa/passes/halo.h"

namespace nsa {

// Packs own blocks into the window of records and lets peers read them.
absl::Status PublishBlocks(PassContext& context, const BranchTokens& tokens, void* stream);

// Brings the distinct remote blocks that queries [query_begin, result) select into slots; result is
// the end of the piece that fits into the fetch budget, at most T.
absl::StatusOr<int64_t> FetchBlocks(PassContext& context, const kernels::Queries& queries,
                                    const int32_t* block_indices, int64_t query_begin,
                                    void* stream);

}  // namespace nsa

#endif  // NSA_PASSES_BLOCK_FETCH_H_
