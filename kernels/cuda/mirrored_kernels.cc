#include "kernels/cuda/mirrored_kernels.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>
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

  TokenGradients Out(const TokenGradients& gradients, const Segment* segments, int32_t num_segments,
                     int64_t row_elements) {
    return {Out(gradients.own, NumRows(segments, num_segments, 0) * row_elements),
            Out(gradients.halo, NumRows(segments, num_segments, 1) * row_elements), gradients.adds};
  }

  OutputGradients In(const OutputGradients& outputs, const AttentionDims& dims,
                     int64_t num_tokens) {
    const int64_t num_rows = num_tokens * dims.num_q_heads;
    return {In(outputs.d_o, num_tokens, dims.num_q_heads, dims.head_dim_v, SizeOf(dims.dtype)),
            In(outputs.lse, num_rows), In(outputs.gate, num_rows), In(outputs.delta, num_rows)};
  }

  QueryGradients Out(const QueryGradients& gradients, const AttentionDims& dims,
                     const Queries& queries) {
    return {Out(gradients.dq, queries.num_tokens * queries.kv_heads.size() * dims.group_size() *
                                  dims.head_dim_qk),
            gradients.adds};
  }

  CompressorWeights In(const CompressorWeights& weights, int64_t block_tokens, int64_t head_dim) {
    CompressorWeights result = weights;
    const int64_t heads_bytes = weights.num_heads * SizeOf(weights.dtype);
    const int64_t row = block_tokens * head_dim, width = weights.hidden_width;
    result.weight = InBytes(weights.weight, heads_bytes * block_tokens);
    result.pe = InBytes(weights.pe, heads_bytes * row);
    result.w = InBytes(weights.w, heads_bytes * head_dim * row);
    result.w1 = InBytes(weights.w1, heads_bytes * width * row);
    result.b1 = InBytes(weights.b1, heads_bytes * width);
    result.w2 = InBytes(weights.w2, heads_bytes * width * head_dim);
    result.b2 = InBytes(weights.b2, heads_bytes * head_dim);
    return result;
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

// The page tables of a step, whose entries are addresses of what the mirror has of the pages.
// Entries that the step does not need are null.
class MirroredTables {
 public:
  MirroredTables(const AttentionDims& dims, const PageTables& tables, const DecodeRow* rows,
                 int64_t num_rows, int64_t record_bytes, Mirror& mirror)
      : dims_(dims),
        tables_(tables),
        page_bytes_(dims.num_kv_heads * record_bytes),
        summary_page_bytes_(int64_t{kSummaryPageBlocks} * dims.num_kv_heads *
                            (dims.head_dim_qk + dims.head_dim_v) * SizeOf(dims.dtype)),
        mirror_(mirror) {
    for (int64_t i = 0; i < num_rows; ++i) {
      num_sequences_ = std::max<int64_t>(num_sequences_, rows[i].sequence + 1);
    }
  }

  // The step reads tokens [begin, end) in pages of `table`, or writes to them.
  void PlaceTokens(void* const* table, int32_t sequence, int64_t begin, int64_t end,
                   bool is_written) {
    for (int64_t page = begin / dims_.select_block_tokens; page * dims_.select_block_tokens < end;
         ++page) {
      Place(table, tables_.max_pages, sequence, page, page_bytes_, is_written);
    }
  }
  // Summaries [begin, end).
  void PlaceSummaries(int32_t sequence, int64_t begin, int64_t end, bool is_written) {
    for (int64_t page = begin / kSummaryPageBlocks; page * kSummaryPageBlocks < end; ++page) {
      Place(tables_.summaries, tables_.max_summary_pages, sequence, page, summary_page_bytes_,
            is_written);
    }
  }

  // Those of the window of the query at `position`.
  void PlaceWindow(int32_t sequence, int64_t position) {
    PlaceTokens(tables_.win, sequence, std::max<int64_t>(0, position - dims_.window_tokens + 1),
                position + 1, false);
  }

  // Once all are placed. Tables that are one stay one.
  PageTables Finish() {
    const auto place = [&](void* const* table) -> void* const* {
      const auto it = copies_.find(table);
      if (it == copies_.end()) return nullptr;
      return mirror_.In(it->second.data(), static_cast<int64_t>(it->second.size()));
    };
    PageTables result = tables_;
    result.slc = place(tables_.slc);
    result.win = place(tables_.win);
    result.cmp = place(tables_.cmp);
    result.summaries = place(tables_.summaries);
    return result;
  }

 private:
  void Place(void* const* table, int64_t max_pages, int32_t sequence, int64_t page,
             int64_t num_bytes, bool is_written) {
    std::vector<void*>& copy = copies_[table];
    copy.resize(num_sequences_ * max_pages);
    const int64_t i = sequence * max_pages + page;
    copy[i] = is_written ? mirror_.OutBytes(table[i], num_bytes)
                         : const_cast<void*>(mirror_.InBytes(table[i], num_bytes));
  }

  const AttentionDims& dims_;
  const PageTables& tables_;
  const int64_t page_bytes_, summary_page_bytes_;
  Mirror& mirror_;
  int64_t num_sequences_ = 0;
  std::map<void* const*, std::vector<void*>> copies_;
};

// Compression blocks that end at or before the token at `position`.
int64_t NumBlocksUpTo(const AttentionDims& dims, int64_t position) {
  const int64_t past_first = position + 1 - dims.compress_block_tokens;
  return past_first < 0 ? 0 : past_first / dims.compress_stride_tokens + 1;
}

int64_t NumDocuments(const BlockRun* runs, int32_t num_runs) {
  int64_t count = 0;
  for (int32_t r = 0; r < num_runs; ++r) count = std::max<int64_t>(count, runs[r].document + 1);
  return count;
}

// Rows up to the last summary of the runs.
int64_t NumSummaries(const Document* documents, const BlockRun* runs, int32_t num_runs) {
  int64_t rows = 0;
  for (int32_t r = 0; r < num_runs; ++r) {
    if (runs[r].num_blocks == 0) continue;
    rows = std::max(rows, documents[runs[r].document].cmp_block_begin + runs[r].first_block +
                              runs[r].num_blocks);
  }
  return rows;
}

// Slots that `locations` names for the queries' kv heads; for the others it may say anything.
template <class Params>
int64_t NumSlots(const Params& params) {
  const HeadRange heads = params.queries.kv_heads;
  int64_t num_records = params.num_own_records;
  for (int64_t i = heads.begin * params.num_blocks; i < heads.end * params.num_blocks; ++i) {
    num_records = std::max<int64_t>(num_records, params.locations[i] + 1);
  }
  return num_records - params.num_own_records;
}

int64_t NumTokens(const Segment* segments, int32_t num_segments) {
  int64_t count = 0;
  for (int32_t i = 0; i < num_segments; ++i) count += segments[i].num_tokens;
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

absl::Status MirroredKernels::Zero(void* dst, int64_t num_bytes, void* /*stream*/) {
  Mirror mirror(*device_);
  void* const p = mirror.OutBytes(dst, num_bytes);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->Zero(p, num_bytes, nullptr));
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

int64_t MirroredKernels::DecodeScratchBytes(const AttentionDims& dims,
                                            const DecodeLimits& limits) const {
  return device_->DecodeScratchBytes(dims, limits);
}

absl::Status MirroredKernels::AppendTokens(const AppendTokensParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  MirroredTables tables(dims, params.tables, params.rows, params.num_rows, RecordBytes(dims),
                        mirror);
  for (int64_t i = 0; i < params.num_rows; ++i) {
    const auto [sequence, position] = params.rows[i];
    if (sequence < 0) continue;
    const std::pair<const NewTokens&, void* const*> branches[] = {{params.slc, params.tables.slc},
                                                                  {params.win, params.tables.win},
                                                                  {params.cmp, params.tables.cmp}};
    for (const auto& [tokens, table] : branches) {
      if (tokens.k.data == nullptr) continue;
      tables.PlaceTokens(table, sequence, position, position + 1, true);
    }
    const int64_t num_blocks = NumBlocksUpTo(dims, position);
    if (!params.compresses || num_blocks == NumBlocksUpTo(dims, position - 1)) continue;
    tables.PlaceTokens(params.tables.cmp, sequence, position + 1 - dims.compress_block_tokens,
                       position + 1, false);
    tables.PlaceSummaries(sequence, num_blocks - 1, num_blocks, true);
  }
  const auto tokens_of = [&](const NewTokens& tokens) {
    return NewTokens{mirror.In(tokens.k, params.num_rows, dims.num_kv_heads, dims.head_dim_qk,
                               SizeOf(dims.dtype)),
                     mirror.In(tokens.v, params.num_rows, dims.num_kv_heads, dims.head_dim_v,
                               SizeOf(dims.dtype))};
  };
  AppendTokensParams p = params;
  p.rows = mirror.In(params.rows, params.num_rows);
  p.tables = tables.Finish();
  p.slc = tokens_of(params.slc);
  p.win = tokens_of(params.win);
  p.cmp = tokens_of(params.cmp);
  p.weights_k = mirror.In(params.weights_k, dims.compress_block_tokens, dims.head_dim_qk);
  p.weights_v = mirror.In(params.weights_v, dims.compress_block_tokens, dims.head_dim_v);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->AppendTokens(p, nullptr));
}

absl::Status MirroredKernels::DecodeSelect(const DecodeSelectParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t num_rows = params.num_rows, hq = dims.num_q_heads;
  const int64_t element_bytes = SizeOf(dims.dtype);
  MirroredTables tables(dims, params.tables, params.rows, num_rows, RecordBytes(dims), mirror);
  for (int64_t i = 0; i < num_rows; ++i) {
    const auto [sequence, position] = params.rows[i];
    if (sequence < 0) continue;
    tables.PlaceSummaries(sequence, 0, NumBlocksUpTo(dims, position), false);
    tables.PlaceWindow(sequence, position);
  }
  DecodeSelectParams p = params;
  p.rows = mirror.In(params.rows, num_rows);
  p.tables = tables.Finish();
  p.q = mirror.In(params.q, num_rows, hq, dims.head_dim_qk, element_bytes);
  p.block_indices =
      mirror.Out(params.block_indices, num_rows * dims.num_kv_heads * dims.num_selected_blocks);
  p.o_cmp = mirror.Out(params.o_cmp, num_rows, hq, dims.head_dim_v, element_bytes);
  p.lse_cmp = mirror.Out(params.lse_cmp, num_rows * hq);
  p.scratch =
      mirror.OutBytes(params.scratch, DecodeScratchBytes(dims, {num_rows, params.max_tokens}));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->DecodeSelect(p, nullptr));
}

