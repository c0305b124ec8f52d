// Stage 6, first half, without a step on the host: which remote blocks to gather, and where each
// selected block will lie.
//
// 1. `locations` holds, for each (kv head, block), the first query that selects it.
// 2. One CTA finds the last query whose blocks fit: with more distinct remote blocks than slots,
//    the first query that does not fit is the (capacity + 1)-th smallest of those first queries.
//    Blocks that queries before it select get their places, by a scan in (kv head, block) order.
// 3. The picks of those queries are counted.
#include <climits>

#include "kernels/cuda/cta_scan.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int32_t kNotSelected = INT_MAX;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPlanThreads = 1024;

// The part of `locations` that the call is about: [kv heads of the call, B].
__host__ __device__ inline int64_t NumPlaces(const PlanFetchParams& params) {
  return params.queries.kv_heads.size() * params.owners.num_blocks;
}
__device__ int32_t* Places(const PlanFetchParams& params) {
  return params.locations + params.queries.kv_heads.begin * params.owners.num_blocks;
}

// Grid: covers the table.
__global__ void __launch_bounds__(kThreads) ClearLocations(PlanFetchParams params) {
  const int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (i < NumPlaces(params)) Places(params)[i] = kNotSelected;
}

// Calls visit(kv head, global block) for each block that a query selects; the lanes of a warp share
// a query. `end` bounds the queries.
template <class Visit>
__device__ void ForEachPick(const PlanFetchParams& params, int64_t end, const Visit& visit) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t n = params.dims.num_selected_blocks;
  const HeadRange& heads = params.queries.kv_heads;
  const int32_t num_picks = heads.size() * n;
  for (int64_t query = params.query_begin + blockIdx.x * kWarps + threadIdx.x / 32; query < end;
       query += gridDim.x * kWarps) {
    const QueryPlace place = FindQuery(params.queries, query);
    if (place.document < 0) continue;
    const int64_t first_block = params.queries.documents[place.document].slc_block_begin;
    const int32_t* const picks =
        params.block_indices + (query * params.dims.num_kv_heads + heads.begin) * n;
    for (int32_t i = lane; i < num_picks; i += 32) {
      const int32_t pick = picks[i];
      if (pick >= 0) visit(query, heads.begin + i / n, first_block + pick);
    }
  }
}

// Grid: any number of CTAs; a warp owns a query at a time.
__global__ void __launch_bounds__(kThreads) MarkFirstQueries(PlanFetchParams params) {
  ForEachPick(params, params.queries.num_tokens, [&](int64_t query, int32_t head, int64_t block) {
    int32_t* const first = params.locations + head * params.owners.num_blocks + block;
    const int32_t relative = static_cast<int32_t>(query - params.query_begin);
    // Values only fall, so one read too early costs an atomic and nothing else. Without
    // it all queries would queue at the blocks that all of them select.
    if (*static_cast<volatile int32_t*>(first) > relative) atomicMin(first, relative);
  });
}

__device__ bool IsRemote(const BlockOwners& owners, int64_t block) {
  return owners.rank[block] != owners.this_rank;
}

// The rank-th smallest (from 0) of the first queries of remote blocks, of which there are more:
// its bits from the top, eight at a time.
__device__ int32_t SelectFirstQuery(const PlanFetchParams& params, int64_t rank, int32_t* histogram,
                                    int32_t* choice) {
  const int64_t num_blocks = params.owners.num_blocks;
  const int64_t count = NumPlaces(params);
  const int32_t* const places = Places(params);
  int32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += kPlanThreads) histogram[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < count; i += kPlanThreads) {
      const int32_t first = places[i];
      if (first == kNotSelected || !IsRemote(params.owners, i % num_blocks)) continue;
      const int64_t above = int64_t{first} >> (shift + 8);
      if (above == int64_t{prefix} >> (shift + 8)) atomicAdd(&histogram[first >> shift & 255], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int32_t digit = 0;
      int64_t before = 0;
      while (before + histogram[digit] <= rank) before += histogram[digit++];
      choice[0] = digit;
      choice[1] = static_cast<int32_t>(before);
    }
    __syncthreads();
    prefix |= choice[0] << shift;
    rank -= choice[1];
    __syncthreads();
  }
  return prefix;
}

// Adds one to *count, which is the count of `rank`: once for all lanes here that have the same.
__device__ void CountSlot(int64_t* count, int32_t rank) {
  const uint32_t same = __match_any_sync(__activemask(), rank);
  if (static_cast<int32_t>(threadIdx.x % 32) == __ffs(same) - 1) {
    atomicAdd(reinterpret_cast<unsigned long long*>(count),
              static_cast<unsigned long long>(__popc(same)));
  }
}

