// Step 6: own select blocks as records that peers may read, and theirs into slots.
#ifndef NSA_PASSES_BLOCK_FETCH_H_
#define NSA_PASSES_BLOCK_FETCH_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nsa/passes/context.h"
#include "nsa/passes/halo.h"

namespace nsa {

// Streaming multiprocessors that a fetch saturates the links with (16 CTAs that copy in bulk).
constexpr int32_t kSmsOfFetch = 16;

// Where own blocks lie, in this rank's part of a table of locations; -1 for others. Planning a
// fetch writes the same and the others' slots, but a rank that nothing remote is visible to never
// does. Waits for `stream`.
absl::Status WriteOwnLocations(const PassContext& context, int32_t* table, void* stream);

// Packs own blocks into the window of records and lets peers read them.
absl::Status PublishBlocks(PassContext& context, const BranchTokens& tokens, void* stream);

// Begins another epoch of the same records.
absl::Status PublishAgain(PassContext& context, void* stream);

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

// Collective: where all ranks' slots of these kv heads lie, which their return asks for.
absl::Status AllGatherLocations(PassContext& context, kernels::HeadRange kv_heads, void* stream);

// Step 6 backwards: adds what the peers' slots of `piece`, of these kv heads, have for own records,
// rank by rank, once they have published them; releases the window. `stream`: beside the call's.
absl::Status ReturnSlotGradients(PassContext& context, kernels::HeadRange kv_heads, int piece,
                                 void* stream);

// Waits for `stream` and adds what the pieces' returns moved to `stats`.
absl::Status ReadReturnCounters(PassContext& context, int num_pieces, void* stream,
                                RankStats& stats);

}  // namespace nsa

#endif  // NSA_PASSES_BLOCK_FETCH_H_