absl::Status MirroredKernels::DecodeAttend(const DecodeAttendParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  const AttentionDims& dims = params.dims;
  const int64_t num_rows = params.num_rows, hq = dims.num_q_heads, dv = dims.head_dim_v;
  const int64_t indices_of_row = int64_t{dims.num_kv_heads} * dims.num_selected_blocks;
  const int64_t element_bytes = SizeOf(dims.dtype), block_tokens = dims.select_block_tokens;
  MirroredTables tables(dims, params.tables, params.rows, num_rows, RecordBytes(dims), mirror);
  for (int64_t i = 0; i < num_rows; ++i) {
    const auto [sequence, position] = params.rows[i];
    if (sequence < 0) continue;
    for (int64_t pick = i * indices_of_row; pick < (i + 1) * indices_of_row; ++pick) {
      const int64_t block = params.block_indices[pick];
      if (block < 0) continue;
      tables.PlaceTokens(params.tables.slc, sequence, block * block_tokens,
                         (block + 1) * block_tokens, false);
    }
    tables.PlaceWindow(sequence, position);
  }
  DecodeAttendParams p = params;
  p.rows = mirror.In(params.rows, num_rows);
  p.tables = tables.Finish();
  p.q = mirror.In(params.q, num_rows, hq, dims.head_dim_qk, element_bytes);
  p.block_indices = mirror.In(params.block_indices, num_rows * indices_of_row);
  p.gate = mirror
               .In(ConstTensor3{params.gate, params.gate_row_stride, params.gate_head_stride},
                   num_rows, hq, 3, SizeOf(params.gate_dtype))
               .data;
  p.o = mirror.Out(params.o, num_rows, hq, dv, element_bytes);
  p.o_slc = mirror.Out(params.o_slc, num_rows, hq, dv, element_bytes);
  p.o_win = mirror.Out(params.o_win, num_rows, hq, dv, element_bytes);
  p.lse_slc = mirror.Out(params.lse_slc, num_rows * hq);
  p.lse_win = mirror.Out(params.lse_win, num_rows * hq);
  p.scratch =
      mirror.OutBytes(params.scratch, DecodeScratchBytes(dims, {num_rows, params.max_tokens}));
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->DecodeAttend(p, nullptr));
}

absl::Status MirroredKernels::CopyPieces(const CopyPiecesParams& params, void* /*stream*/) {
  Mirror mirror(*device_);
  std::vector<const void*> src(params.count);
  std::vector<void*> dst(params.count);
  for (int64_t i = 0; i < params.count; ++i) {
    src[i] = mirror.InBytes(params.src[i], params.num_bytes);
    dst[i] = mirror.OutBytes(params.dst[i], params.num_bytes);
  }
  CopyPiecesParams p = params;
  p.src = mirror.In(src.data(), params.count);
  p.dst = mirror.In(dst.data(), params.count);
  if (!mirror.status().ok()) return mirror.status();
  return mirror.Finish(device_->CopyPieces(p, nullptr));
}

}  // namespace nsa::kernels::cuda
