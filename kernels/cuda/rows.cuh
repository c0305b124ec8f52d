// Where tokens, queries and blocks lie: from documents and positions to addresses, on the device.
//
// Lists of segments and runs are short as a rule, and in device memory: a warp searches 32 entries
// at a time where the list has no order, and a thread bisects where it has one.
#ifndef KERNELS_CUDA_ROWS_CUH_
#define KERNELS_CUDA_ROWS_CUH_

#include <cstdint>

#include "kernels/cuda/ptx.cuh"
#include "kernels/params.h"

namespace nsa::kernels::cuda {

// Where a run of tokens of a document lies: in consecutive rows of one of two tensors.
struct TokenPlace {
  int64_t row = -1;  // of the token asked for; -1: no segment covers it
  bool is_halo = false;
  int64_t num_tokens =
      0;  // from the token asked for; where nothing covers it, as far as that holds
};

// From token `position` of a document on. Any thread.
__device__ inline TokenPlace FindPlace(const TokenRows& tokens, int32_t document,
                                       int64_t position) {
  // The first segment that begins after `position`.
  int32_t low = 0, high = tokens.num_segments;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    const Segment& segment = tokens.segments[middle];
    const bool after =
        segment.document != document ? segment.document > document : segment.position > position;
    if (after) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (low > 0) {
    const Segment segment = tokens.segments[low - 1];
    const int64_t offset = position - segment.position;
    if (segment.document == document && offset < segment.num_tokens) {
      return {segment.row + offset, segment.is_halo != 0, segment.num_tokens - offset};
    }
  }
  int64_t num_missing = int64_t{1} << 62;
  if (low < tokens.num_segments && tokens.segments[low].document == document) {
    num_missing = tokens.segments[low].position - position;
  }
  return {-1, false, num_missing};
}

// A run of tokens of a document, in consecutive rows of one tensor.
struct TokenRun {
  const char* rows = nullptr;  // of the token asked for; null: no segment covers it
  int64_t row_bytes = 0;
  int64_t num_tokens = 0;  // as in TokenPlace
};

// Rows of `head` from token `position` of a document on. Any thread.
__device__ inline TokenRun FindTokens(const TokenRows& tokens, int64_t element_bytes,
                                      int32_t document, int64_t position, int32_t head) {
  const TokenPlace place = FindPlace(tokens, document, position);
  if (place.row < 0) return {nullptr, 0, place.num_tokens};
  const ConstTensor3& tensor = place.is_halo ? tokens.halo : tokens.own;
  return {static_cast<const char*>(tensor.data) +
              (place.row * tensor.row_stride + head * tensor.head_stride) * element_bytes,
          tensor.row_stride * element_bytes, place.num_tokens};
}

// A query, and how many more follow it in the same segment.
struct QueryPlace {
  int32_t document = -1;  // -1: no segment covers the row
  int64_t position = 0;
  int64_t num_queries = 0;  // from this row to the segment's end
};

// All lanes of a warp, with the same arguments.
__device__ inline QueryPlace FindQuery(const Queries& queries, int64_t row) {
  const int32_t lane = threadIdx.x % 32;
  for (int32_t first = 0; first < queries.num_segments; first += 32) {
    QueryPlace place;
    bool covered = false;
    if (first + lane < queries.num_segments) {
      const Segment& segment = queries.segments[first + lane];
      const int64_t offset = row - segment.row;
      covered = offset >= 0 && offset < segment.num_tokens;
      place = {segment.document, segment.position + offset, segment.num_tokens - offset};
    }
    const unsigned hits = __ballot_sync(kFullWarp, covered);
    if (hits != 0) {
      const int source = __ffs(hits) - 1;
      return {__shfl_sync(kFullWarp, place.document, source),
              __shfl_sync(kFullWarp, place.position, source),
              __shfl_sync(kFullWarp, place.num_queries, source)};
    }
  }
  return {};
}

// Blocks [first_block, end_block) of one run.
struct BlockGroup {
  int32_t document = -1;  // of the run; -1: there are fewer groups
  int64_t first_block = 0;
  int64_t end_block = 0;
};

// Group `index` of all runs' blocks, in groups of at most `group_blocks` of one run; run_at(i) is
// run i. All lanes of a warp, with the same arguments.
template <class RunAt>
__device__ inline BlockGroup FindGroup(const RunAt& run_at, int32_t num_runs, int32_t group_blocks,
                                       int64_t index) {
  const int32_t lane = threadIdx.x % 32;
  for (int32_t first = 0; first < num_runs; first += 32) {
    BlockRun run{-1, 0, 0};
    if (first + lane < num_runs) run = run_at(first + lane);
    const int64_t count = (run.num_blocks + group_blocks - 1) / group_blocks;
    int64_t end = count;  // groups up to and with this lane's run
    for (int delta = 1; delta < 32; delta *= 2) {
      const int64_t before = __shfl_up_sync(kFullWarp, end, delta);
      if (lane >= delta) end += before;
    }
    const unsigned hits = __ballot_sync(kFullWarp, index < end);
    if (hits != 0) {
      const int source = __ffs(hits) - 1;
      const int64_t block = run.first_block + (index - (end - count)) * group_blocks;
      const int64_t run_end = run.first_block + run.num_blocks;
      const int64_t group_end = block + group_blocks < run_end ? block + group_blocks : run_end;
      return {__shfl_sync(kFullWarp, run.document, source), __shfl_sync(kFullWarp, block, source),
              __shfl_sync(kFullWarp, group_end, source)};
    }
    index -= __shfl_sync(kFullWarp, end, 31);
  }
  return {};
}

__device__ inline BlockGroup FindBlocks(const BlockRun* runs, int32_t num_runs,
                                        int32_t group_blocks, int64_t index) {
  return FindGroup([&](int32_t i) { return runs[i]; }, num_runs, group_blocks, index);
}

// f32 values of any storage type, for parameters that are read once.
__device__ inline float LoadFloat(DType dtype, const void* data, int64_t index) {
  switch (dtype) {
    case DType::kBF16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    case DType::kF16:
      return __half2float(static_cast<const __half*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

// Eight values from an address aligned to 16 bytes.
__device__ inline void LoadFloats(DType dtype, const void* data, int64_t index, float (&to)[8]) {
  if (dtype == DType::kF32) {
    const float4* const from =
        reinterpret_cast<const float4*>(static_cast<const float*>(data) + index);
    const float4 low = from[0], high = from[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
    return;
  }
  const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(data) + index);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  for (int i = 0; i < 4; ++i) {
    const float2 pair =
        dtype == DType::kBF16 ? Unpack2<__nv_bfloat16>(words[i]) : Unpack2<__half>(words[i]);
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}

__device__ inline void StoreFloats(DType dtype, void* data, int64_t index, const float (&from)[8]) {
  uint32_t words[4];
  for (int i = 0; i < 4; ++i) {
    words[i] = dtype == DType::kBF16 ? Pack2<__nv_bfloat16>(from[2 * i], from[2 * i + 1])
                                     : Pack2<__half>(from[2 * i], from[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(data) + index) =
      make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_ROWS_CUH_
