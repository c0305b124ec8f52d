// Which parts of which rows a CTA takes, and in what order.
#ifndef KERNELS_CUDA_DECODE_CURSOR_CUH_
#define KERNELS_CUDA_DECODE_CURSOR_CUH_

#include <cstdint>

#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/ptx.cuh"

namespace nsa::kernels::cuda {

// A part, and how far it has been taken.
struct StreamPart {
  int32_t row, kv_head, head_tile;
  int32_t sequence, position;       // of the row
  int32_t part;                     // of a branch
  int32_t first_key, key, end_key;  // of the part, of the round
  DecodeKeys keys;                  // that the query sees, of the branch
  bool is_window;

  // Sets the keys of part `index` of a branch's.
  __device__ void Take(const DecodeKeys& of_branch, int32_t index) {
    keys = of_branch;
    const int32_t per_part = keys.tiles_per_part() * kDecodeTileKeys;
    first_key = key = index * per_part;
    end_key = min(first_key + per_part, keys.end);
  }
};

// Walks over the parts of a CTA, kKeys of a part at a time. All lanes of a warp.
template <class Work, int32_t kKeys>
class PartCursor {
 public:
  __device__ explicit PartCursor(const Work& work) : work_(work), index_(blockIdx.x) {
    LoadRows();
    Find();
  }

  __device__ bool exists() const { return exists_; }
  __device__ const StreamPart& operator*() const { return part_; }
  __device__ const StreamPart* operator->() const { return &part_; }
  __device__ bool IsFirstRound() const { return part_.key == part_.first_key; }
  __device__ bool IsLastRound() const { return part_.key + kKeys >= part_.end_key; }
  __device__ void Next() {
    part_.key += kKeys;
    if (part_.key < part_.end_key) return;
    index_ += static_cast<int32_t>(gridDim.x);
    Find();
  }

 private:
  __device__ const AttentionDims& dims() const { return work_.params.dims; }

  // A lane looks at one of 32 rows.
  __device__ void LoadRows() {
    const int32_t lane = threadIdx.x % 32, row = first_row_ + lane;
    int32_t count = 0;
    if (row < work_.params.num_rows) {
      const DecodeRow of_lane = work_.params.rows[row];
      sequence_ = of_lane.sequence;
      position_ = static_cast<int32_t>(of_lane.position);
      if (sequence_ >= 0) {
        count = Work::NumParts(dims(), position_) * work_.layout.head_tiles * dims().num_kv_heads;
      }
    }
    end_ = count;
    for (int delta = 1; delta < 32; delta *= 2) {
      const int32_t before = __shfl_up_sync(kFullWarp, end_, delta);
      if (lane >= delta) end_ += before;
    }
    begin_ = end_ - count;
  }

  // Heads of the same part are neighbours, as they are in pages.
  __device__ void Find() {
    for (;;) {
      const unsigned hits = __ballot_sync(kFullWarp, index_ < end_);
      if (hits != 0) {
        const int32_t source = __ffs(hits) - 1;
        const int32_t in_row = index_ - __shfl_sync(kFullWarp, begin_, source);
        const int32_t head_tiles = work_.layout.head_tiles;
        const int32_t heads = head_tiles * dims().num_kv_heads;
        part_.row = first_row_ + source;
        part_.sequence = __shfl_sync(kFullWarp, sequence_, source);
        part_.position = __shfl_sync(kFullWarp, position_, source);
        part_.part = Quotient(in_row, heads);
        const int32_t head = in_row - part_.part * heads;
        part_.kv_head = head_tiles == 1 ? head : Quotient(head, head_tiles);
        part_.head_tile = head - part_.kv_head * head_tiles;
        Work::Locate(dims(), part_);
        return;
      }
      index_ -= __shfl_sync(kFullWarp, end_, 31);
      first_row_ += 32;
      if (first_row_ >= work_.params.num_rows) {
        exists_ = false;
        return;
      }
      LoadRows();
    }
  }

  const Work& work_;
  int32_t index_;  // of the part, from that of first_row_ on
  int32_t first_row_ = 0;
  int32_t sequence_ = -1, position_ = 0, begin_ = 0, end_ = 0;  // of this lane's row
  bool exists_ = true;
  StreamPart part_;
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_CURSOR_CUH_
