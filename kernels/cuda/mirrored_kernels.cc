#include "kernels/cuda/mirrored_kernels.h"

#include <cstring>
#include <vector>

#include "kernels/cuda/mirror.h"

namespace nsa::kernels::cuda {
namespace {

class HostMemory : public Memory {
 public:
  explicit HostMemory(int64_t num_bytes) : words_((num_bytes + 256) / 8 + 32) {}
  void* data() override {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(words_.data()) + 255) / 256 * 256);
  }

 private:
  std::vector<uint64_t> words_;
};

}  // namespace

absl::Status MirroredKernels::Supports(const AttentionDims& dims) const {
  return device_->Supports(dims);
}

int64_t MirroredKernels::RecordBytes(const AttentionDims& dims) const {
  return device_->RecordBytes(dims);
}

absl::StatusOr<std::unique_ptr<Memory>> MirroredKernels::Allocate(int64_t num_bytes) {
  return std::make_unique<HostMemory>(num_bytes);
}

absl::Status MirroredKernels::CopyFromHost(void* dst, const void* host_src, int64_t num_bytes,
                                           void* /*stream*/) {
  if (num_bytes > 0) std::memcpy(dst, host_src, num_bytes);
  return absl::OkStatus();
}

absl::Status MirroredKernels::CopyToHost(void* host_dst, const void* src, int64_t num_bytes,
                                         void* /*stream*/) {
  if (num_bytes > 0) std::memcpy(host_dst, src, num_bytes);
  return absl::OkStatus();
}

absl::Status MirroredKernels::CopyRows(const CopyRowsParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const int64_t element_bytes = SizeOf(params.dtype);
  int64_t src_rows = 0, dst_rows = 0;
  for (int32_t i = 0; i < params.num_segments; ++i) {
    src_rows = std::max(src_rows, params.segments[i].row + params.segments[i].num_tokens);
    dst_rows += params.segments[i].num_tokens;
  }
  CopyRowsParams p = params;
  p.src = mirror.In(params.src, src_rows, params.num_heads, params.head_dim, element_bytes);
  p.segments = mirror.In(params.segments, params.num_segments);
  p.dst =
      mirror.OutBytes(params.dst, dst_rows * params.num_heads * params.head_dim * element_bytes);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->CopyRows(p, nullptr));
}

absl::Status MirroredKernels::Compress(const CompressParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  CompressParams p = params;
  p.weights = mirror.In(params.weights, dims.compress_block_tokens, params.head_dim);
  p.tokens = mirror.In(params.tokens, dims.num_kv_heads, params.head_dim, SizeOf(dims.dtype));
  p.documents = mirror.In(params.documents, NumDocuments(params.runs, params.num_runs));
  p.runs = mirror.In(params.runs, params.num_runs);
  p.summaries =
      mirror.Out(params.summaries, NumSummaries(params.documents, params.runs, params.num_runs),
                 dims.num_kv_heads, params.head_dim, SizeOf(dims.dtype));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->Compress(p, nullptr));
}

absl::Status MirroredKernels::PackBlocks(const PackBlocksParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  PackBlocksParams p = params;
  p.k = mirror.In(params.k, dims.num_kv_heads, dims.head_dim_qk, SizeOf(dims.dtype));
  p.v = mirror.In(params.v, dims.num_kv_heads, dims.head_dim_v, SizeOf(dims.dtype));
  p.documents = mirror.In(params.documents, NumDocuments(params.runs, params.num_runs));
  p.runs = mirror.In(params.runs, params.num_runs);
  p.records =
      mirror.OutBytes(params.records, params.num_blocks * dims.num_kv_heads * RecordBytes(dims));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->PackBlocks(p, nullptr));
}

int64_t MirroredKernels::ScoreScratchBytes(const AttentionDims& dims,
                                           const ScoreLimits& limits) const {
  return device_->ScoreScratchBytes(dims, limits);
}

absl::Status MirroredKernels::ScoreAndSelect(const ScoreAndSelectParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t element_bytes = SizeOf(dims.dtype);
  const int64_t num_tokens = params.queries.num_tokens;
  ScoreAndSelectParams p = params;
  p.queries = mirror.In(params.queries, dims.num_q_heads, dims.head_dim_qk, element_bytes);
  p.kc = mirror.In(params.kc, params.num_cmp_blocks, dims.num_kv_heads, dims.head_dim_qk,
                   element_bytes);
  p.vc = mirror.In(params.vc, params.num_cmp_blocks, dims.num_kv_heads, dims.head_dim_v,
                   element_bytes);
  p.queries.documents = mirror.In(params.queries.documents, params.num_documents);
  p.o_cmp = mirror.Out(params.o_cmp, num_tokens, dims.num_q_heads, dims.head_dim_v, element_bytes);
  p.lse_cmp = mirror.Out(params.lse_cmp, num_tokens * dims.num_q_heads);
  p.block_indices =
      mirror.Out(params.block_indices, num_tokens * dims.num_kv_heads * dims.num_selected_blocks);
  p.scratch = mirror.OutBytes(
      params.scratch, ScoreScratchBytes(dims, {num_tokens, params.queries.num_segments,
                                               params.num_cmp_blocks, params.num_documents}));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->ScoreAndSelect(p, nullptr));
}

