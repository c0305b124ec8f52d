// The warps of attend_backward_fast.cu that bring Q, dO and what is known of the rows, a stage
// ahead, and those that send dQ.
#ifndef KERNELS_CUDA_ATTEND_BACKWARD_COPIES_CUH_
#define KERNELS_CUDA_ATTEND_BACKWARD_COPIES_CUH_

#include <cstdint>

#include "kernels/cuda/attend_backward.cuh"
#include "kernels/cuda/attend_backward_shared.cuh"
#include "kernels/cuda/attend_backward_work.cuh"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"

namespace nsa::kernels::cuda::attend_backward {

// The lane that brings q and dO.
template <int kDk, int kDv>
class Loader {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Loader(const AttendBackwardArgs& args, const TensorMaps& maps, int32_t tile_queries,
                    const Shared<Sizes>& shared)
      : maps_(maps),
        tile_queries_(tile_queries),
        group_size_(GroupSize(args.dims)),
        shared_(shared) {}

  __device__ void Run(const Item& item) {
    if (threadIdx.x % 32 == 0) {
      for (int32_t i = item.end - 1; i >= item.begin; --i) Load(item, i * tile_queries_);
    }
    __syncwarp();
  }

 private:
  __device__ void Load(const Item& item, int32_t first_query) {
    const int stage = turn_.slot();
    const uint32_t full = shared_.RowsFull(stage);
    const int32_t row = static_cast<int32_t>(item.row) + first_query;
    const int32_t head = item.kv_head * group_size_;
    BarrierWait(shared_.RowsEmpty(stage), turn_.parity() ^ 1);
    BarrierArriveExpectBytes(full, tile_queries_ * group_size_ * (kDk + kDv) * 2);
#pragma unroll
    for (int panel = 0; panel < kDk / 64; ++panel) {
      TensorCopy(shared_.Q(stage) + panel * kRowPanelBytes, &maps_.q, panel * 64, head, row, full);
    }
#pragma unroll
    for (int panel = 0; panel < kDv / 64; ++panel) {
      TensorCopy(shared_.OutputGradient(stage) + panel * kRowPanelBytes, &maps_.d_o, panel * 64,
                 head, row, full);
    }
    ++turn_.n;
  }

  const TensorMaps& maps_;
  const int32_t tile_queries_, group_size_;
  const Shared<Sizes> shared_;
  Turn<kStages> turn_;
};

// The warp that tells what is known of the rows; a lane has two neighbours of them.
template <class Shape>
class Teller {
 public:
  __device__ Teller(const AttendBackwardArgs& args, int32_t tile_queries,
                    const Shared<Shape>& shared)
      : args_(args), tile_queries_(tile_queries), shared_(shared) {
    const int32_t group_size = GroupSize(args.dims);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int32_t row = threadIdx.x % 32 * 2 + e;
      query_[e] = row < tile_queries * group_size ? row / group_size : kNone;
      head_[e] = row % group_size;
    }
  }

  __device__ void Run(const Item& item) {
    // Of positions since the first query of the document that sees a key of the tile.
    const int64_t since =
        item.position - QueriesOf(args_.rule, int64_t{item.tile} * kTileKeys, 0).begin;
    const int64_t first_row =
        item.row * args_.dims.num_q_heads + item.kv_head * GroupSize(args_.dims);
    for (int32_t i = item.end - 1; i >= item.begin; --i) {
      Known known[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        known[e] = {};
        const int32_t query = i * tile_queries_ + query_[e];
        if (query_[e] == kNone || query >= item.num_queries) continue;
        const int64_t index = first_row + int64_t{query} * args_.dims.num_q_heads + head_[e];
        known[e].statistics = LoadStatistics(args_.outputs, index);
        const int64_t position = min(since + query, int64_t{1} << 30);
        if (position < 0) continue;
        const int32_t end = static_cast<int32_t>(position) / args_.rule.stride + 1;
        known[e].begin = min(max(end - args_.rule.window, 0), kTileKeys);
        known[e].end = min(end, kTileKeys);
      }
      // What is above is on its way before the stage is free.
      const int stage = turn_.slot();
      BarrierWait(shared_.RowsEmpty(stage), turn_.parity() ^ 1);
      const uint32_t to = shared_.Statistics(stage) + threadIdx.x % 32 * 16;
      StoreShared(to, make_float2(known[0].statistics.lse_log2, known[1].statistics.lse_log2));
      StoreShared(to + 8, make_float2(known[0].statistics.gate, known[1].statistics.gate));
      StoreShared(shared_.Statistics(stage) + kMeans + threadIdx.x % 32 * 8,
                  make_float2(known[0].statistics.mean_dp, known[1].statistics.mean_dp));
      StoreShared(to + kBounds,
                  make_float2(__int_as_float(known[0].begin), __int_as_float(known[1].begin)));
      StoreShared(to + kBounds + 8,
                  make_float2(__int_as_float(known[0].end), __int_as_float(known[1].end)));
      __syncwarp();
      if (threadIdx.x % 32 == 0) BarrierArrive(shared_.RowsFull(stage));
      ++turn_.n;
    }
  }

