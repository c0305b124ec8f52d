#include "nsa/passes/block_fetch.h"

#include <cstddef>
#include <vector>

namespace nsa {

absl::Status PublishBlocks(PassContext& context, const BranchTokens& tokens, void* stream) {
  const StageScope scope(context, "pack");
  NSA_RETURN_IF_ERROR(context.records->BeginWrite(stream));
  NSA_RETURN_IF_ERROR(context.kernels->PackBlocks(
      {.dims = context.dims,
       .k = tokens.k,
       .v = tokens.v,
       .documents = context.Documents(),
       .runs = context.Table<kernels::BlockRun>(context.tables.slc_runs),
       .num_runs = static_cast<int32_t>(context.rank_plan.slc_runs.size()),
       .num_blocks = context.rank_plan.num_own_slc_blocks,
       .records = context.records->data()},
      stream));
  return context.records->Publish(stream);
}

absl::StatusOr<int64_t> FetchBlocks(PassContext& context, const kernels::Queries& queries,
                                    const int32_t* block_indices, int64_t query_begin,
                                    void* stream) {
  const StageScope scope(context, "fetch");
  const WorkspaceLayout& layout = context.layout;
  int32_t* peers = context.Buffer<int32_t>(kSlotPeersBuffer);
  int64_t* offsets = context.Buffer<int64_t>(kSlotOffsetsBuffer);
  auto counter = [&context](size_t offset) {
    return context.Buffer<char>(kFetchCountersBuffer, static_cast<int64_t>(offset));
  };
  int32_t* num_slots = reinterpret_cast<int32_t*>(counter(offsetof(FetchCounters, num_slots)));
  NSA_RETURN_IF_ERROR(context.kernels->PlanFetch(
      {.dims = context.dims,
       .queries = queries,
       .block_indices = block_indices,
       .owners = {.rank = context.Table<int32_t>(context.tables.slc_owner),
                  .ordinal = context.Table<int32_t>(context.tables.slc_ordinal),
                  .blocks_of_rank = context.Table<int64_t>(context.tables.slc_blocks_of_rank),
                  .num_blocks = context.blocks.num_slc_blocks,
                  .num_ranks = context.plan.num_ranks(),
                  .this_rank = context.rank_plan.rank},
       .record_bytes = layout.record_bytes,
       .query_begin = query_begin,
       .capacity = layout.fetch_capacity,
       .locations = context.Buffer<int32_t>(kLocationsBuffer),
       .peers = peers,
       .offsets = offsets,
       .num_slots = num_slots,
       .query_end = reinterpret_cast<int64_t*>(counter(offsetof(FetchCounters, query_end))),
       .num_remote_picks =
           reinterpret_cast<int64_t*>(counter(offsetof(FetchCounters, num_remote_picks))),
       .slots_of_rank = nullptr},
      stream));
  NSA_RETURN_IF_ERROR(context.records->Gather(
      {.peers = peers, .offsets = offsets, .count = num_slots, .max_count = layout.fetch_capacity},
      layout.record_bytes, context.Buffer(kSlotsBuffer), stream));

  FetchCounters counters;
  NSA_RETURN_IF_ERROR(context.kernels->CopyToHost(&counters, context.Buffer(kFetchCountersBuffer),
                                                  sizeof(counters), stream));
  std::vector<int32_t> host_peers(counters.num_slots);
  NSA_RETURN_IF_ERROR(context.kernels->CopyToHost(
      host_peers.data(), peers, counters.num_slots * int64_t{sizeof(int32_t)}, stream));
  NSA_RETURN_IF_ERROR(context.kernels->Synchronize(stream));
  RankStats& stats = context.stats;
  for (int32_t peer : host_peers) {
    stats.set_block_bytes_from_rank(peer, stats.block_bytes_from_rank(peer) + layout.record_bytes);
  }
  stats.set_block_bytes_received(stats.block_bytes_received() +
                                 counters.num_slots * layout.record_bytes);
  stats.set_records_fetched(stats.records_fetched() + counters.num_slots);
  stats.set_remote_picks(stats.remote_picks() + counters.num_remote_picks);
  stats.set_query_pieces(stats.query_pieces() + 1);
  return counters.query_end;
}

}  // namespace nsa
