// The backward of the selected attention for any shape, on any GPU.
//
// Keys: a CTA of one warp owns 16 tokens of a block, and 128 dimensions of their dK and dV, for one
// item of its list. For each pick, and 16 heads of the query at a time, it brings rows of q and dO
// to shared memory, S^T = K q^T and dP^T = V dO^T follow with K and V straight from the L1, and the
// accumulators are operands of dV += (g P)^T dO and dK += dS^T q as they are.
// Shared memory: rows [16,Dk] of q, then [16,Dv] of dO, each kRowPadding further apart than dense,
// so that ldmatrix meets no bank twice; 17 KiB at most.
//
// Queries: a warp owns 16 heads of one query; dS and K come straight from global memory.
#include "kernels/cuda/rows.cuh"
#include "kernels/cuda/selected_backward.cuh"

namespace nsa::kernels::cuda {
namespace {

constexpr int kSliceDims = 128;
constexpr int kSliceTiles = kSliceDims / 8;
constexpr int kRowPadding = 8;  // values
constexpr int kMaxHeadDim = 256;
constexpr float kLog2E = 1.4426950408889634f;

// Of a warp's 16 keys x 16 heads.
using Tile = float[2][4];

// tile [16 keys,16 heads] = keys * rows^T; `keys` is where 16 tokens begin in a record, `rows` are
// 16 rows in shared memory.
template <class T>
__device__ void MultiplyKeys(const char* keys, const uint16_t* rows, int32_t head_dim, Tile& tile) {
  const int32_t lane = threadIdx.x, groups = head_dim / 32;
  for (float(&column)[4] : tile) {
    for (float& value : column) value = 0.0f;
  }
  const uint32_t* const matrices = reinterpret_cast<const uint32_t*>(keys) + lane;
  for (int32_t group = 0; group < groups; ++group) {
    uint32_t a[4][2];  // [matrix][eight tokens]
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      a[m][0] = matrices[(group * 4 + m) * 32];
      a[m][1] = matrices[((groups + group) * 4 + m) * 32];
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      // As the layout of records orders dimensions.
      const uint4 b = *reinterpret_cast<const uint4*>(
          rows + (j * 8 + lane / 4) * (head_dim + kRowPadding) + group * 32 + lane % 4 * 8);
      MultiplyAdd<T>(tile[j], a[0][0], a[0][1], a[1][0], a[1][1], b.x, b.y);
      MultiplyAdd<T>(tile[j], a[2][0], a[2][1], a[3][0], a[3][1], b.z, b.w);
    }
  }
}

// sums [16 keys,dimensions] += fragment [16 keys,16 heads] * rows, from `first_dim` on.
template <class T>
__device__ void MultiplyRows(const uint4& fragment, const uint16_t* rows, int32_t head_dim,
                             int32_t first_dim, float (&sums)[kSliceTiles][4]) {
  const int32_t lane = threadIdx.x;
  const uint32_t address =
      SharedAddress(rows + lane % 16 * (head_dim + kRowPadding) + first_dim + lane / 16 * 8);
#pragma unroll
  for (int i = 0; i < kSliceTiles; i += 2) {
    if (first_dim + i * 8 >= head_dim) break;
    uint32_t b[4];
    LoadMatricesTransposed(b, address + i * 16);
    MultiplyAdd<T>(sums[i], fragment.x, fragment.y, fragment.z, fragment.w, b[0], b[1]);
    MultiplyAdd<T>(sums[i + 1], fragment.x, fragment.y, fragment.z, fragment.w, b[2], b[3]);
  }
}

// Brings heads [first_head, first_head + num_heads) of a query to shared memory, then zeros.
__device__ void CopyHeads(const ConstTensor3& tensor, int64_t query, int32_t first_head,
                          int32_t num_heads, int32_t head_dim, uint16_t* rows) {
  const int32_t row_pieces = head_dim / 8;
  const uint16_t* const from = static_cast<const uint16_t*>(tensor.data) +
                               query * tensor.row_stride + first_head * tensor.head_stride;
  for (int32_t i = threadIdx.x; i < kFragmentRows * row_pieces; i += 32) {
    const int32_t head = i / row_pieces, column = i % row_pieces * 8;
    const bool exists = head < num_heads;
    CopyAsync16(SharedAddress(rows + head * (head_dim + kRowPadding) + column),
                from + (exists ? head * tensor.head_stride + column : 0), exists);
  }
  CopyAsyncCommit();
}

// Adds a lane's part of dK or dV to rows of a token each.
__device__ void StoreSums(const float (&sums)[kSliceTiles][4], float* to, int32_t head_dim,
                          int32_t first_dim, float factor, bool adds) {
  const int32_t lane = threadIdx.x;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float2* const row =
        reinterpret_cast<float2*>(to + (lane / 4 + r * 8) * head_dim + first_dim) + lane % 4;
#pragma unroll
    for (int i = 0; i < kSliceTiles; ++i) {
      if (first_dim + i * 8 >= head_dim) break;
      const float2 before = adds ? row[i * 4] : make_float2(0, 0);
      row[i * 4] = make_float2(fmaf(sums[i][2 * r], factor, before.x),
                               fmaf(sums[i][2 * r + 1], factor, before.y));
    }
  }
}