 private:
  static constexpr int32_t kNone = -1;

  struct Known {
    RowStatistics statistics;
    int32_t begin, end;  // of the keys that it sees, in the tile
  };

  const AttendBackwardArgs& args_;
  const int32_t tile_queries_;
  const Shared<Shape> shared_;
  int32_t query_[2], head_[2];
  Turn<kStages> turn_;
};

// The lane that sends every kDqBuffers-th dQ, those of one buffer.
template <int kDk, int kDv>
class Sender {
 public:
  using Sizes = Shape<kDk, kDv>;

  __device__ Sender(const AttendBackwardArgs& args, const TensorMaps& maps, const WorkLists& lists,
                    const Shared<Sizes>& shared, int buffer)
      : args_(args), maps_(maps), lists_(lists), shared_(shared), buffer_(buffer) {}

  __device__ void Run(const Item& item) {
    if (threadIdx.x % 32 == 0) {
      for (int32_t i = item.end - 1; i >= item.begin; --i, ++turn_.n) {
        if (turn_.slot() == buffer_) Send(item, i);
      }
    }
    __syncwarp();
  }

 private:
  __device__ void Send(const Item& item, int32_t row_tile) {
    const int32_t first_query = row_tile * lists_.tile_queries;
    const int32_t turn =
        item.tile -
        static_cast<int32_t>(KeysOf(args_.rule, item.position + first_query).begin / kTileKeys);
    int32_t* const turns = lists_.query_turns + item.turns + row_tile;
    BarrierWait(shared_.DqFull(buffer_), turn_.parity());
    while (LoadAcquire(turns) != turn) {
    }
    FenceProxyAsyncAll();
    const int32_t head = (item.kv_head - args_.queries.kv_heads.begin) * GroupSize(args_.dims);
    const int32_t row = static_cast<int32_t>(item.row) + first_query;
    const bool overwrites = !args_.queries_gradients.adds && turn == 0 &&
                            IsOverwritten(args_.rule, item.position, item.num_queries,
                                          lists_.tile_queries, first_query);
#pragma unroll
    for (int box = 0; box < kDk / 32; ++box) {
      const uint32_t from = shared_.Dq(buffer_) + box * kRowPanelBytes;
      if (overwrites) {
        TensorStore(&maps_.dq, box * 32, head, row, from);
      } else {
        TensorAdd(&maps_.dq, box * 32, head, row, from);
      }
    }
    BulkCommit();
    BulkWaitRead();
    BarrierArrive(shared_.DqEmpty(buffer_));
    BulkWait();
    FenceProxyAsyncAll();
    StoreRelease(turns, turn + 1);
  }

  const AttendBackwardArgs& args_;
  const TensorMaps& maps_;
  const WorkLists& lists_;
  const Shared<Sizes> shared_;
  const int buffer_;
  Turn<Sizes::kDqBuffers> turn_;
};

}  // namespace nsa::kernels::cuda::attend_backward

#endif  // KERNELS_CUDA_ATTEND_BACKWARD_COPIES_CUH_
