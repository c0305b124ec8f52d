// The backward of the window and of the compressed branch on Hopper's tensor cores.
//
// Queries are cut into chunks, later ones first. An item is (chunk, kv head, tile of 128 keys); a
// persistent CTA takes one after another. It owns dK and dV of its keys as far as the chunk's
// queries contribute, in registers, and walks the chunk's tiles of 64 rows, row q * G + h being
// head h of the group and query q of 64 / G in a row. Two consumer warpgroups own 64 keys each:
//
//   S^T = K Q^T, dP^T = V dO^T;  dV += (g P)^T dO, dK += dS^T Q with P and dS from registers;
//   dQ = dS K, dS by way of shared memory, each warpgroup half of the dimensions.
//
// dQ of a row tile is added to global memory by the copy engine, one key tile after another in
// ascending order: each waits for its turn, and the first one overwrites what is not to be added
// to. Row tiles are walked from the last one on: a window's later keys then come to a row after
// earlier ones as a matter of course. dK and dV of a chunk are added after those of the chunk
// before it in the order of items. All that an item waits for belongs to items taken earlier, so
// that there is always one that waits for nothing.
//
// Pipeline: one warp loads Q and dO by the copy engine, another brings the statistics, both a stage
// ahead; a warp for each dQ buffer sends it. While one warpgroup takes exponentials, the other
// multiplies.
#include <cstdint>

#include "kernels/cuda/attend_backward.cuh"
#include "kernels/cuda/attend_backward_consumer.cuh"
#include "kernels/cuda/attend_backward_copies.cuh"
#include "kernels/cuda/attend_backward_shared.cuh"
#include "kernels/cuda/attend_backward_work.cuh"
#include "kernels/cuda/launch.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/tensor_map.h"
#include "kernels/cuda/wgmma.cuh"

