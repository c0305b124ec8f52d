// The stages of the backward.
#include <algorithm>

#include "kernels/cuda/mirror.h"
#include "kernels/cuda/mirrored_kernels.h"

namespace nsa::kernels::cuda {
namespace {

int64_t NumTokens(const Segment* segments, int32_t num_segments) {
  int64_t count = 0;
  for (int32_t i = 0; i < num_segments; ++i) count += segments[i].num_tokens;
  return count;
}

}  // namespace

int64_t MirroredKernels::WindowBackwardScratchBytes(const AttentionDims& dims,
                                                    const BackwardLimits& limits) const {
  return device_->WindowBackwardScratchBytes(dims, limits);
}

int64_t MirroredKernels::SummariesBackwardScratchBytes(const AttentionDims& dims,
                                                       const BackwardLimits& limits) const {
  return device_->SummariesBackwardScratchBytes(dims, limits);
}

absl::Status MirroredKernels::AttendWindowBackward(const AttendWindowBackwardParams& params,
                                                   void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t element_bytes = SizeOf(dims.dtype), num_tokens = params.queries.num_tokens;
  AttendWindowBackwardParams p = params;
  p.queries = mirror.In(params.queries, dims.num_q_heads, dims.head_dim_qk, element_bytes);
  p.k = mirror.In(params.k, dims.num_kv_heads, dims.head_dim_qk, element_bytes);
  p.v = mirror.In(params.v, dims.num_kv_heads, dims.head_dim_v, element_bytes);
  p.outputs = mirror.In(params.outputs, dims, num_tokens);
  p.queries_gradients = mirror.Out(params.queries_gradients, dims, params.queries);
  p.dk = mirror.Out(params.dk, params.k.segments, params.k.num_segments,
                    dims.num_kv_heads * dims.head_dim_qk);
  p.dv = mirror.Out(params.dv, params.v.segments, params.v.num_segments,
                    dims.num_kv_heads * dims.head_dim_v);
  p.scratch = mirror.OutBytes(
      params.scratch,
      WindowBackwardScratchBytes(dims, {.num_tokens = num_tokens,
                                        .num_segments = params.queries.num_segments,
                                        .num_kv_heads = params.queries.kv_heads.size(),
                                        .num_cmp_blocks = 0,
                                        .num_slc_blocks = 0,
                                        .num_records = 0,
                                        .num_documents = 0}));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->AttendWindowBackward(p, nullptr));
}

absl::Status MirroredKernels::AttendSummariesBackward(const AttendSummariesBackwardParams& params,
                                                      void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t element_bytes = SizeOf(dims.dtype), num_tokens = params.queries.num_tokens;
  AttendSummariesBackwardParams p = params;
  p.queries = mirror.In(params.queries, dims.num_q_heads, dims.head_dim_qk, element_bytes);
  p.queries.documents = mirror.In(params.queries.documents, params.num_documents);
  p.kc = mirror.In(params.kc, params.num_cmp_blocks, dims.num_kv_heads, dims.head_dim_qk,
                   element_bytes);
  p.vc = mirror.In(params.vc, params.num_cmp_blocks, dims.num_kv_heads, dims.head_dim_v,
                   element_bytes);
  p.outputs = mirror.In(params.outputs, dims, num_tokens);
  p.queries_gradients = mirror.Out(params.queries_gradients, dims, params.queries);
  p.d_summaries = mirror.Out(params.d_summaries, params.num_cmp_blocks * dims.num_kv_heads *
                                                     int64_t{dims.head_dim_qk + dims.head_dim_v});
  p.scratch = mirror.OutBytes(
      params.scratch,
      SummariesBackwardScratchBytes(dims, {.num_tokens = num_tokens,
                                           .num_segments = params.queries.num_segments,
                                           .num_kv_heads = params.queries.kv_heads.size(),
                                           .num_cmp_blocks = params.num_cmp_blocks,
                                           .num_slc_blocks = 0,
                                           .num_records = 0,
                                           .num_documents = params.num_documents}));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->AttendSummariesBackward(p, nullptr));
}

int64_t MirroredKernels::SelectedBackwardScratchBytes(const AttentionDims& dims,
                                                      const BackwardLimits& limits) const {
  return device_->SelectedBackwardScratchBytes(dims, limits);
}

