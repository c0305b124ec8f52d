// The stages of decoding.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cuda/mirror.h"
#include "kernels/cuda/mirrored_kernels.h"

namespace nsa::kernels::cuda {
namespace {

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

}  // namespace

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
