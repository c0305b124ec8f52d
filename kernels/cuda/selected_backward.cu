// The backward of the selected attention but for its arithmetic: pieces, and the lists of blocks
// inverted.
#include <algorithm>

#include "kernels/cuda/cta_scan.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/selected_backward.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kPlanThreads = 1024;
constexpr int kSizeClasses = 64;
constexpr int kSumThreads = 256;
constexpr int kSumCtasPerSm = 6;
constexpr int kGroupQueries = 32;  // bits of a mask

// dS of a piece is the larger part of the scratch. More of it means fewer, longer launches; less,
// that q and dO of a piece stay in the L2.
constexpr int64_t kPieceBytes = int64_t{1} << 30;

int64_t PieceQueries(const AttentionDims& dims) {
  const int64_t query_bytes = int64_t{dims.num_selected_blocks} * PickFragments(dims) * 512;
  const int64_t chunks = kPieceBytes / (query_bytes * kChunkQueries);
  return std::max<int64_t>(chunks, 1) * kChunkQueries;
}

// Cuts the scratch into the arrays of a piece of `num_queries`. Returns the bytes.
int64_t PlaceArrays(const AttentionDims& dims, int64_t num_blocks, int64_t num_queries,
                    char* scratch, SelectedPiece* piece) {
  const int64_t num_chunks = (num_queries + kChunkQueries - 1) / kChunkQueries;
  const int64_t num_picks = num_queries * dims.num_selected_blocks;
  // A block of several items has more than kItemPicks picks, so these are at most twice as many as
  // whole items would be.
  const int64_t max_whole = num_picks / kItemPicks, max_partials = 2 * max_whole;
  int64_t num_bytes = 0;
  const auto place = [&](auto*& pointer, int64_t count) {
    using Element = std::remove_reference_t<decltype(*pointer)>;
    pointer = reinterpret_cast<Element*>(scratch + num_bytes);
    num_bytes += (count * int64_t{sizeof(Element)} + 255) / 256 * 256;
  };
  piece->num_chunks = static_cast<int32_t>(num_chunks);
  place(piece->masks, num_chunks * num_blocks);
  place(piece->before, num_chunks * num_blocks);
  place(piece->counts, num_blocks);
  place(piece->begins, num_blocks);
  place(piece->picks, num_picks);
  place(piece->items, num_blocks + max_whole);
  place(piece->splits, max_whole);
  place(piece->num_items, 1);
  place(piece->partials, max_partials * RecordValues(dims));
  place(piece->ds, num_picks * PickFragments(dims) * 32);
  return num_bytes;
}

// Grid: (B, kv heads of the call). A CTA owns the gradients of a slot, which become zero.
__global__ void __launch_bounds__(kSumThreads)
    ClearSlotGradients(const __grid_constant__ AttendSelectedBackwardParams params) {
  const int32_t location =
      LocationOf(params, params.queries.kv_heads.begin + blockIdx.y, blockIdx.x);
  if (location < params.num_own_records) return;
  float4* const to = reinterpret_cast<float4*>(GradientsAt(params, location));
  for (int64_t i = threadIdx.x; i < RecordValues(params.dims) / 4; i += kSumThreads) {
    to[i] = make_float4(0, 0, 0, 0);
  }
}

// Calls visit(query of the piece, place in the list, global block, tokens seen) for the picks of
// queries [begin, end) of the piece; the lanes of a warp share a query.
template <class Visit>
__device__ void ForEachPick(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                            int32_t begin, int32_t end, const Visit& visit) {
  const AttentionDims& dims = params.dims;
  const int32_t lane = threadIdx.x % 32, n = dims.num_selected_blocks;
  for (int32_t query = begin + threadIdx.x / 32; query < end; query += kWarps) {
    const int64_t row = piece.query_begin + query;
    const QueryPlace place = FindQuery(params.queries, row);
    if (place.document < 0) continue;
    const int64_t first_block = params.queries.documents[place.document].slc_block_begin;
    const int32_t* const picks =
        params.block_indices + (row * dims.num_kv_heads + piece.kv_head) * n;
    for (int32_t i = lane; i < n; i += 32) {
      const int64_t pick = picks[i];
      const int64_t num_seen = place.position + 1 - pick * dims.select_block_tokens;
      if (pick < 0 || num_seen <= 0) continue;
      visit(query, i, first_block + pick,
            static_cast<int32_t>(min(num_seen, int64_t{dims.select_block_tokens})));
    }
  }
}

__device__ int32_t ChunkEnd(const SelectedPiece& piece) {
  return min(static_cast<int32_t>(blockIdx.x + 1) * kChunkQueries, piece.num_queries);
}

// Grid: a CTA for each chunk, whose row of `before` it fills with the chunk's own counts; and its
// row of `masks` with zeros.
__global__ void __launch_bounds__(kThreads)
    CountPicks(const __grid_constant__ AttendSelectedBackwardParams params,
               const __grid_constant__ SelectedPiece piece) {
  int32_t* const counts = piece.before + blockIdx.x * params.num_blocks;
  uint32_t* const masks = piece.masks + blockIdx.x * params.num_blocks;
  for (int64_t i = threadIdx.x; i < params.num_blocks; i += kThreads) counts[i] = masks[i] = 0;
  __syncthreads();
  ForEachPick(params, piece, blockIdx.x * kChunkQueries, ChunkEnd(piece),
              [&](int32_t, int32_t, int64_t block, int32_t) { atomicAdd(counts + block, 1); });
}

