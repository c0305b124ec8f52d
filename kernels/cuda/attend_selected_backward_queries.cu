// dq of the selected attention on Hopper: step 3 of selected_backward.cuh, for blocks of 64 tokens.
//
// Tiles, warps and the ring are those of the forward (attend_selected.cuh), but slots hold keys
// alone. A warp owns 16 heads of a query, and takes its picks in ascending order: dq += dS K, with
// dS of the next pick on its way.
#include "kernels/cuda/attend_selected.cuh"
#include "kernels/cuda/selected_backward.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kFragments = kTileKeys / kFragmentRows;  // of a pick and 16 heads

template <class T, int kDk>
class GradientRows {
 public:
  __device__ GradientRows(const AttendSelectedBackwardParams& params, const SelectedPiece& piece)
      : params_(params), piece_(piece) {}

  __device__ void Load(const WarpRows& rows) {
    if (rows.num_heads == 0) return;
    const int64_t query = rows.row - piece_.query_begin;
    from_ = piece_.ds +
            (query * params_.dims.num_selected_blocks * PickFragments(params_.dims) +
             HeadTile(rows) * kFragments) *
                32 +
            threadIdx.x % 32;
    pick_ = 0;
    LoadPick();
  }

  __device__ void Begin() {
#pragma unroll
    for (float(&tile)[4] : sums_) {
#pragma unroll
      for (float& value : tile) value = 0.0f;
    }
  }

  __device__ void Attend(const RecordNote&, uint32_t k, int32_t, int64_t) {
    uint4 ds[kFragments];
#pragma unroll
    for (int i = 0; i < kFragments; ++i) ds[i] = next_[i];
    if (++pick_ < params_.dims.num_selected_blocks) LoadPick();
    const uint32_t k_lane = ValuesLane<kDk>(k, threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      const uint4 a = TransposeFragment(ds[i]);
      MultiplyValues<T, kDk>(a.x, a.y, a.z, a.w, k_lane + i * (kDk * 32), sums_);
    }
  }

  // Load has already been called for the next rows.
  __device__ void End(const WarpRows& rows) {
    StoreQueryGradients(params_, piece_.kv_head, rows.row, HeadTile(rows), sums_);
  }

 private:
  __device__ int32_t HeadTile(const WarpRows& rows) const {
    const int32_t group_size = params_.dims.num_q_heads / params_.dims.num_kv_heads;
    return (rows.first_head - piece_.kv_head * group_size) / kFragmentRows;
  }
  // There is scratch for n picks; nobody uses what a shorter list leaves there.
  __device__ void LoadPick() {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
      next_[i] = from_[int64_t{pick_} * PickFragments(params_.dims) * 32 + i * 32];
    }
  }

  const AttendSelectedBackwardParams& params_;
  const SelectedPiece& piece_;
  const uint4* from_ = nullptr;
  int32_t pick_ = 0;
  uint4 next_[kFragments];
  float sums_[kDk / 8][4];
};

// Grid: one CTA per SM; CTA i owns tiles i, i + gridDim, ...
template <class T, int kDk>
__global__ void __launch_bounds__(kSelectedThreads, 1)
    SelectedQueriesKernel(const __grid_constant__ AttendSelectedBackwardParams params,
                          const __grid_constant__ SelectedPiece piece,
                          const __grid_constant__ AttendSelectedParams forward,
                          const __grid_constant__ SelectedGeometry geometry) {
  extern __shared__ __align__(128) char memory[];
  const SelectedShared shared(memory, geometry);
  const auto prefetch = [&](const SelectedTile& tile) {
    const int64_t row = tile.first_row + threadIdx.x % 32;
    if (threadIdx.x % 32 >= geometry.queries_per_tile || row >= forward.query_end) return;
    const int64_t pick_bytes = PickFragments(params.dims) * 512;
    const int64_t list_bytes = params.dims.num_selected_blocks * pick_bytes;
    PrefetchL2(reinterpret_cast<const char*>(piece.ds) + (row - piece.query_begin) * list_bytes,
               static_cast<uint32_t>(list_bytes));
  };
  RunSelected(forward, geometry, shared, prefetch, [&] {
    GradientRows<T, kDk> work(params, piece);
    ConsumeSelected<kTileKeys>(forward, geometry, shared, work);
  });
}

template <class T, int kDk>
cudaError_t LaunchShape(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                        const Device& device, cudaStream_t stream) {
  AttendSelectedParams forward{};
  forward.dims = params.dims;
  forward.queries = params.queries;
  forward.queries.kv_heads = {piece.kv_head, piece.kv_head + 1};
  forward.query_begin = piece.query_begin;
  forward.query_end = piece.query_begin + piece.num_queries;
  forward.block_indices = params.block_indices;
  forward.locations = params.locations;
  forward.num_blocks = params.num_blocks;
  forward.own_records = params.own_records;
  forward.num_own_records = params.num_own_records;
  forward.slots = params.slots;
  const SelectedGeometry geometry = MakeSelectedGeometry(forward, device, /*value_bytes=*/0);
  const auto kernel = SelectedQueriesKernel<T, kDk>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, geometry.shared_bytes);
  if (error != cudaSuccess) return error;
  const int32_t grid = geometry.num_tiles < device.num_sms ? geometry.num_tiles : device.num_sms;
  kernel<<<static_cast<unsigned>(grid), kSelectedThreads, geometry.shared_bytes, stream>>>(
      params, piece, forward, geometry);
  return cudaGetLastError();
}

template <class T>
cudaError_t Launch(const AttendSelectedBackwardParams& params, const SelectedPiece& piece,
                   const Device& device, cudaStream_t stream) {
  return params.dims.head_dim_qk == 64 ? LaunchShape<T, 64>(params, piece, device, stream)
                                       : LaunchShape<T, 128>(params, piece, device, stream);
}

}  // namespace

cudaError_t LaunchSelectedQueriesFast(const AttendSelectedBackwardParams& params,
                                      const SelectedPiece& piece, const Device& device,
                                      cudaStream_t stream) {
  return params.dims.dtype == DType::kBF16 ? Launch<__nv_bfloat16>(params, piece, device, stream)
                                           : Launch<__half>(params, piece, device, stream);
}

}  // namespace nsa::kernels::cuda
