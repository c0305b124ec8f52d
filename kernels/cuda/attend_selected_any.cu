// Selected attention for any shape, on any GPU.
//
// A warp works alone: for 16 of the heads of one query, it walks the query's list of blocks and
// keeps a ring of slots full by asynchronous copies. A slot holds 16 tokens, as many as divide
// every block. What warps select in common meets in the L2: they are ordered by kv head.
//
// Shared memory: kSlots slots of K [16,Dk] and V [16,Dv] in the layout of a record, then q [16,Dk];
// 56 KiB at most.
#include "kernels/cuda/attend_selected.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kChunkTokens = 16;
constexpr int kSlots = 3;
constexpr int kWarpThreads = 32;

// The tokens that a query attends to, a chunk at a time. All lanes of the warp.
class Chunks {
 public:
  // `ring` is the shared address of the slots.
  __device__ Chunks(const AttendSelectedParams& params, int64_t row, const QueryPlace& place,
                    int32_t kv_head, uint32_t ring)
      : params_(params),
        picks_(params.block_indices +
               (row * params.dims.num_kv_heads + kv_head) * params.dims.num_selected_blocks),
        locations_(params.locations + kv_head * params.num_blocks +
                   params.queries.documents[place.document].slc_block_begin),
        position_(place.position),
        ring_(ring) {
    FindBlock();
  }

  // Starts to copy the next chunk, if there is one; a group of copies in any case.
  __device__ void StartNext() {
    if (record_ != nullptr) {
      const AttentionDims& dims = params_.dims;
      const uint32_t k_bytes = kChunkTokens * dims.head_dim_qk * 2;
      const uint32_t v_bytes = kChunkTokens * dims.head_dim_v * 2;
      const uint32_t slot = Slot(num_started_++);
      Copy(slot, record_ + chunk_ * k_bytes, k_bytes);
      Copy(slot + k_bytes,
           record_ + dims.select_block_tokens * dims.head_dim_qk * 2 + chunk_ * v_bytes, v_bytes);
      const int64_t next_token = first_token_ + kChunkTokens;
      num_visible_ = position_ + 1 - first_token_;
      if (next_token > position_) {
        record_ = nullptr;
      } else if (++chunk_ * kChunkTokens < dims.select_block_tokens) {
        first_token_ = next_token;
      } else {
        ++index_;
        FindBlock();
      }
    }
    CopyAsyncCommit();
  }

  __device__ int32_t num_started() const { return num_started_; }
  // Of the chunk that was started last, tokens up to the query's own.
  __device__ int64_t num_visible() const { return num_visible_; }
  __device__ uint32_t Slot(int32_t chunk) const {
    return ring_ + chunk % kSlots * kChunkTokens *
                       static_cast<uint32_t>(params_.dims.head_dim_qk + params_.dims.head_dim_v) *
                       2;
  }

 private:
  // Makes block `index_` of the list the current one. Lists end with the query's own block, or -1.
  __device__ void FindBlock() {
    const int32_t lane = threadIdx.x % 32, num_picks = params_.dims.num_selected_blocks;
    record_ = nullptr;
    if (index_ >= num_picks) return;
    if (index_ % 32 == 0) {
      lane_pick_ = index_ + lane < num_picks ? picks_[index_ + lane] : -1;
      lane_location_ = lane_pick_ >= 0 ? locations_[lane_pick_] : 0;
    }
    const int64_t pick = __shfl_sync(kFullWarp, lane_pick_, index_ % 32);
    const int64_t location = __shfl_sync(kFullWarp, lane_location_, index_ % 32);
    chunk_ = 0;
    first_token_ = pick * params_.dims.select_block_tokens;
    if (pick < 0 || first_token_ > position_) return;
    const int64_t slot = location - params_.num_own_records;
    record_ = static_cast<const char*>(slot < 0 ? params_.own_records : params_.slots) +
              (slot < 0 ? location : slot) * RecordBytes(params_.dims);
  }

  __device__ static void Copy(uint32_t to, const char* from, uint32_t num_bytes) {
    for (uint32_t i = threadIdx.x % 32 * 16; i < num_bytes; i += 32 * 16) {
      CopyAsync16(to + i, from + i, true);
    }
  }

