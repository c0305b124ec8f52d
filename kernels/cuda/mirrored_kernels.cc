#include "kernels/cuda/mirrored_kernels.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <vector>

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

// The memory of one call. Every method passes null on; the first error is kept for Finish.
class Mirror {
 public:
  explicit Mirror(Kernels& device) : device_(device) {}

  // What the call reads.
  template <class T>
  const T* In(const T* host, int64_t count) {
    return static_cast<const T*>(Place(host, count * int64_t{sizeof(T)}, false));
  }
  const void* InBytes(const void* host, int64_t num_bytes) { return Place(host, num_bytes, false); }
  // What it writes, or writes a part of.
  template <class T>
  T* Out(T* host, int64_t count) {
    return static_cast<T*>(Place(host, count * int64_t{sizeof(T)}, true));
  }
  void* OutBytes(void* host, int64_t num_bytes) { return Place(host, num_bytes, true); }

  ConstTensor3 In(const ConstTensor3& tensor, int64_t rows, int64_t heads, int64_t dim,
                  int64_t element_bytes) {
    const int64_t elements = Extent(tensor.row_stride, tensor.head_stride, rows, heads, dim);
    return {InBytes(tensor.data, elements * element_bytes), tensor.row_stride, tensor.head_stride};
  }
  Tensor3 Out(const Tensor3& tensor, int64_t rows, int64_t heads, int64_t dim,
              int64_t element_bytes) {
    const int64_t elements = Extent(tensor.row_stride, tensor.head_stride, rows, heads, dim);
    return {OutBytes(tensor.data, elements * element_bytes), tensor.row_stride, tensor.head_stride};
  }

  TokenRows In(const TokenRows& tokens, int64_t heads, int64_t dim, int64_t element_bytes) {
    return {
        In(tokens.own, NumRows(tokens.segments, tokens.num_segments, 0), heads, dim, element_bytes),
        In(tokens.halo, NumRows(tokens.segments, tokens.num_segments, 1), heads, dim,
           element_bytes),
        In(tokens.segments, tokens.num_segments), tokens.num_segments};
  }

  Queries In(const Queries& queries, int64_t heads, int64_t dim, int64_t element_bytes) {
    int32_t num_documents = 0;
    for (int32_t i = 0; i < queries.num_segments; ++i) {
      num_documents = std::max(num_documents, queries.segments[i].document + 1);
    }
    Queries result = queries;
    result.q = In(queries.q, queries.num_tokens, heads, dim, element_bytes);
    result.segments = In(queries.segments, queries.num_segments);
    result.documents = In(queries.documents, num_documents);
    return result;
  }

  // Copies back what was written, once `status` says that the call was enqueued.
  absl::Status Finish(absl::Status status) {
    Keep(std::move(status));
    Keep(device_.Synchronize(nullptr));
    for (auto& [host, piece] : pieces_) {
      if (!status_.ok() || !piece.is_written) continue;
      Keep(device_.CopyToHost(const_cast<void*>(host), piece.memory->data(), piece.num_bytes,
                              nullptr));
    }
    Keep(device_.Synchronize(nullptr));
    return status_;
  }
  const absl::Status& status() const { return status_; }

  static int64_t NumRows(const Segment* segments, int32_t num_segments, int32_t is_halo) {
    int64_t rows = 0;
    for (int32_t i = 0; i < num_segments; ++i) {
      if (segments[i].is_halo == is_halo) {
        rows = std::max(rows, segments[i].row + segments[i].num_tokens);
      }
    }
    return rows;
  }

 private:
  struct Piece {
    std::unique_ptr<Memory> memory;
    int64_t num_bytes = 0;
    bool is_written = false;
  };

  static int64_t Extent(int64_t row_stride, int64_t head_stride, int64_t rows, int64_t heads,
                        int64_t dim) {
    return rows == 0 ? 0 : (rows - 1) * row_stride + (heads - 1) * head_stride + dim;
  }

  void Keep(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }

  // The same host memory has the same place: o may be o_cmp's memory. Of several lengths the
  // longest counts, as what is empty may have the address of what comes after it; no call has begun
  // yet.
  void* Place(const void* host, int64_t num_bytes, bool is_written) {
    if (host == nullptr) return nullptr;
    Piece& piece = pieces_[host];
    piece.is_written |= is_written;
    if (piece.memory == nullptr || piece.num_bytes < num_bytes) {
      auto memory = device_.Allocate(num_bytes);
      if (!memory.ok()) {
        Keep(memory.status());
        return nullptr;
      }
      piece.memory = *std::move(memory);
      piece.num_bytes = num_bytes;
      Keep(device_.CopyFromHost(piece.memory->data(), host, num_bytes, nullptr));
    }
    return piece.memory->data();
  }

  Kernels& device_;
  std::map<const void*, Piece> pieces_;
  absl::Status status_;
};

int64_t NumDocuments(const BlockRun* runs, int32_t num_runs) {
  int64_t count = 0;
  for (int32_t r = 0; r < num_runs; ++r) count = std::max<int64_t>(count, runs[r].document + 1);
  return count;
}

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
  int64_t summary_rows = 0;
  for (int32_t r = 0; r < params.num_runs; ++r) {
    const BlockRun& run = params.runs[r];
    if (run.num_blocks == 0) continue;
    summary_rows = std::max(summary_rows, params.documents[run.document].cmp_block_begin +
                                              run.first_block + run.num_blocks);
  }
  CompressParams p = params;
  const CompressorWeights& w = params.weights;
  const int64_t weight_bytes = w.num_heads * SizeOf(w.dtype);
  const int64_t row = int64_t{dims.compress_block_tokens} * params.head_dim;
  p.weights.weight = mirror.InBytes(w.weight, weight_bytes * dims.compress_block_tokens);
  p.weights.pe = mirror.InBytes(w.pe, weight_bytes * row);
  p.weights.w = mirror.InBytes(w.w, weight_bytes * params.head_dim * row);
  p.weights.w1 = mirror.InBytes(w.w1, weight_bytes * w.hidden_width * row);
  p.weights.b1 = mirror.InBytes(w.b1, weight_bytes * w.hidden_width);
  p.weights.w2 = mirror.InBytes(w.w2, weight_bytes * w.hidden_width * params.head_dim);
  p.weights.b2 = mirror.InBytes(w.b2, weight_bytes * params.head_dim);
  p.tokens = mirror.In(params.tokens, dims.num_kv_heads, params.head_dim, SizeOf(dims.dtype));
  p.documents = mirror.In(params.documents, NumDocuments(params.runs, params.num_runs));
  p.runs = mirror.In(params.runs, params.num_runs);
  p.summaries = mirror.Out(params.summaries, summary_rows, dims.num_kv_heads, params.head_dim,
                           SizeOf(dims.dtype));
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
  int64_t num_records = params.num_own_records;
  for (int64_t i = 0; i < num_locations; ++i) {
    num_records = std::max<int64_t>(num_records, params.locations[i] + 1);
  }
  AttendSelectedParams p = params;
  p.queries = mirror.In(params.queries, hq, dims.head_dim_qk, element_bytes);
  p.block_indices =
      mirror.In(params.block_indices, num_tokens * dims.num_kv_heads * dims.num_selected_blocks);
  p.locations = mirror.In(params.locations, num_locations);
  p.own_records = mirror.InBytes(params.own_records, params.num_own_records * record_bytes);
  p.slots = mirror.InBytes(params.slots, (num_records - params.num_own_records) * record_bytes);
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

}  // namespace nsa::kernels::cuda
