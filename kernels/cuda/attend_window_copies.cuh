// The warps of attend_window_fast.cu that bring keys, values and q.
#ifndef KERNELS_CUDA_ATTEND_WINDOW_COPIES_CUH_
#define KERNELS_CUDA_ATTEND_WINDOW_COPIES_CUH_

#include <cstdint>

#include "kernels/cuda/attend_window_shared.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/ring.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda::attend_window {

// Where tokens of one document lie, asked for in ascending order as a rule.
class TokenCursor {
 public:
  __device__ explicit TokenCursor(const TokenRows& tokens) : tokens_(tokens) {}

  __device__ void Start(int32_t document) {
    document_ = document;
    begin_ = end_ = -1;
  }

  __device__ TokenPlace Find(int64_t position) {
    if (position < begin_ || position >= end_) {
      place_ = FindPlace(tokens_, document_, position);
      begin_ = position;
      end_ = position + place_.num_tokens;
    }
    const int64_t offset = position - begin_;
    return {place_.row < 0 ? -1 : place_.row + offset, place_.is_halo, place_.num_tokens - offset};
  }

 private:
  const TokenRows& tokens_;
  int32_t document_ = -1;
  TokenPlace place_;
  int64_t begin_ = -1, end_ = -1;  // positions that place_ is known for
};

// The warp that brings keys and values.
template <int kDk, int kDv>
class TileLoader {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ TileLoader(const AttendWindowParams& params, const TensorMaps& maps,
                        const Shared<Sizes>& shared)
      : params_(params), maps_(maps), shared_(shared), keys_(params.k), values_(params.v) {}

  __device__ void Run(const WindowRun& run) {
    keys_.Start(run.document);
    values_.Start(run.document);
    const int64_t end = run.EndKey();
    int64_t key = run.FirstKey(params_.dims.window_tokens) / kTileKeys * kTileKeys;
    for (; key < end; key += kTileKeys) Load(run.kv_head, key);
  }

 private:
  __device__ void Load(int32_t kv_head, int64_t first_key) {
    const TokenPlace k = keys_.Find(first_key), v = values_.Find(first_key);
    const bool in_one_piece = maps_.are_set != 0 && k.row >= 0 && k.num_tokens >= kTileKeys &&
                              v.row >= 0 && v.num_tokens >= kTileKeys;
    const uint32_t full = shared_.Full(place_.slot);
    BarrierWait(shared_.Empty(place_.slot), place_.parity ^ 1);
    if (in_one_piece) {
      if (threadIdx.x % 32 == 0) {
        BarrierArriveExpectBytes(full, Sizes::kSlotBytes);
#pragma unroll
        for (int panel = 0; panel < kDk / 64; ++panel) {
          TensorCopy(shared_.Keys(place_.slot) + panel * kPanelBytes, &maps_.keys[k.is_halo],
                     panel * 64, kv_head, static_cast<int32_t>(k.row), full);
        }
#pragma unroll
        for (int panel = 0; panel < kDv / 64; ++panel) {
          TensorCopy(shared_.Values(place_.slot) + panel * kPanelBytes, &maps_.values[v.is_halo],
                     panel * 64, kv_head, static_cast<int32_t>(v.row), full);
        }
      }
      __syncwarp();  // to a lane two rounds behind, parities would say something else
    } else {
      CopyRows<kDk>(params_.k, keys_, kv_head, first_key, shared_.Keys(place_.slot));
      CopyRows<kDv>(params_.v, values_, kv_head, first_key, shared_.Values(place_.slot));
      CopyAsyncWait<0>();
      FenceProxyAsync();
      __syncwarp();
      if (threadIdx.x % 32 == 0) BarrierArrive(full);
    }
    place_.Advance();
  }

  // Row by row; zeros for tokens that no segment covers.
  template <int kDim>
  __device__ void CopyRows(const TokenRows& tokens, TokenCursor& cursor, int32_t kv_head,
                           int64_t first_key, uint32_t to) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = lane / 8; row < kTileKeys; row += 4) {
      const TokenPlace place = cursor.Find(first_key + row);
      const ConstTensor3& tensor = place.is_halo ? tokens.halo : tokens.own;
      const bool covered = place.row >= 0;
      const uint16_t* const from = covered ? static_cast<const uint16_t*>(tensor.data) +
                                                 place.row * tensor.row_stride +
                                                 kv_head * tensor.head_stride + lane % 8 * 8
                                           : static_cast<const uint16_t*>(params_.queries.q.data);
#pragma unroll
      for (int panel = 0; panel < kDim / 64; ++panel) {
        CopyAsync16(to + panel * kPanelBytes + InPanel(row, lane % 8),
                    covered ? from + panel * 64 : from, covered);
      }
    }
  }

  const AttendWindowParams& params_;
  const TensorMaps& maps_;
  const Shared<Sizes> shared_;
  TokenCursor keys_, values_;
  RingPlace<Sizes::kSlots> place_;
};

// A warp that brings q of one consumer.
template <int kDk, int kDv>
class QLoader {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ QLoader(const AttendWindowParams& params, const Shared<Sizes>& shared, int consumer)
      : params_(params), shared_(shared), consumer_(consumer) {}

  __device__ void Run(const WindowRun& run) {
    const int lane = threadIdx.x % 32;
    const ConstTensor3& q = params_.queries.q;
    BarrierWait(shared_.QEmpty(place_.slot, consumer_), place_.parity ^ 1);
    const uint32_t to = shared_.Q(place_.slot, consumer_);
#pragma unroll 2
    for (int i = lane / 8; i < kGroupRows; i += 4) {
      const int row = consumer_ * kGroupRows + i;
      const bool active = run.Holds(row);
      const int some_row = active ? row : run.begin;
      const uint16_t* const from = static_cast<const uint16_t*>(q.data) +
                                   run.Query(some_row) * q.row_stride +
                                   run.Head(some_row) * q.head_stride + lane % 8 * 8;
#pragma unroll
      for (int panel = 0; panel < kDk / 64; ++panel) {
        CopyAsync16(to + panel * kPanelBytes + InPanel(i, lane % 8), from + panel * 64, active);
      }
    }
    CopyAsyncWait<0>();
    FenceProxyAsync();
    __syncwarp();
    if (lane == 0) BarrierArrive(shared_.QFull(place_.slot, consumer_));
    place_.Advance();
  }

 private:
  const AttendWindowParams& params_;
  const Shared<Sizes> shared_;
  const int consumer_;
  RingPlace<Sizes::kQBuffers> place_;
};

}  // namespace nsa::kernels::cuda::attend_window

#endif  // KERNELS_CUDA_ATTEND_WINDOW_COPIES_CUH_
