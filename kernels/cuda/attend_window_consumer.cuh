// The warpgroups of attend_window_fast.cu that multiply.
#ifndef KERNELS_CUDA_ATTEND_WINDOW_CONSUMER_CUH_
#define KERNELS_CUDA_ATTEND_WINDOW_CONSUMER_CUH_

#include <cfloat>
#include <cstdint>

#include "kernels/cuda/attend_window_shared.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/ring.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_values.cuh"
#include "kernels/cuda/window_rows.cuh"

namespace nsa::kernels::cuda::attend_window {

// 64 rows of a warpgroup; lane 4g + c of warp w works on rows 16w + g and 16w + g + 8.
template <class T, int kDk, int kDv>
class Consumer {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Consumer(const AttendWindowParams& params, const Shared<Sizes>& shared)
      : params_(params),
        shared_(shared),
        scale_log2_(params.dims.softmax_scale * 1.4426950408889634f) {}

  __device__ void Run(const WindowRun& run) {
    const int32_t window = params_.dims.window_tokens;
    const int group_first = Group() * kGroupRows;
    const int begin = max(group_first, run.begin);
    const int end = min(group_first + kGroupRows, run.end);
    const int first_tile = TileOf(run.FirstKey(window));
    const int end_tile = TileOf(run.EndKey() + kTileKeys - 1);
    BarrierWait(shared_.QFull(q_place_.slot, Group()), q_place_.parity);
    if (begin >= end) {
      ReleaseQ();
      Skip(end_tile - first_tile);
      return;
    }
    // Tiles that some row of this warpgroup sees, and among them those that all rows see whole.
    const int64_t low = run.Position(begin), high = run.Position(end - 1);
    const int begin_seen = TileOf(max(low - window + 1, int64_t{0}));
    const int end_seen = TileOf(high) + 1;
    const int begin_whole =
        min(TileOf(max(high - window + 1, int64_t{0}) + kTileKeys - 1), end_seen);
    const int end_whole = max(TileOf(low + 1), begin_whole);

    const int row = group_first + Warp() % 4 * 16 + Lane() / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows outside the run see what its nearest row sees; nobody reads them.
      last_key_[r] = run.Position(min(max(row + 8 * r, begin), end - 1));
    }

    Skip(begin_seen - first_tile);
    Reset();
    int tile = begin_seen;
    Begin(tile++);
    // Nothing is in flight between the steps, and no step has a branch while something is.
    for (; tile < begin_whole; ++tile) Step<true>(tile);
    for (; tile < end_whole; ++tile) Step<false>(tile);
    for (; tile < end_seen; ++tile) Step<true>(tile);
    ReleaseQ();
    End();
    Skip(end_tile - end_seen);
    Store(run, row);
  }

 private:
  __device__ static int Lane() { return threadIdx.x % 32; }
  __device__ static int Warp() { return threadIdx.x / 32; }
  __device__ static int Group() { return threadIdx.x / 128; }
  __device__ static int TileOf(int64_t key) { return static_cast<int>(key / kTileKeys); }

  __device__ float MaxLog2(float max) const { return fmaxf(max * scale_log2_, -FLT_MAX); }

  __device__ void ReleaseQ() {
    __syncwarp();
    if (Lane() == 0) BarrierArrive(shared_.QEmpty(q_place_.slot, Group()));
    q_place_.Advance();
  }

  // Done with the keys, or with the values, of a slot.
  __device__ void Release(int slot, bool condition = true) {
    __syncwarp();
    if (Lane() == 0 && condition) BarrierArrive(shared_.Empty(slot));
  }

  // Passes over tiles of which this warpgroup sees nothing.
  __device__ void Skip(int num_tiles) {
#pragma unroll 1
    for (int i = 0; i < num_tiles; ++i) {
      BarrierWait(shared_.Full(place_.slot), place_.parity);
      Release(place_.slot);
      Release(place_.slot);
      place_.Advance();
    }
  }

  __device__ void Reset() {
#pragma unroll
    for (float& value : o_) value = 0.0f;
    max_[0] = max_[1] = -FLT_MAX;
    sum_[0] = sum_[1] = 0.0f;
  }