// Grid: covers the blocks; a thread owns a column of `before`.
__global__ void __launch_bounds__(kSumThreads)
    SumChunks(const __grid_constant__ SelectedPiece piece, int64_t num_blocks) {
  const int64_t block = blockIdx.x * int64_t{kSumThreads} + threadIdx.x;
  if (block >= num_blocks) return;
  int32_t sum = 0;
  constexpr int kAtOnce = 16;
  for (int32_t first = 0; first < piece.num_chunks; first += kAtOnce) {
    int32_t counts[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      counts[i] = first + i < piece.num_chunks ? piece.before[(first + i) * num_blocks + block] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i < piece.num_chunks) piece.before[(first + i) * num_blocks + block] = sum;
      sum += counts[i];
    }
  }
  piece.counts[block] = sum;
}

// Items are sorted by size, the largest class first.
__device__ int32_t SizeClass(int32_t num_picks) {
  return (kItemPicks - num_picks) * kSizeClasses / kItemPicks;
}

// Grid: one CTA owns begins and splits, in the order of the blocks, and items, longest first. The
// order of items of a class is left to chance: it shows in no result.
__global__ void __launch_bounds__(kPlanThreads)
    PlanItems(const __grid_constant__ SelectedPiece piece, int64_t num_blocks) {
  __shared__ int32_t warp_sums[kPlanThreads / 32];
  __shared__ int32_t places[kSizeClasses];  // of the next item of each class; first, their number
  if (threadIdx.x < kSizeClasses) places[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t block = threadIdx.x; block < num_blocks; block += kPlanThreads) {
    const int32_t count = piece.counts[block], rest = count % kItemPicks;
    if (count >= kItemPicks) atomicAdd(&places[SizeClass(kItemPicks)], count / kItemPicks);
    if (rest > 0) atomicAdd(&places[SizeClass(rest)], 1);
  }
  __syncthreads();
  const int32_t in_class = threadIdx.x < kSizeClasses ? places[threadIdx.x] : 0;
  int32_t num_items = 0;
  const int32_t class_begin = ScanBefore<kPlanThreads>(in_class, warp_sums, num_items);
  if (threadIdx.x < kSizeClasses) places[threadIdx.x] = class_begin;
  __syncthreads();
  int32_t begin = 0, partial = 0, split = 0;
  for (int64_t base = 0; base < num_blocks; base += kPlanThreads) {
    const int64_t block = base + threadIdx.x;
    const int32_t count = block < num_blocks ? piece.counts[block] : 0;
    const int32_t my_whole = count / kItemPicks, my_rest = count % kItemPicks;
    const int32_t my_items = my_whole + (my_rest > 0);
    const int32_t my_partials = my_items > 1 ? my_items : 0;
    int32_t total[3];
    const int32_t my_begin = begin + ScanBefore<kPlanThreads>(count, warp_sums, total[0]);
    const int32_t to_partial = partial + ScanBefore<kPlanThreads>(my_partials, warp_sums, total[1]);
    const int32_t to_split = split + ScanBefore<kPlanThreads>(my_items > 1, warp_sums, total[2]);
    if (block < num_blocks) {
      piece.begins[block] = my_begin;
      const int32_t number = static_cast<int32_t>(block);
      for (int32_t i = 0; i < my_items; ++i) {
        const int32_t num_picks = i < my_whole ? kItemPicks : my_rest;
        piece.items[atomicAdd(&places[SizeClass(num_picks)], 1)] = {
            number, my_begin + i * kItemPicks, num_picks, my_items > 1 ? to_partial + i : -1};
      }
      if (my_items > 1) piece.splits[to_split] = {number, to_partial, my_items};
    }
    begin += total[0], partial += total[1], split += total[2];
  }
  if (threadIdx.x == 0) *piece.num_items = {num_items, split};
}

// A value that other threads of the CTA have changed in the L2.
template <class T>
__device__ T LoadChanged(const T* from) {
  return *static_cast<const volatile T*>(from);
}