  const AttendSelectedParams& params_;
  const int32_t* const picks_;      // [n]
  const int32_t* const locations_;  // of the document's blocks
  const int64_t position_;
  const uint32_t ring_;
  int32_t index_ = 0;  // in the list
  int32_t lane_pick_ = -1, lane_location_ = 0;
  const char* record_;  // null: there is no more
  int32_t chunk_;       // of the block
  int64_t first_token_;
  int64_t num_visible_ = 0;
  int32_t num_started_ = 0;
};

// Grid: one CTA, a warp, for each tile, which it owns.
template <class T, int kDv>
__global__ void __launch_bounds__(kWarpThreads)
    AttendSelectedAnyKernel(const __grid_constant__ AttendSelectedParams params,
                            const __grid_constant__ SelectedGeometry geometry) {
  extern __shared__ __align__(128) char memory[];
  const AttentionDims& dims = params.dims;
  const WarpRows rows(params, geometry, blockIdx.x, /*warp=*/0);
  const QueryPlace place = FindQuery(params.queries, rows.row);
  if (rows.num_heads == 0 || place.document < 0) return;
  Chunks chunks(params, rows.row, place, rows.first_head / geometry.group_size,
                SharedAddress(memory));
  for (int i = 0; i < kSlots - 1; ++i) chunks.StartNext();
  SharedQ q(reinterpret_cast<uint4*>(memory + kSlots * geometry.slot_bytes), dims.head_dim_qk,
            params.queries.q.data);
  LoadQ(params, rows, q);
  q.WaitUntilLoaded();
  WarpAttention<T, kDv> attention(dims.softmax_scale * 1.4426950408889634f);
  for (int32_t i = 0; i < chunks.num_started(); ++i) {
    CopyAsyncWait<kSlots - 2>();
    __syncwarp();  // all lanes' copies are there, and all have read the slot that is filled next
    chunks.StartNext();
    const uint32_t k = chunks.Slot(i), v = k + kChunkTokens * dims.head_dim_qk * 2;
    if (i + 1 < chunks.num_started() || chunks.num_visible() >= kChunkTokens) {
      attention.template Attend<kChunkTokens, false>(q, k, v, kChunkTokens, {});
    } else {
      const int32_t end = static_cast<int32_t>(chunks.num_visible());
      attention.template Attend<kChunkTokens, true>(q, k, v, kChunkTokens, {{0, 0}, {end, end}});
    }
  }
  StoreGated(params, rows, attention);
}

SelectedGeometry MakeGeometry(const AttendSelectedParams& params) {
  const AttentionDims& dims = params.dims;
  SelectedGeometry g{};
  g.group_size = dims.group_size();
  g.warps_per_query = 1;
  g.queries_per_tile = 1;
  g.parts_per_query = (dims.group_size() + kTileRows - 1) / kTileRows;
  g.num_row_tiles = static_cast<int32_t>(params.query_end - params.query_begin);
  g.num_tiles = params.queries.kv_heads.size() * g.num_row_tiles * g.parts_per_query;
  g.slot_bytes = kChunkTokens * (dims.head_dim_qk + dims.head_dim_v) * 2;
  g.value_bytes = dims.head_dim_v * 2;
  g.shared_bytes = kSlots * g.slot_bytes + kTileRows * dims.head_dim_qk * 2;
  return g;
}

template <class T, int kDv>
cudaError_t LaunchShape(const AttendSelectedParams& params, cudaStream_t stream) {
  const SelectedGeometry geometry = MakeGeometry(params);
  if (geometry.num_tiles == 0) return cudaSuccess;
  const auto kernel = AttendSelectedAnyKernel<T, kDv>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, geometry.shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(geometry.num_tiles), kWarpThreads, geometry.shared_bytes,
           stream>>>(params, geometry);
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const AttendSelectedParams& params, cudaStream_t stream) {
  switch (params.dims.head_dim_v) {
    case 64:
      return LaunchShape<T, 64>(params, stream);
    case 128:
      return LaunchShape<T, 128>(params, stream);
    case 192:
      return LaunchShape<T, 192>(params, stream);
    default:
      return LaunchShape<T, 256>(params, stream);
  }
}

}  // namespace

cudaError_t LaunchAttendSelectedAny(const AttendSelectedParams& params, const Device&,
                                    cudaStream_t stream) {
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, stream)
                                           : Launch<__half>(params, stream);
}

}  // namespace nsa::kernels::cuda