// Grid: one CTA owns the whole table.
__global__ void __launch_bounds__(kPlanThreads) AssignLocations(PlanFetchParams params) {
  __shared__ int32_t warp_sums[kPlanThreads / 32];
  __shared__ int32_t histogram[256];
  __shared__ int32_t choice[2];
  const BlockOwners& owners = params.owners;
  const int64_t num_blocks = owners.num_blocks;
  const int64_t count = NumPlaces(params);
  int32_t* const places = Places(params);

  if (params.slots_of_rank != nullptr) {
    for (int32_t r = threadIdx.x; r < owners.num_ranks; r += kPlanThreads) {
      params.slots_of_rank[r] = 0;
    }
    __syncthreads();
  }
  int32_t num_mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += kPlanThreads) {
    num_mine += places[i] != kNotSelected && IsRemote(owners, i % num_blocks);
  }
  int32_t num_wanted = 0;
  ScanBefore<kPlanThreads>(num_mine, warp_sums, num_wanted);
  int32_t limit = kNotSelected;  // the first query that does not fit
  if (num_wanted > params.capacity) {
    limit = SelectFirstQuery(params, params.capacity, histogram, choice);
  }

  const int32_t num_own_records =
      static_cast<int32_t>(params.dims.num_kv_heads * owners.blocks_of_rank[owners.this_rank]);
  int32_t num_slots = 0;
  for (int64_t base = 0; base < count; base += kPlanThreads) {
    const int64_t i = base + threadIdx.x;
    const bool selected = i < count && places[i] < limit;
    bool remote = false;
    int32_t rank = 0;
    int64_t record = 0;  // place in its owner's window, [Hkv,blocks of that rank]
    if (selected) {
      const int64_t block = i % num_blocks;
      rank = owners.rank[block];
      remote = rank != owners.this_rank;
      record = (params.queries.kv_heads.begin + i / num_blocks) * owners.blocks_of_rank[rank] +
               owners.ordinal[block];
    }
    int32_t num_new = 0;
    const int32_t slot = num_slots + ScanBefore<kPlanThreads>(remote, warp_sums, num_new);
    if (remote) {
      params.peers[slot] = rank;
      params.offsets[slot] = record * params.record_bytes;
      if (params.slots_of_rank != nullptr) CountSlot(params.slots_of_rank + rank, rank);
    }
    if (i < count) {
      places[i] = !selected ? -1 : remote ? num_own_records + slot : static_cast<int32_t>(record);
    }
    num_slots += num_new;
  }
  if (threadIdx.x == 0) {
    *params.num_slots = num_slots;
    *params.query_end =
        limit == kNotSelected ? params.queries.num_tokens : params.query_begin + limit;
    if (params.num_remote_picks != nullptr) *params.num_remote_picks = 0;
  }
}

// Grid: any number of CTAs; a warp owns a query at a time.
__global__ void __launch_bounds__(kThreads) CountRemotePicks(PlanFetchParams params) {
  int32_t count = 0;
  ForEachPick(params, *params.query_end,
              [&](int64_t, int32_t, int64_t block) { count += IsRemote(params.owners, block); });
  count = __reduce_add_sync(kFullWarp, count);
  if (threadIdx.x % 32 == 0 && count != 0) {
    atomicAdd(reinterpret_cast<unsigned long long*>(params.num_remote_picks),
              static_cast<unsigned long long>(count));
  }
}

}  // namespace

cudaError_t LaunchPlanFetch(const PlanFetchParams& params, const Device& device,
                            cudaStream_t stream) {
  const int64_t count = NumPlaces(params);
  const int64_t num_queries = params.queries.num_tokens - params.query_begin;
  const int64_t num_ctas = (num_queries + kWarps - 1) / kWarps;
  const unsigned query_grid =
      static_cast<unsigned>(num_ctas < 8 * device.num_sms ? num_ctas : 8 * device.num_sms);
  if (count > 0) {
    const unsigned grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    ClearLocations<<<grid, kThreads, 0, stream>>>(params);
  }
  if (num_queries > 0) MarkFirstQueries<<<query_grid, kThreads, 0, stream>>>(params);
  AssignLocations<<<1, kPlanThreads, 0, stream>>>(params);
  if (params.num_remote_picks != nullptr && num_queries > 0) {
    CountRemotePicks<<<query_grid, kThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