absl::Status MirroredKernels::PlanFetch(const PlanFetchParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const BlockOwners& owners = params.owners;
  PlanFetchParams p = params;
  p.queries = mirror.In(params.queries, 0, 0, 0);
  p.block_indices = mirror.In(params.block_indices, params.queries.num_tokens * dims.num_kv_heads *
                                                        dims.num_selected_blocks);
  p.owners.rank = mirror.In(owners.rank, owners.num_blocks);
  p.owners.ordinal = mirror.In(owners.ordinal, owners.num_blocks);
  p.owners.blocks_of_rank = mirror.In(owners.blocks_of_rank, owners.num_ranks);
  p.locations = mirror.Out(params.locations, dims.num_kv_heads * owners.num_blocks);
  p.peers = mirror.Out(params.peers, params.capacity);
  p.offsets = mirror.Out(params.offsets, params.capacity);
  p.num_slots = mirror.Out(params.num_slots, 1);
  p.query_end = mirror.Out(params.query_end, 1);
  p.num_remote_picks = mirror.Out(params.num_remote_picks, 1);
  p.slots_of_rank = mirror.Out(params.slots_of_rank, owners.num_ranks);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->PlanFetch(p, nullptr));
}

absl::Status MirroredKernels::AttendSelected(const AttendSelectedParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t element_bytes = SizeOf(dims.dtype), record_bytes = RecordBytes(dims);
  const int64_t num_tokens = params.queries.num_tokens;
  const int64_t hq = dims.num_q_heads, dv = dims.head_dim_v;
  const int64_t num_locations = dims.num_kv_heads * params.num_blocks;
  const int64_t num_slots = NumSlots(params);
  AttendSelectedParams p = params;
  p.queries = mirror.In(params.queries, hq, dims.head_dim_qk, element_bytes);
  p.block_indices =
      mirror.In(params.block_indices, num_tokens * dims.num_kv_heads * dims.num_selected_blocks);
  p.locations = mirror.In(params.locations, num_locations);
  p.own_records = mirror.InBytes(params.own_records, params.num_own_records * record_bytes);
  p.slots = mirror.InBytes(params.slots, num_slots * record_bytes);
  p.o_slc = mirror.Out(params.o_slc, num_tokens, hq, dv, element_bytes);
  p.lse_slc = mirror.Out(params.lse_slc, num_tokens * hq);
  const GateParams& gate = params.gate;
  p.gate.gate = mirror
                    .In(ConstTensor3{gate.gate, gate.row_stride, gate.head_stride}, num_tokens, hq,
                        3, SizeOf(gate.gate_dtype))
                    .data;
  p.gate.o_cmp = mirror.In(gate.o_cmp, num_tokens, hq, dv, element_bytes);
  p.gate.o_win = mirror.In(gate.o_win, num_tokens, hq, dv, element_bytes);
  p.gate.o = mirror.Out(gate.o, num_tokens, hq, dv, element_bytes);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->AttendSelected(p, nullptr));
}

absl::Status MirroredKernels::AttendWindow(const AttendWindowParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t element_bytes = SizeOf(dims.dtype);
  const int64_t num_tokens = params.queries.num_tokens;
  AttendWindowParams p = params;
  p.queries = mirror.In(params.queries, dims.num_q_heads, dims.head_dim_qk, element_bytes);
  p.k = mirror.In(params.k, dims.num_kv_heads, dims.head_dim_qk, element_bytes);
  p.v = mirror.In(params.v, dims.num_kv_heads, dims.head_dim_v, element_bytes);
  p.o_win = mirror.Out(params.o_win, num_tokens, dims.num_q_heads, dims.head_dim_v, element_bytes);
  p.lse_win = mirror.Out(params.lse_win, num_tokens * dims.num_q_heads);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->AttendWindow(p, nullptr));
}

absl::Status MirroredKernels::Zero(void* dst, int64_t num_bytes, void* /*stream*/) {
  Mirror mirror(*device_);
  void* const p = mirror.OutBytes(dst, num_bytes);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->Zero(p, num_bytes, nullptr));
}

}  // namespace nsa::kernels::cuda