// Grid: a CTA for each chunk, whose picks it puts in their places: 32 queries at a time mark the
// blocks that they picked, so that a pick knows how many of them came before it.
__global__ void __launch_bounds__(kThreads)
    SortPicks(const __grid_constant__ AttendSelectedBackwardParams params,
              const __grid_constant__ SelectedPiece piece) {
  int32_t* const before = piece.before + blockIdx.x * params.num_blocks;
  uint32_t* const masks = piece.masks + blockIdx.x * params.num_blocks;
  const int32_t chunk_end = ChunkEnd(piece);
  for (int32_t first = blockIdx.x * kChunkQueries; first < chunk_end; first += kGroupQueries) {
    const int32_t end = min(first + kGroupQueries, chunk_end);
    ForEachPick(params, piece, first, end, [&](int32_t query, int32_t, int64_t block, int32_t) {
      atomicOr(masks + block, 1u << (query - first));
    });
    __syncthreads();
    ForEachPick(
        params, piece, first, end,
        [&](int32_t query, int32_t i, int64_t block, int32_t num_visible) {
          const uint32_t earlier = LoadChanged(masks + block) & ((1u << (query - first)) - 1);
          const int32_t place = piece.begins[block] + LoadChanged(before + block) + __popc(earlier);
          piece.picks[place] = {query * params.dims.num_selected_blocks + i, num_visible};
        });
    __syncthreads();
    // The first query of those that picked a block moves it on.
    ForEachPick(params, piece, first, end, [&](int32_t query, int32_t, int64_t block, int32_t) {
      const uint32_t mask = LoadChanged(masks + block);
      if (__ffs(mask) - 1 != query - first) return;
      atomicAdd(before + block, __popc(mask));
      atomicExch(masks + block, 0);
    });
    __syncthreads();
  }
}

// Grid: any number of CTAs; a CTA owns kSumThreads * 4 values of a split block at a time.
__global__ void __launch_bounds__(kSumThreads, kSumCtasPerSm)
    SumPartials(const __grid_constant__ AttendSelectedBackwardParams params,
                const __grid_constant__ SelectedPiece piece) {
  const int64_t record_values = RecordValues(params.dims);
  const int32_t parts = static_cast<int32_t>((record_values / 4 + kSumThreads - 1) / kSumThreads);
  const int64_t count = int64_t{piece.num_items->splits} * parts;
  for (int64_t index = blockIdx.x; index < count; index += gridDim.x) {
    const SplitBlock split = piece.splits[index / parts];
    const int64_t place = (index % parts * kSumThreads + threadIdx.x) * 4;
    if (place >= record_values) continue;
    float4* const to = reinterpret_cast<float4*>(
        GradientsAt(params, LocationOf(params, piece.kv_head, split.block)) + place);
    float4 sum = *to;
#pragma unroll 4
    for (int32_t i = 0; i < split.count; ++i) {
      const float4 value = *reinterpret_cast<const float4*>(
          piece.partials + (split.first + i) * record_values + place);
      sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
    }
    *to = sum;
  }
}

// Sums begin at zero, or at what is there.
cudaError_t ClearGradients(const AttendSelectedBackwardParams& params, cudaStream_t stream) {
  const HeadRange& heads = params.queries.kv_heads;
  if (!params.adds_to_own && params.num_own_records > 0) {
    const int64_t head_values =
        params.num_own_records / params.dims.num_kv_heads * RecordValues(params.dims);
    const cudaError_t error = cudaMemsetAsync(params.own_gradients + heads.begin * head_values, 0,
                                              heads.size() * head_values * sizeof(float), stream);
    if (error != cudaSuccess) return error;
  }
  if (params.num_blocks > 0 && heads.size() > 0) {
    const dim3 grid(static_cast<unsigned>(params.num_blocks), heads.size());
    ClearSlotGradients<<<grid, kSumThreads, 0, stream>>>(params);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t SelectedBackwardScratchBytes(const AttentionDims& dims, const BackwardLimits& limits) {
  SelectedPiece piece;
  return PlaceArrays(dims, limits.num_slc_blocks, std::min(PieceQueries(dims), limits.num_tokens),
                     nullptr, &piece);
}

cudaError_t LaunchSelectedBackward(const AttendSelectedBackwardParams& params, const Device& device,
                                   LaunchPiece launch_keys, LaunchPiece launch_queries,
                                   cudaStream_t stream) {
  cudaError_t error = ClearGradients(params, stream);
  if (error != cudaSuccess) return error;
  const int64_t piece_queries = PieceQueries(params.dims), num_blocks = params.num_blocks;
  const unsigned block_grid = static_cast<unsigned>((num_blocks + kSumThreads - 1) / kSumThreads);
  for (int32_t head = params.queries.kv_heads.begin; head < params.queries.kv_heads.end; ++head) {
    for (int64_t begin = params.query_begin; begin < params.query_end; begin += piece_queries) {
      SelectedPiece piece{};
      piece.kv_head = head;
      piece.query_begin = begin;
      piece.num_queries = static_cast<int32_t>(std::min(piece_queries, params.query_end - begin));
      PlaceArrays(params.dims, num_blocks, piece.num_queries, static_cast<char*>(params.scratch),
                  &piece);
      CountPicks<<<piece.num_chunks, kThreads, 0, stream>>>(params, piece);
      SumChunks<<<block_grid, kSumThreads, 0, stream>>>(piece, num_blocks);
      PlanItems<<<1, kPlanThreads, 0, stream>>>(piece, num_blocks);
      SortPicks<<<piece.num_chunks, kThreads, 0, stream>>>(params, piece);
      error = launch_keys(params, piece, device, stream);
      if (error != cudaSuccess) return error;
      SumPartials<<<kSumCtasPerSm * device.num_sms, kSumThreads, 0, stream>>>(params, piece);
      error = launch_queries(params, piece, device, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