int64_t MirroredKernels::CompressBackwardScratchBytes(const AttentionDims& dims,
                                                      Compressor compressor, int32_t hidden_width,
                                                      int64_t num_blocks) const {
  return device_->CompressBackwardScratchBytes(dims, compressor, hidden_width, num_blocks);
}

absl::Status MirroredKernels::GateBackward(const GateBackwardParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t num_tokens = params.num_tokens, hq = dims.num_q_heads, dv = dims.head_dim_v;
  const int64_t element_bytes = SizeOf(dims.dtype);
  GateBackwardParams p = params;
  p.gate = mirror
               .In(ConstTensor3{params.gate, params.row_stride, params.head_stride}, num_tokens, hq,
                   3, SizeOf(params.gate_dtype))
               .data;
  p.d_o = mirror.In(params.d_o, num_tokens, hq, dv, element_bytes);
  p.o_cmp = mirror.In(params.o_cmp, num_tokens, hq, dv, element_bytes);
  p.o_slc = mirror.In(params.o_slc, num_tokens, hq, dv, element_bytes);
  p.o_win = mirror.In(params.o_win, num_tokens, hq, dv, element_bytes);
  p.d_gate = mirror.Out(params.d_gate, num_tokens * hq * 3);
  p.gates = mirror.Out(params.gates, num_tokens * hq * 3);
  p.deltas = mirror.Out(params.deltas, num_tokens * hq * 3);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->GateBackward(p, nullptr));
}

absl::Status MirroredKernels::AttendSelectedBackward(const AttendSelectedBackwardParams& params,
                                                     void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t record_bytes = RecordBytes(dims), num_tokens = params.queries.num_tokens;
  const int64_t record_values =
      int64_t{dims.select_block_tokens} * (dims.head_dim_qk + dims.head_dim_v);
  const int64_t num_locations = dims.num_kv_heads * params.num_blocks;
  const int64_t num_slots = NumSlots(params);
  AttendSelectedBackwardParams p = params;
  p.queries = mirror.In(params.queries, dims.num_q_heads, dims.head_dim_qk, SizeOf(dims.dtype));
  p.queries.documents = mirror.In(params.queries.documents, params.num_documents);
  p.block_indices =
      mirror.In(params.block_indices, num_tokens * dims.num_kv_heads * dims.num_selected_blocks);
  p.locations = mirror.In(params.locations, num_locations);
  p.own_records = mirror.InBytes(params.own_records, params.num_own_records * record_bytes);
  p.slots = mirror.InBytes(params.slots, num_slots * record_bytes);
  p.outputs = mirror.In(params.outputs, dims, num_tokens);
  p.queries_gradients = mirror.Out(params.queries_gradients, dims, params.queries);
  p.own_gradients = mirror.Out(params.own_gradients, params.num_own_records * record_values);
  p.slot_gradients = mirror.Out(params.slot_gradients, num_slots * record_values);
  p.scratch = mirror.OutBytes(
      params.scratch,
      SelectedBackwardScratchBytes(dims, {.num_tokens = num_tokens,
                                          .num_segments = params.queries.num_segments,
                                          .num_kv_heads = params.queries.kv_heads.size(),
                                          .num_cmp_blocks = 0,
                                          .num_slc_blocks = params.num_blocks,
                                          .num_records = params.num_own_records + num_slots,
                                          .num_documents = params.num_documents}));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->AttendSelectedBackward(p, nullptr));
}

absl::Status MirroredKernels::CompressBackward(const CompressBackwardParams& params,
                                               void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t row_elements = int64_t{dims.num_kv_heads} * params.head_dim;
  const CompressorWeights& weights = params.weights;
  const int64_t block_elements = int64_t{dims.compress_block_tokens} * params.head_dim;
  const int64_t heads = weights.num_heads, width = weights.hidden_width;
  const int64_t summary_rows = NumSummaries(params.documents, params.runs, params.num_runs);
  CompressBackwardParams p = params;
  p.weights = mirror.In(weights, dims.compress_block_tokens, params.head_dim);
  p.tokens = mirror.In(params.tokens, dims.num_kv_heads, params.head_dim, SizeOf(dims.dtype));
  p.documents = mirror.In(params.documents, NumDocuments(params.runs, params.num_runs));
  p.runs = mirror.In(params.runs, params.num_runs);
  p.d_summaries = mirror.In(
      params.d_summaries,
      summary_rows == 0 ? 0 : (summary_rows - 1) * params.d_summaries_stride + row_elements);
  p.d_tokens =
      mirror.Out(params.d_tokens, params.tokens.segments, params.tokens.num_segments, row_elements);
  const CompressorWeightGradients& to = params.d_weights;
  p.d_weights.weight = mirror.Out(to.weight, heads * dims.compress_block_tokens);
  p.d_weights.pe = mirror.Out(to.pe, heads * block_elements);
  p.d_weights.w = mirror.Out(to.w, heads * params.head_dim * block_elements);
  p.d_weights.w1 = mirror.Out(to.w1, heads * width * block_elements);
  p.d_weights.b1 = mirror.Out(to.b1, heads * width);
  p.d_weights.w2 = mirror.Out(to.w2, heads * params.head_dim * width);
  p.d_weights.b2 = mirror.Out(to.b2, heads * params.head_dim);
  p.scratch = mirror.OutBytes(
      params.scratch, CompressBackwardScratchBytes(dims, params.compressor, weights.hidden_width,
                                                   params.num_blocks));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->CompressBackward(p, nullptr));
}