  // s = q k^T of the tile in place_.
  __device__ void StartLogits() {
    const uint64_t q = WgmmaDescriptor(shared_.Q(q_place_.slot, Group()));
    const uint64_t keys = WgmmaDescriptor(shared_.Keys(place_.slot));
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kDk / 16; ++k) {
      const int offset = (k / 4 * kPanelBytes + k % 4 * 32) / 16;
      WgmmaShared<T>(s_, q + offset, keys + offset, k > 0);
    }
    WgmmaCommit();
  }

  // o += p v of the tile in `slot`.
  __device__ void StartOutputs(int slot) {
    const uint64_t values = WgmmaValuesDescriptor(shared_.Values(slot), kPanelBytes);
    WgmmaFence();
#pragma unroll
    for (int k = 0; k < kTileKeys / 16; ++k) {
      WgmmaValues<T>(o_, p_[2 * k][0], p_[2 * k][1], p_[2 * k + 1][0], p_[2 * k + 1][1],
                     values + k * (16 * 128) / 16);
    }
    WgmmaCommit();
  }

  // Hides keys that a row does not see.
  __device__ void Mask(int tile) {
    // Of the first key of this lane: what is left to compare are constants.
    const int64_t first_key = int64_t{tile} * kTileKeys + Lane() % 4 * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int end = static_cast<int>(min(last_key_[r] + 1 - first_key, int64_t{kTileKeys}));
      const int begin = static_cast<int>(
          max(last_key_[r] - params_.dims.window_tokens + 1 - first_key, int64_t{-kTileKeys}));
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int key = j * 8 + e;
          float& value = s_[4 * j + 2 * r + e];
          value = key < begin || key >= end ? -INFINITY : value;
        }
      }
    }
  }

  // s = exp(s - max); factor is what the sums so far shrink by. True when a maximum has moved.
  __device__ bool Exponentials(float (&factor)[2]) {
    bool changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float row_max = max_[r];
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
        row_max = fmaxf(row_max, fmaxf(s_[4 * j + 2 * r], s_[4 * j + 2 * r + 1]));
      }
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 1));
      row_max = fmaxf(row_max, __shfl_xor_sync(kFullWarp, row_max, 2));
      const float max_log2 = MaxLog2(row_max);
      factor[r] = Exp2(MaxLog2(max_[r]) - max_log2);
      changed |= row_max != max_[r];
      max_[r] = row_max;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& value = s_[4 * j + 2 * r + e];
          value = Exp2(fmaf(value, scale_log2_, -max_log2));
          sum += value;
        }
      }
      sum_[r] = fmaf(sum_[r], factor[r], sum);
    }
    return changed;
  }

  __device__ void PackP() {
#pragma unroll
    for (int j = 0; j < kTileKeys / 8; ++j) {
#pragma unroll
      for (int r = 0; r < 2; ++r) p_[j][r] = Pack2<T>(s_[4 * j + 2 * r], s_[4 * j + 2 * r + 1]);
    }
  }

  // The first tile: its outputs are started by the next step.
  __device__ void Begin(int tile) {
    BarrierWait(shared_.Full(place_.slot), place_.parity);
    StartLogits();
    WgmmaWait<0>();
    WgmmaTouch(s_);
    Release(place_.slot);
    Mask(tile);
    float factor[2];
    Exponentials(factor);
    PackP();
    previous_slot_ = place_.slot;
    place_.Advance();
  }

  template <bool kMasked>
  __device__ void Step(int tile) {
    BarrierWait(shared_.Full(place_.slot), place_.parity);
    StartLogits();
    StartOutputs(previous_slot_);
    WgmmaWait<1>();
    WgmmaTouch(s_);
    if constexpr (kMasked) Mask(tile);
    float factor[2];
    const bool changed = Exponentials(factor);
    // A condition that always holds: barriers and waits are kept in order, and so the exponentials
    // are not moved behind the wait.
    Release(place_.slot, sum_[0] != -1.0f && sum_[1] != -1.0f);
    WgmmaWait<0>();
    WgmmaTouch(o_);
    Release(previous_slot_);
    PackP();
    // To multiply by one changes nothing.
    if (__any_sync(kFullWarp, changed)) {
#pragma unroll
      for (int i = 0; i < kDv / 2; ++i) o_[i] *= factor[i / 2 % 2];
    }
    previous_slot_ = place_.slot;
    place_.Advance();
  }

  __device__ void End() {
    StartOutputs(previous_slot_);
    WgmmaWait<0>();
    WgmmaTouch(o_);
    Release(previous_slot_);
  }

  __device__ void Store(const WindowRun& run, int first_row) {
    const int c = Lane() % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + 8 * r;
      float sum = sum_[r];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      const float inverse = __fdividef(1.0f, sum);  // a row sees its own key at least
      const int64_t query = run.Query(row), head = run.Head(row);
      uint16_t* const to = static_cast<uint16_t*>(params_.o_win.data) +
                           query * params_.o_win.row_stride + head * params_.o_win.head_stride;
      const bool active = run.Holds(row);
#pragma unroll
      for (int j = 0; j < kDv / 8; j += 4) {
        // Lane c has values 2c and 2c + 1 of each 8; it gets all of the 8 that are number j + c.
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // + 0 makes a zero positive, whatever tiles of zeros were added to it.
          words[i] = Pack2<T>(fmaf(o_[4 * (j + i) + 2 * r], inverse, 0.0f),
                              fmaf(o_[4 * (j + i) + 2 * r + 1], inverse, 0.0f));
        }
        TransposeQuad(words);
        if (active) {
          *reinterpret_cast<uint4*>(to + (j + c) * 8) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
      if (params_.lse_win != nullptr && active && c == 0) {
        params_.lse_win[query * params_.dims.num_q_heads + head] =
            (MaxLog2(max_[r]) + Log2(sum)) * 0.6931471805599453f;
      }
    }
  }

  // words[i] of lane c becomes words[c] of lane i, among the four lanes of a quad.
  __device__ static void TransposeQuad(uint32_t (&words)[4]) {
    const int c = Lane() % 4;
    Exchange(words[0], words[1], c % 2 != 0, 1);
    Exchange(words[2], words[3], c % 2 != 0, 1);
    Exchange(words[0], words[2], c >= 2, 2);
    Exchange(words[1], words[3], c >= 2, 2);
  }

  // A lane gives its `low` if it is `upper`, else its `high`, and gets what the other gives.
  __device__ static void Exchange(uint32_t& low, uint32_t& high, bool upper, int distance) {
    const uint32_t got = __shfl_xor_sync(kFullWarp, upper ? low : high, distance);
    low = upper ? got : low;
    high = upper ? high : got;
  }

  const AttendWindowParams& params_;
  const Shared<Sizes> shared_;
  const float scale_log2_;
  RingPlace<Sizes::kSlots> place_;
  RingPlace<Sizes::kQBuffers> q_place_;
  int previous_slot_ = 0;
  float s_[kTileKeys / 2];
  uint32_t p_[kTileKeys / 8][2];
  float o_[kDv / 2];
  float max_[2], sum_[2];
  int64_t last_key_[2];
};

}  // namespace nsa::kernels::cuda::attend_window

#endif  // KERNELS_CUDA_ATTEND_WINDOW_CONSUMER_CUH_