// Grid: (any number, l' / 16, slices of 128 dimensions). CTA x owns items x, x + gridDim.x, ...
template <class T>
__global__ void __launch_bounds__(32)
    SelectedKeysAnyKernel(const __grid_constant__ AttendSelectedBackwardParams params,
                          const __grid_constant__ SelectedPiece piece) {
  __shared__ __align__(16) uint16_t memory[2 * kFragmentRows * (kMaxHeadDim + kRowPadding)];
  const AttentionDims& dims = params.dims;
  const int32_t lane = threadIdx.x, c = lane % 4;
  const int32_t dk = dims.head_dim_qk, dv = dims.head_dim_v, n = dims.num_selected_blocks;
  const int32_t group_size = dims.num_q_heads / dims.num_kv_heads, head_tiles = HeadTiles(dims);
  const int32_t key_tile = blockIdx.y, first_key = key_tile * kFragmentRows;
  const int32_t first_dim = blockIdx.z * kSliceDims;
  const float scale_log2 = dims.softmax_scale * kLog2E;
  uint16_t* const q = memory;
  uint16_t* const d_o = memory + kFragmentRows * (dk + kRowPadding);

  for (int32_t index = blockIdx.x; index < piece.num_items->items; index += gridDim.x) {
    const BlockItem item = piece.items[index];
    const char* const record = RecordAt(params, LocationOf(params, piece.kv_head, item.block));
    const char* const keys = record + first_key * dk * 2;
    const char* const values = record + (dims.select_block_tokens * dk + first_key * dv) * 2;
    float dk_sums[kSliceTiles][4] = {}, dv_sums[kSliceTiles][4] = {};
    for (int32_t i = 0; i < item.count; ++i) {
      const BlockPick pick = piece.picks[item.begin + i];
      const int64_t query = piece.query_begin + pick.index / n;
      for (int32_t head_tile = 0; head_tile < head_tiles; ++head_tile) {
        const int32_t first_head = piece.kv_head * group_size + head_tile * kFragmentRows;
        const int32_t num_heads = min(kFragmentRows, group_size - head_tile * kFragmentRows);
        __syncwarp();  // the rows have been read
        CopyHeads(params.queries.q, query, first_head, num_heads, dk, q);
        CopyHeads(params.outputs.d_o, query, first_head, num_heads, dv, d_o);
        CopyAsyncWait<0>();
        __syncwarp();
        Tile s, dp;
        MultiplyKeys<T>(keys, q, dk, s);
        MultiplyKeys<T>(values, d_o, dv, dp);
        uint32_t p_words[2][2], ds_words[2][2];  // [8 heads][8 keys]
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float p[4], ds[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int32_t head = j * 8 + c * 2 + e % 2, key = first_key + lane / 4 + e / 2 * 8;
            const int64_t row = query * dims.num_q_heads + first_head + head;
            const float lse = head < num_heads ? params.outputs.lse[row] : -INFINITY;
            const bool sees = lse != -INFINITY && key < pick.num_visible;
            const float gate = sees ? params.outputs.gate[row] : 0.0f;
            const float delta = sees ? params.outputs.delta[row] : 0.0f;
            const float weight = sees ? Exp2(fmaf(s[j][e], scale_log2, -lse * kLog2E)) : 0.0f;
            p[e] = gate * weight;
            ds[e] = weight * fmaf(gate, dp[j][e], -delta);
          }
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            p_words[j][r] = Pack2<T>(p[2 * r], p[2 * r + 1]);
            ds_words[j][r] = Pack2<T>(ds[2 * r], ds[2 * r + 1]);
          }
        }
        const uint4 p = make_uint4(p_words[0][0], p_words[0][1], p_words[1][0], p_words[1][1]);
        const uint4 ds = make_uint4(ds_words[0][0], ds_words[0][1], ds_words[1][0], ds_words[1][1]);
        if (first_dim == 0) {
          const int64_t fragment =
              int64_t{pick.index} * PickFragments(dims) + head_tile * gridDim.y + key_tile;
          piece.ds[fragment * 32 + lane] = ds;
        }
        MultiplyRows<T>(p, d_o, dv, first_dim, dv_sums);
        MultiplyRows<T>(ds, q, dk, first_dim, dk_sums);
      }
    }
    float* const sums = SumsOf(params, piece, item);
    const bool adds = item.partial < 0;
    StoreSums(dk_sums, sums + first_key * dk, dk, first_dim, dims.softmax_scale, adds);
    StoreSums(dv_sums, sums + dims.select_block_tokens * dk + first_key * dv, dv, first_dim, 1.0f,
              adds);
  }
}