absl::Status MirroredKernels::UnpackGradients(const UnpackGradientsParams& params,
                                              void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  UnpackGradientsParams p = params;
  p.record_gradients = mirror.In(params.record_gradients, dims.num_kv_heads * params.num_blocks *
                                                              dims.select_block_tokens *
                                                              (dims.head_dim_qk + dims.head_dim_v));
  p.segments = mirror.In(params.segments, params.num_segments);
  p.documents = mirror.In(params.documents, NumDocuments(params.runs, params.num_runs));
  p.runs = mirror.In(params.runs, params.num_runs);
  p.dk = mirror.Out(params.dk, params.segments, params.num_segments,
                    dims.num_kv_heads * dims.head_dim_qk);
  p.dv = mirror.Out(params.dv, params.segments, params.num_segments,
                    dims.num_kv_heads * dims.head_dim_v);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->UnpackGradients(p, nullptr));
}

absl::Status MirroredKernels::PlanReturn(const PlanReturnParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const BlockOwners& owners = params.owners;
  PlanReturnParams p = params;
  p.peer_locations = mirror.In(params.peer_locations, params.dims.num_kv_heads * owners.num_blocks);
  p.owners.rank = mirror.In(owners.rank, owners.num_blocks);
  p.owners.ordinal = mirror.In(owners.ordinal, owners.num_blocks);
  p.owners.blocks_of_rank = mirror.In(owners.blocks_of_rank, owners.num_ranks);
  p.peers = mirror.Out(params.peers, params.capacity);
  p.offsets = mirror.Out(params.offsets, params.capacity);
  p.own_records = mirror.Out(params.own_records, params.capacity);
  p.count = mirror.Out(params.count, 1);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->PlanReturn(p, nullptr));
}

absl::Status MirroredKernels::AddIndexedRows(const AddIndexedRowsParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const int64_t count = *params.count;
  int64_t num_rows = 0;
  for (int64_t i = 0; i < count; ++i) num_rows = std::max<int64_t>(num_rows, params.rows[i] + 1);
  AddIndexedRowsParams p = params;
  p.dst = mirror.Out(params.dst, num_rows * params.row_elements);
  p.src = mirror.In(params.src, count * params.row_elements);
  p.rows = mirror.In(params.rows, count);
  p.count = mirror.In(params.count, 1);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->AddIndexedRows(p, nullptr));
}

absl::Status MirroredKernels::AddRows(const AddRowsParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  int64_t num_rows = 0;
  for (int32_t i = 0; i < params.num_segments; ++i) {
    num_rows = std::max(num_rows, params.segments[i].row + params.segments[i].num_tokens);
  }
  AddRowsParams p = params;
  p.dst = mirror.Out(params.dst, num_rows * params.row_elements);
  p.src =
      mirror.In(params.src, NumTokens(params.segments, params.num_segments) * params.row_elements);
  p.segments = mirror.In(params.segments, params.num_segments);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->AddRows(p, nullptr));
}

absl::Status MirroredKernels::StoreGradient(const StoreGradientParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  StoreGradientParams p = params;
  p.src = mirror.In(params.src, params.num_rows * params.num_heads * params.head_dim);
  p.dst = mirror.Out(params.dst, params.num_rows, params.num_heads, params.head_dim,
                     SizeOf(params.dst_dtype));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->StoreGradient(p, nullptr));
}

}  // namespace nsa::kernels::cuda
