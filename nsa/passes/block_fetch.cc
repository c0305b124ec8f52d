#include "nsa/passes/block_fetch.h"

#include <cstring>
#include <vector>

namespace nsa {
namespace {

int64_t CountersOffset(const PassContext& context, int piece) {
  return piece * FetchCounterBytes(context.plan.num_ranks());
}

kernels::BlockOwners OwnersOf(const PassContext& context) {
  return {.rank = context.Table<int32_t>(context.tables.slc_owner),
          .ordinal = context.Table<int32_t>(context.tables.slc_ordinal),
          .blocks_of_rank = context.Table<int64_t>(context.tables.slc_blocks_of_rank),
          .num_blocks = context.blocks.num_slc_blocks,
          .num_ranks = context.plan.num_ranks(),
          .this_rank = context.rank_plan.rank};
}

}  // namespace

absl::Status WriteOwnLocations(const PassContext& context, int32_t* table, void* stream) {
  const BlockMap& blocks = context.blocks;
  std::vector<int32_t> locations;
  for (int32_t head = 0; head < context.dims.num_kv_heads; ++head) {
    for (int64_t block = 0; block < blocks.num_slc_blocks; ++block) {
      const int64_t record =
          head * context.rank_plan.num_own_slc_blocks + blocks.slc_ordinal[block];
      const bool is_own = blocks.slc_owner[block] == context.rank_plan.rank;
      locations.push_back(is_own ? static_cast<int32_t>(record) : -1);
    }
  }
  NSA_RETURN_IF_ERROR(context.kernels->CopyFromHost(
      context.LocationsIn(table), locations.data(),
      static_cast<int64_t>(locations.size() * sizeof(int32_t)), stream));
  return context.kernels->Synchronize(stream);
}

absl::Status PublishBlocks(PassContext& context, const BranchTokens& tokens, void* stream) {
  const StageScope scope(context.stages, "pack", stream);
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

absl::Status PublishAgain(PassContext& context, void* stream) {
  NSA_RETURN_IF_ERROR(context.records->BeginWrite(stream));
  return context.records->Publish(stream);
}

absl::Status FetchBlocks(PassContext& context, const kernels::Queries& queries,
                         const int32_t* block_indices, int64_t query_begin, int piece,
                         void* stream) {
  const StageScope scope(context.stages, "fetch", stream, StageScope::kBeside);
  const WorkspaceLayout& layout = context.layout;
  int32_t* peers = context.Buffer<int32_t>(kSlotPeersBuffer);
  int64_t* offsets = context.Buffer<int64_t>(kSlotOffsetsBuffer);
  const int64_t counters = CountersOffset(context, piece);
  FetchCounters* const scalars = context.Buffer<FetchCounters>(kFetchCountersBuffer, counters);
  NSA_RETURN_IF_ERROR(context.kernels->PlanFetch(
      {.dims = context.dims,
       .queries = queries,
       .block_indices = block_indices,
       .owners = OwnersOf(context),
       .record_bytes = layout.record_bytes,
       .query_begin = query_begin,
       .capacity = layout.fetch_capacity,
       .locations = context.Locations(),
       .peers = peers,
       .offsets = offsets,
       .num_slots = &scalars->num_slots,
       .query_end = &scalars->query_end,
       .num_remote_picks = &scalars->num_remote_picks,
       .slots_of_rank = context.Buffer<int64_t>(kFetchCountersBuffer,
                                                counters + int64_t{sizeof(FetchCounters)})},
      stream));
  return context.records->Gather({.peers = peers,
                                  .offsets = offsets,
                                  .count = &scalars->num_slots,
                                  .max_count = layout.fetch_capacity},
                                 layout.record_bytes, context.Slots(queries.kv_heads.begin),
                                 stream);
}

absl::StatusOr<int64_t> ReadFetchCounters(PassContext& context, int piece, void* stream,
                                          RankStats& stats) {
  const int num_ranks = context.plan.num_ranks();
  std::vector<char> bytes(FetchCounterBytes(num_ranks));
  NSA_RETURN_IF_ERROR(context.kernels->CopyToHost(
      bytes.data(), context.Buffer(kFetchCountersBuffer, CountersOffset(context, piece)),
      FetchCounterBytes(num_ranks), stream));
  NSA_RETURN_IF_ERROR(context.kernels->Synchronize(stream));
  FetchCounters counters;
  std::memcpy(&counters, bytes.data(), sizeof(counters));
  std::vector<int64_t> slots_of_rank(num_ranks);
  std::memcpy(slots_of_rank.data(), bytes.data() + sizeof(counters), num_ranks * sizeof(int64_t));
  const int64_t record_bytes = context.layout.record_bytes;
  for (int rank = 0; rank < num_ranks; ++rank) {
    stats.set_block_bytes_from_rank(
        rank, stats.block_bytes_from_rank(rank) + slots_of_rank[rank] * record_bytes);
  }
  stats.set_block_bytes_received(stats.block_bytes_received() + counters.num_slots * record_bytes);
  stats.set_records_fetched(stats.records_fetched() + counters.num_slots);
  stats.set_remote_picks(stats.remote_picks() + counters.num_remote_picks);
  return counters.query_end;
}

absl::Status AllGatherLocations(PassContext& context, kernels::HeadRange kv_heads, void* stream) {
  const int64_t num_blocks = context.blocks.num_slc_blocks;
  const int64_t table = context.dims.num_kv_heads * num_blocks;  // of one rank
  std::vector<comm::GatherRun> runs;
  for (int rank = 0; rank < context.plan.num_ranks(); ++rank) {
    runs.push_back(
        {.rank = rank,
         .offset_bytes = (rank * table + kv_heads.begin * num_blocks) * int64_t{sizeof(int32_t)},
         .num_bytes = kv_heads.size() * num_blocks * int64_t{sizeof(int32_t)}});
  }
  return context.communicator->AllGather(context.locations, runs, stream);
}

absl::Status ReturnSlotGradients(PassContext& context, kernels::HeadRange kv_heads, int piece,
                                 void* stream) {
  const StageScope scope(context.stages, "return blocks", stream, StageScope::kBeside);
  const kernels::AttentionDims& dims = context.dims;
  const int num_ranks = context.plan.num_ranks();
  const int64_t num_blocks = context.blocks.num_slc_blocks;
  const int64_t record_bytes = RecordGradientBytes(dims);
  const int64_t table = dims.num_kv_heads * num_blocks;  // of one rank's locations
  const int64_t capacity = kv_heads.size() * context.rank_plan.num_own_slc_blocks;
  auto* const offsets = context.Buffer<int64_t>(kReturnListBuffer);
  auto* const peers = reinterpret_cast<int32_t*>(offsets + capacity);
  int32_t* const own_records = peers + capacity;
  auto* const returned = context.Buffer<float>(kReturnedBuffer);
  for (int peer = 0; peer < num_ranks; ++peer) {
    if (peer == context.rank_plan.rank || capacity == 0) continue;
    int32_t* const count =
        context.Buffer<int32_t>(kReturnCountersBuffer) + piece * num_ranks + peer;
    NSA_RETURN_IF_ERROR(context.kernels->PlanReturn(
        {.dims = dims,
         .kv_heads = kv_heads,
         .peer_locations = context.locations + peer * table,
         .peer_own_records = context.blocks.slc_blocks_of_rank[peer] * dims.num_kv_heads,
         .peer = peer,
         .owners = OwnersOf(context),
         .record_gradient_bytes = record_bytes,
         .capacity = capacity,
         .peers = peers,
         .offsets = offsets,
         .own_records = own_records,
         .count = count},
        stream));
    NSA_RETURN_IF_ERROR(context.slot_gradients->Gather(
        {.peers = peers, .offsets = offsets, .count = count, .max_count = capacity}, record_bytes,
        returned, stream));
    NSA_RETURN_IF_ERROR(
        context.kernels->AddIndexedRows({.dst = context.Buffer<float>(kRecordGradientsBuffer),
                                         .src = returned,
                                         .rows = own_records,
                                         .count = count,
                                         .max_count = capacity,
                                         .row_elements = record_bytes / int64_t{sizeof(float)}},
                                        stream));
  }
  return context.slot_gradients->Release(stream);
}

absl::Status ReadReturnCounters(PassContext& context, int num_pieces, void* stream,
                                RankStats& stats) {
  if (context.rank_plan.num_own_slc_blocks == 0) return absl::OkStatus();  // nothing is counted
  const int num_ranks = context.plan.num_ranks();
  std::vector<int32_t> counts(num_pieces * num_ranks);
  NSA_RETURN_IF_ERROR(
      context.kernels->CopyToHost(counts.data(), context.Buffer(kReturnCountersBuffer),
                                  static_cast<int64_t>(counts.size() * sizeof(int32_t)), stream));
  NSA_RETURN_IF_ERROR(context.kernels->Synchronize(stream));
  int64_t received = 0;
  for (int piece = 0; piece < num_pieces; ++piece) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      if (rank != context.rank_plan.rank) received += counts[piece * num_ranks + rank];
    }
  }
  stats.set_block_gradients_received(received);
  stats.set_gradient_bytes_received(stats.gradient_bytes_received() +
                                    received * RecordGradientBytes(context.dims));
  return absl::OkStatus();
}

}  // namespace nsa
