// Attention of one query's heads over the keys of many parts: the loop that all keys of a step of
// decoding go through.
//
// A CTA takes parts b, b + gridDim.x, ... of all rows, one after another, in rounds; Work says
// which parts a row has and where their keys lie. Warps that copy run ahead, also over the ends of
// parts: they find the keys and bring them to the stages of a ring in shared memory. Warps that
// compute own 16 keys of each round, and have o, maximum and sum of their own, so that they wait
// for nothing but the ring. When a part ends, their results are merged.
//
// Dk and Dv are template parameters, or 0 for any.
#ifndef KERNELS_CUDA_DECODE_STREAM_CUH_
#define KERNELS_CUDA_DECODE_STREAM_CUH_

#include <cstdint>

#include "kernels/cuda/decode_cursor.cuh"
#include "kernels/cuda/decode_parts.cuh"
#include "kernels/cuda/decode_warp.cuh"
#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/grid_order.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nsa::kernels::cuda {

// Where a CTA is in the ring.
struct StreamStage {
  int32_t index = 0;
  uint32_t parity = 0;  // of the round through the ring

  __device__ __forceinline__ void Next(int32_t num_stages) {
    if (++index == num_stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

// What warps do that copy. Work:
//   params       of the stage: dims, rows, num_rows, q, scratch
//   layout       of the scratch
//   kLayout      of its keys
//   kGivesPages  pages are known before the kernel before this one has ended
//   NumParts(dims, position)
//   Locate(dims, part): makes part.part, of the row, one of a branch, and sets what it is
//   Block(part, key), Page(part, block), Keys(part, key, page): where 16 keys from `key` on
//                are, in three steps, since each may have to be loaded
//   SetPlaces(part, heads, scratch, round): where results go
template <int kDk, int kDv, bool kOverlaps, class Work>
__device__ __forceinline__ void CopyParts(const Work& work, const StreamShared& shared) {
  constexpr int kWarps = kStreamWarps<kDv>, kThreads = kWarps * 16;
  const auto& params = work.params;
  const AttentionDims& dims = params.dims;
  const DecodeScratch& layout = work.layout;
  const StreamHeads<kDk, kDv, Work::kLayout> slots(dims);
  const int32_t thread = static_cast<int32_t>(threadIdx.x) - kWarps * 32;
  const int32_t first_slot = thread / 32 * 2;

  // Addresses of pages are on their way a round ahead, and what blocks they are of two.
  using Cursor = PartCursor<Work, kWarps * kDecodeWarpKeys>;
  Cursor cursor(work), scout = cursor;
  int32_t blocks[2];
  const char* pages[2];
  const auto key_of = [&](const Cursor& at, int h) {
    return at->key + (first_slot + h) * kDecodeWarpKeys;
  };
  const auto find_blocks = [&] {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int32_t key = key_of(scout, h);
      const bool is_seen =
          scout.exists() && key < scout->end_key && key + kDecodeWarpKeys > scout->keys.begin;
      blocks[h] = is_seen ? work.Block(*scout, key) : -1;
    }
  };
  const auto find_pages = [&] {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      pages[h] = blocks[h] >= 0 ? work.Page(*scout, blocks[h]) : nullptr;
    }
    if (scout.exists()) scout.Next();
    find_blocks();
  };
  if constexpr (kOverlaps && !Work::kGivesPages) WaitForGridBefore();
  find_blocks();
  find_pages();
  if constexpr (kOverlaps && Work::kGivesPages) WaitForGridBefore();

  StreamStage stage;
  bool is_ring_new = true;
  const auto wait_for_stage = [&] {
    if (!is_ring_new) BarrierWait(shared.free(stage.index), stage.parity ^ 1);
  };
  while (cursor.exists()) {
    wait_for_stage();
    const RowHeads heads(layout, cursor->row, cursor->kv_head, cursor->head_tile);
    if (cursor.IsFirstRound()) {
      const char* const q =
          static_cast<const char*>(params.q.data) +
          (heads.row * params.q.row_stride + int64_t{heads.first_q} * params.q.head_stride) * 2;
      const int32_t pieces = slots.qk() / 8;
      for (int32_t i = thread; i < kDecodeTileHeads * pieces; i += kThreads) {
        const int32_t head = i / pieces, piece = i - head * pieces;
        const bool exists = head < heads.count;
        CopyAsync16(SharedAddress(shared.q(stage.index) + head * shared.q_stride + piece * 16),
                    exists ? q + head * params.q.head_stride * 2 + piece * 16 : q, exists);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (pages[h] == nullptr) continue;
      slots.Copy(SharedAddress(shared.slot(stage.index, first_slot + h)),
                 work.Keys(*cursor, key_of(cursor, h), pages[h]),
                 cursor->keys.begin - key_of(cursor, h), cursor->end_key - key_of(cursor, h));
    }
    BarrierArriveAfterCopies(shared.full(stage.index));
    if (thread == 0) {
      StreamRound round;
      round.key = cursor->key;
      round.begin = cursor->keys.begin;
      round.end = cursor->end_key;
      round.flags = (cursor.IsFirstRound() ? StreamRound::kIsFirst : 0) |
                    (cursor.IsLastRound() ? StreamRound::kIsLast : 0);
      const ScratchPlace scratch(params.scratch, layout, heads.row_head(dims));
      work.SetPlaces(*cursor, heads, scratch, round);
      *shared.round(stage.index) = round;
      BarrierArrive(shared.full(stage.index));
    }
    cursor.Next();
    find_pages();
    stage.Next(shared.num_stages);
    is_ring_new = is_ring_new && stage.index != 0;
  }
  wait_for_stage();
  if (thread == 0) {
    shared.round(stage.index)->flags = StreamRound::kIsEnd;
    BarrierArrive(shared.full(stage.index));
  }
  BarrierArrive(shared.full(stage.index));
}

// What the others do. Work::StoreKeys(round, key, attention, p, p32): after 16 keys from `key` on.
template <class T, int kDk, int kDv, class Work>
__device__ __forceinline__ void AttendToParts(const Work& work, const StreamShared& shared) {
  const int32_t warp = threadIdx.x / 32;
  WarpAttention<T, kDk, kDv, Work::kLayout> attention(work.params.dims);
  StreamStage stage;
  for (;;) {
    BarrierWait(shared.full(stage.index), stage.parity);
    const StreamRound& round = *shared.round(stage.index);
    const int32_t flags = round.flags;
    if ((flags & StreamRound::kIsEnd) != 0) return;
    if ((flags & StreamRound::kIsFirst) != 0) {
      attention.Start(SharedAddress(shared.q(stage.index)), shared.q_stride);
    }
    const int32_t key = round.key + warp * kDecodeWarpKeys;
    if (key < round.end && key + kDecodeWarpKeys > round.begin) {
      float p[2][4];
      attention.Attend(SharedAddress(shared.slot(stage.index, warp)), round.begin - key,
                       round.end - key, p);
      work.StoreKeys(round, key, attention.max(0), attention.max(1), p, shared.p(warp));
    }
    if ((flags & StreamRound::kIsLast) != 0) {
      attention.Store(shared, stage.index, round.stats, round.o);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(shared.free(stage.index));
    stage.Next(shared.num_stages);
  }
}

template <class T, int kDk, int kDv, bool kOverlaps, class Work>
__device__ __forceinline__ void StreamParts(const Work& work, int32_t num_stages) {
  extern __shared__ __align__(128) char memory[];
  constexpr int kWarps = kStreamWarps<kDv>;
  const StreamShared shared(work.params.dims, memory, kWarps, num_stages);
  if (threadIdx.x == 0) {
    for (int32_t stage = 0; stage < num_stages; ++stage) {
      BarrierInit(shared.full(stage), kWarps * 16 + 1);
      BarrierInit(shared.free(stage), kWarps);
    }
  }
  __syncthreads();
  if (threadIdx.x >= kWarps * 32) {
    CopyParts<kDk, kDv, kOverlaps>(work, shared);
  } else {
    AttendToParts<T, kDk, kDv>(work, shared);
  }
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_STREAM_CUH_