namespace nsa::kernels::cuda {
namespace attend_backward {

// Grid: one warp. Cuts the queries into chunks.
__global__ void __launch_bounds__(32)
    ListChunksKernel(const __grid_constant__ AttendBackwardArgs args,
                     const __grid_constant__ WorkLists lists) {
  const int32_t lane = threadIdx.x;
  // Including this lane's; `total` becomes the sum of all lanes.
  const auto sum_before = [&](int32_t value, int32_t& total) {
    int32_t sum = value;
    for (int32_t delta = 1; delta < 32; delta *= 2) {
      const int32_t other = __shfl_up_sync(kFullWarp, sum, delta);
      if (lane >= delta) sum += other;
    }
    total = __shfl_sync(kFullWarp, sum, 31);
    return sum - value;
  };
  int32_t num_chunks = 0;
  for (int32_t first = 0; first < args.queries.num_segments; first += 32) {
    const int32_t index = args.queries.num_segments - 1 - first - lane;
    Segment segment{};
    if (index >= 0) segment = args.queries.segments[index];
    const int32_t count =
        static_cast<int32_t>((segment.num_tokens + lists.chunk_queries - 1) / lists.chunk_queries);
    int32_t total;
    Chunk* const chunks = lists.chunks + num_chunks + sum_before(count, total);
    for (int32_t i = 0; i < count; ++i) {
      const int64_t begin = int64_t{count - 1 - i} * lists.chunk_queries;
      Chunk chunk;
      chunk.row = segment.row + begin;
      chunk.position = segment.position + begin;
      chunk.num_queries = static_cast<int32_t>(
          min(segment.num_tokens - begin, static_cast<int64_t>(lists.chunk_queries)));
      chunk.document = segment.document;
      chunk.first_tile = static_cast<int32_t>(KeysOf(args.rule, chunk.position).begin / kTileKeys);
      const int64_t end = KeysOf(args.rule, chunk.position + chunk.num_queries - 1).end;
      chunk.num_tiles =
          end == 0 ? 0 : static_cast<int32_t>((end + kTileKeys - 1) / kTileKeys) - chunk.first_tile;
      chunks[i] = chunk;
    }
    num_chunks += total;
  }
  __syncwarp();
  int32_t num_items = 0, num_row_tiles = 0;
  for (int32_t first = 0; first < num_chunks; first += 32) {
    const int32_t index = first + lane;
    int32_t items = 0, row_tiles = 0;
    if (index < num_chunks) {
      items = lists.chunks[index].num_tiles * args.queries.kv_heads.size();
      row_tiles = (lists.chunks[index].num_queries + lists.tile_queries - 1) / lists.tile_queries;
    }
    int32_t all_items, all_row_tiles;
    const int32_t item_begin = num_items + sum_before(items, all_items);
    const int32_t row_tile_begin = num_row_tiles + sum_before(row_tiles, all_row_tiles);
    if (index < num_chunks) {
      lists.chunks[index].item_begin = item_begin;
      lists.chunks[index].row_tile_begin = row_tile_begin;
    }
    num_items += all_items;
    num_row_tiles += all_row_tiles;
  }
  if (lane == 0) *lists.counts = {0, num_chunks, num_items, num_row_tiles};
}

// Grid: any. The rows of a kv head's dk and dv that segments cover become zero; CTA i owns every
// gridDim-th token, beginning with i.
__global__ void __launch_bounds__(128)
    ZeroKeysKernel(const __grid_constant__ AttendBackwardArgs args) {
  const HeadRange heads = args.queries.kv_heads;
  const auto zero = [&](const TokenRows& rows, const GradientRows& gradients, int32_t head_dim) {
    if (gradients.adds) return;
    int64_t token = blockIdx.x;
    for (int32_t s = 0; s < rows.num_segments; ++s) {
      const Segment segment = rows.segments[s];
      float* const base = segment.is_halo != 0 ? gradients.halo : gradients.own;
      for (; token < segment.num_tokens; token += gridDim.x) {
        float* const row = base + (segment.row + token) * gradients.row_stride;
        for (int32_t i = threadIdx.x * 4; i < heads.size() * head_dim; i += 128 * 4) {
          const int64_t head = heads.begin + i / head_dim;
          *reinterpret_cast<float4*>(row + head * gradients.head_stride + i % head_dim) =
              make_float4(0, 0, 0, 0);
        }
      }
      token -= segment.num_tokens;
    }
  };
  zero(args.k, args.dk, args.dims.head_dim_qk);
  zero(args.v, args.dv, args.dims.head_dim_v);
}

// Grid: a CTA for each chunk, or fewer. The rows of dq that nobody overwrites become zero.
__global__ void __launch_bounds__(128)
    ZeroQueriesKernel(const __grid_constant__ AttendBackwardArgs args,
                      const __grid_constant__ WorkLists lists) {
  const int64_t row_values =
      int64_t{args.queries.kv_heads.size()} * GroupSize(args.dims) * args.dims.head_dim_qk;
  for (int32_t c = blockIdx.x; c < lists.counts->num_chunks; c += gridDim.x) {
    const Chunk chunk = lists.chunks[c];
    for (int32_t first = 0; first < chunk.num_queries; first += lists.tile_queries) {
      if (IsOverwritten(args.rule, chunk.position, chunk.num_queries, lists.tile_queries, first)) {
        continue;
      }
      float4* const to =
          reinterpret_cast<float4*>(args.queries_gradients.dq + (chunk.row + first) * row_values);
      const int64_t count = min(lists.tile_queries, chunk.num_queries - first) * row_values / 4;
      for (int64_t i = threadIdx.x; i < count; i += 128) to[i] = make_float4(0, 0, 0, 0);
    }
  }
}

// Grid: one CTA per SM, which takes one item after another.
template <class T, int kDk, int kDv>
__global__ void __launch_bounds__(kThreads, 1)
    AttendBackwardKernel(const __grid_constant__ AttendBackwardArgs args,
                         const __grid_constant__ WorkLists lists,
                         const __grid_constant__ TensorMaps maps) {
  using Sizes = Shape<kDk, kDv>;
  extern __shared__ __align__(1024) char memory[];
  const Shared<Sizes> shared{Uniform(SharedAddress(memory))};
  Item* const items = reinterpret_cast<Item*>(memory + Sizes::kItem);
  // Rows that no box covers take part in sums, times zero.
  if (lists.tile_queries * GroupSize(args.dims) != kTileRows) {
    for (int i = threadIdx.x * 16; i < kStages * Sizes::kStageBytes; i += kThreads * 16) {
      *reinterpret_cast<uint4*>(memory + Sizes::kRows + i) = make_uint4(0, 0, 0, 0);
    }
    FenceProxyAsync();
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(shared.RowsFull(i), 2);                    // the copy's and the statistics'
      BarrierInit(shared.RowsEmpty(i), 2 * kConsumerWarps);  // once amid a step
    }
    for (int i = 0; i < Sizes::kDqBuffers; ++i) {
      BarrierInit(shared.DqFull(i), kConsumerWarps);
      BarrierInit(shared.DqEmpty(i), 1);
    }
    BarrierInit(shared.DsRead(), kConsumerWarps);
    BarrierInitFence();
  }
  const int warp = threadIdx.x / 32;
  const auto take = [&](Item& item) {
    const Item next = TakeItem(args, lists);
    if (threadIdx.x % 32 == 0) item = next;
  };
  const auto for_each_item = [&](auto& role) {
    for (int n = 0;; ++n) {
      SyncThreads(kItemBarrier, kThreads);  // the item before is done with, this one is known
      const Item& item = items[n % 2];
      if (item.kv_head < 0) break;
      role.Run(item);
      // While the consumers are still at work.
      if (warp == kConsumerWarps) take(items[(n + 1) % 2]);
    }
  };
  if (warp < kConsumerWarps) {
    RaiseRegisters<kConsumerRegisters>();
    Consumer<T, kDk, kDv> consumer(args, lists, shared);
    for_each_item(consumer);
  } else {
    LowerRegisters<kProducerRegisters>();
    if (warp == kConsumerWarps) {
      take(items[0]);
      Loader<kDk, kDv> loader(args, maps, lists.tile_queries, shared);
      for_each_item(loader);
    } else if (warp == kConsumerWarps + 1) {
      Teller<Sizes> teller(args, lists.tile_queries, shared);
      for_each_item(teller);
    } else {
      Sender<kDk, kDv> sender(args, maps, lists, shared, warp - kConsumerWarps - 2);
      for_each_item(sender);
    }
  }
}

cudaError_t MakeTensorMaps(const AttendBackwardArgs& args, int32_t tile_queries, TensorMaps* maps) {
  const EncodeTensorMap encode = FindEncodeTensorMap();
  if (encode == nullptr) return cudaErrorNotSupported;
  const AttentionDims& dims = args.dims;
  const int32_t group_size = GroupSize(dims);
  const auto make = [&](DType dtype, const ConstTensor3& tensor, int32_t num_heads,
                        int32_t head_dim, CUtensorMap* map) {
    return MakeTensorMap(encode,
                         {dtype, tensor.data, args.queries.num_tokens, num_heads, head_dim,
                          tensor.row_stride, tensor.head_stride, group_size, tile_queries},
                         map);
  };
  const int32_t num_heads = args.queries.kv_heads.size() * group_size;
  const ConstTensor3 dq = {args.queries_gradients.dq, int64_t{num_heads} * dims.head_dim_qk,
                           dims.head_dim_qk};
  const bool made =
      make(dims.dtype, args.queries.q, dims.num_q_heads, dims.head_dim_qk, &maps->q) &&
      make(dims.dtype, args.outputs.d_o, dims.num_q_heads, dims.head_dim_v, &maps->d_o) &&
      make(DType::kF32, dq, num_heads, dims.head_dim_qk, &maps->dq);
  return made ? cudaSuccess : cudaErrorInvalidValue;
}

template <class T, int kDk, int kDv>
cudaError_t LaunchShape(const AttendBackwardArgs& args, const WorkLists& lists,
                        const TensorMaps& maps, const Device& device, cudaStream_t stream) {
  constexpr int kBytes = Shape<kDk, kDv>::kBytes;
  const auto kernel = AttendBackwardKernel<T, kDk, kDv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<device.num_sms, kThreads, kBytes, stream>>>(args, lists, maps);
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const AttendBackwardArgs& args, const WorkLists& lists, const TensorMaps& maps,
                   const Device& device, cudaStream_t stream) {
  switch (args.dims.head_dim_qk) {
    case 64:
      return LaunchShape<T, 64, 64>(args, lists, maps, device, stream);
    case 128:
      return LaunchShape<T, 128, 128>(args, lists, maps, device, stream);
    default:
      return LaunchShape<T, 192, 128>(args, lists, maps, device, stream);
  }
}

}  // namespace attend_backward