// Grid: (queries of the piece, ceil(G / 16)). A CTA owns 16 heads of a query.
template <class T>
__global__ void __launch_bounds__(32)
    SelectedQueriesAnyKernel(const __grid_constant__ AttendSelectedBackwardParams params,
                             const __grid_constant__ SelectedPiece piece) {
  const AttentionDims& dims = params.dims;
  const int32_t lane = threadIdx.x, n = dims.num_selected_blocks;
  const int32_t dk = dims.head_dim_qk, groups = dk / 32;
  const int64_t query = piece.query_begin + blockIdx.x;
  const QueryPlace place = FindQuery(params.queries, query);
  if (place.document < 0) return;
  const int64_t first_block = params.queries.documents[place.document].slc_block_begin;
  const int32_t key_tiles = dims.select_block_tokens / kFragmentRows;
  const int32_t* const picks =
      params.block_indices + (query * dims.num_kv_heads + piece.kv_head) * n;

  float sums[kMaxHeadDim / 8][4] = {};  // [16 heads,Dk], dimensions as records order them
  for (int32_t i = 0; i < n; ++i) {
    const int64_t pick = picks[i];
    const int64_t num_seen = place.position + 1 - pick * dims.select_block_tokens;
    if (pick < 0 || num_seen <= 0) break;
    const uint32_t* const record =
        reinterpret_cast<const uint32_t*>(
            RecordAt(params, LocationOf(params, piece.kv_head, first_block + pick))) +
        lane;
    const uint4* const fragments =
        piece.ds +
        ((blockIdx.x * int64_t{n} + i) * PickFragments(dims) + blockIdx.y * key_tiles) * 32 + lane;
    for (int32_t tile = 0; tile < key_tiles && tile * kFragmentRows < num_seen; ++tile) {
      const uint4 a = TransposeFragment(fragments[tile * 32]);
      const uint32_t* const matrices = record + tile * 2 * groups * 4 * 32;
#pragma unroll
      for (int m = 0; m < kMaxHeadDim / 8; ++m) {
        if (m >= groups * 4) break;
        MultiplyAdd<T>(sums[m], a.x, a.y, a.z, a.w, TransposeMatrix(matrices[m * 32]),
                       TransposeMatrix(matrices[(groups * 4 + m) * 32]));
      }
    }
  }

  StoreQueryGradients(params, piece.kv_head, query, blockIdx.y, sums);
}

}  // namespace

cudaError_t LaunchSelectedKeysAny(const AttendSelectedBackwardParams& params,
                                  const SelectedPiece& piece, const Device& device,
                                  cudaStream_t stream) {
  const AttentionDims& dims = params.dims;
  const int32_t widest = dims.head_dim_qk > dims.head_dim_v ? dims.head_dim_qk : dims.head_dim_v;
  const dim3 grid(8 * device.num_sms, dims.select_block_tokens / kFragmentRows,
                  (widest + kSliceDims - 1) / kSliceDims);
  const auto kernel = dims.dtype == DType::kBF16 ? SelectedKeysAnyKernel<__nv_bfloat16>
                                                 : SelectedKeysAnyKernel<__half>;
  kernel<<<grid, 32, 0, stream>>>(params, piece);
  return cudaGetLastError();
}

cudaError_t LaunchSelectedQueriesAny(const AttendSelectedBackwardParams& params,
                                     const SelectedPiece& piece, const Device&,
                                     cudaStream_t stream) {
  const dim3 grid(piece.num_queries, HeadTiles(params.dims));
  const auto kernel = params.dims.dtype == DType::kBF16 ? SelectedQueriesAnyKernel<__nv_bfloat16>
                                                        : SelectedQueriesAnyKernel<__half>;
  kernel<<<grid, 32, 0, stream>>>(params, piece);
  return cudaGetLastError();
}

cudaError_t LaunchAttendSelectedBackwardAny(const AttendSelectedBackwardParams& params,
                                            const Device& device, cudaStream_t stream) {
  return LaunchSelectedBackward(params, device, LaunchSelectedKeysAny, LaunchSelectedQueriesAny,
                                stream);
}

}  // namespace nsa::kernels::cuda
