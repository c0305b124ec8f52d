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

// Brings the distinct remote blocks that `queries` from query_begin on select into slots, of as
// many queries as the fetch budget allows: of all, when it holds every block that their kv heads
// can select. `piece` numbers the fetches of a call whose counters are kept. `stream`: beside the
// call's.
absl::Status FetchBlocks(PassContext& context, const kernels::Queries& queries,
                         const int32_t* block_indices, int64_t query_begin, int piece,
                         void* stream);

// Waits for a fetch on `stream` and adds what it moved to `stats`. Returns the end of its queries.
absl::StatusOr<int64_t> ReadFetchCounters(PassContext& context, int piece, void* stream,
                                          RankStats& stats);

}  // namespace nsa

#endif  // NSA_PASSES_BLOCK_FETCH_H_