size_t AttendBackwardScratchBytes(const AttentionDims& dims, int64_t num_tokens,
                                  int32_t num_segments, int32_t num_kv_heads,
                                  const ChunkLimits& limits) {
  return attend_backward::CarveLists(dims, num_tokens, num_segments, num_kv_heads, limits, nullptr)
      .num_bytes;
}

cudaError_t LaunchAttendBackwardFast(const AttendBackwardArgs& args, const ChunkLimits& limits,
                                     void* scratch, const Device& device, cudaStream_t stream) {
  const Queries& queries = args.queries;
  const attend_backward::WorkLists lists =
      attend_backward::CarveLists(args.dims, queries.num_tokens, queries.num_segments,
                                  queries.kv_heads.size(), limits, scratch);
  cudaError_t error = cudaSuccess;
  if (!args.dk.adds || !args.dv.adds) {
    const auto zero = attend_backward::ZeroKeysKernel;
    zero<<<8 * device.num_sms, 128, 0, stream>>>(args);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  if (queries.num_tokens == 0) return cudaSuccess;
  attend_backward::TensorMaps maps;
  error = attend_backward::MakeTensorMaps(args, lists.tile_queries, &maps);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(scratch, 0, lists.zeroed_bytes, stream);
  if (error != cudaSuccess) return error;
  const auto list = attend_backward::ListChunksKernel;
  list<<<1, 32, 0, stream>>>(args, lists);
  if (!args.queries_gradients.adds) {
    const auto zero = attend_backward::ZeroQueriesKernel;
    zero<<<8 * device.num_sms, 128, 0, stream>>>(args, lists);
  }
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  return args.dims.dtype == DType::kBF16
             ? attend_backward::Launch<__nv_bfloat16>(args, lists, maps, device, stream)
             : attend_backward::Launch<__half>(args, lists, maps, device, stream);
}

}  // namespace nsa::kernels::cuda
