// Decoding, first stage: new tokens go into their pages, and blocks that end with them are
// compressed.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cpu/decode_pages.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"

namespace nsa::kernels::cpu {
namespace {

// Tokens of one page: `document` says which sequence.
std::vector<Segment> SplitAtPages(const AttentionDims& dims, const std::vector<Segment>& segments) {
  std::vector<Segment> pieces;
  for (const Segment& segment : segments) {
    for (int64_t i = 0; i < segment.num_tokens;) {
      Segment piece = segment;
      piece.row += i;
      piece.position += i;
      piece.num_tokens =
          std::min(segment.num_tokens - i,
                   dims.select_block_tokens - piece.position % dims.select_block_tokens);
      pieces.push_back(piece);
      i += piece.num_tokens;
    }
  }
  return pieces;
}

template <class Bits>
void CopyStrided(const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                 int64_t count) {
  const Bits* const from = static_cast<const Bits*>(src);
  Bits* const to = static_cast<Bits*>(dst);
  for (int64_t i = 0; i < count; ++i) to[i * dst_stride] = from[i * src_stride];
}

// Values that lie `stride` elements apart.
void CopyStrided(DType dtype, const void* src, int64_t src_stride, void* dst, int64_t dst_stride,
                 int64_t count) {
  if (SizeOf(dtype) == 2) {
    CopyStrided<uint16_t>(src, src_stride, dst, dst_stride, count);
  } else {
    CopyStrided<uint32_t>(src, src_stride, dst, dst_stride, count);
  }
}

// Of a record: K's column and V's row of a token.
char* KeyOf(const AttentionDims& dims, char* record, int64_t token) {
  return record + token % dims.select_block_tokens * SizeOf(dims.dtype);
}
char* ValueOf(const AttentionDims& dims, char* record, int64_t token) {
  return record + (int64_t{dims.select_block_tokens} * dims.head_dim_qk +
                   token % dims.select_block_tokens * dims.head_dim_v) *
                      SizeOf(dims.dtype);
}

void StoreTokens(const AppendTokensParams& params, const NewTokens& tokens, void* const* table,
                 const Segment& piece, int32_t kv_head) {
  if (tokens.k.data == nullptr) return;
  const AttentionDims& dims = params.dims;
  char* const record = RecordOf(dims, params.tables, table, piece.document,
                                piece.position / dims.select_block_tokens, kv_head);
  for (int64_t i = 0; i < piece.num_tokens; ++i) {
    CopyStrided(dims.dtype, RowOf(tokens.k, dims.dtype, piece.row + i, kv_head), 1,
                KeyOf(dims, record, piece.position + i), dims.select_block_tokens,
                dims.head_dim_qk);
    std::memcpy(ValueOf(dims, record, piece.position + i),
                RowOf(tokens.v, dims.dtype, piece.row + i, kv_head),
                dims.head_dim_v * SizeOf(dims.dtype));
  }
}

// Blocks that end with a step's tokens, as Compress takes them: a document is a sequence, of which
// the tokens that the blocks cover are copied into dense rows, and the summaries made in others.
struct NewBlocks {
  NewBlocks(const AttentionDims& dims, const std::vector<Segment>& segments) {
    for (const Segment& segment : segments) {
      const int64_t first = NumVisibleSummaries(dims, segment.position - 1);
      const int64_t end = NumVisibleSummaries(dims, segment.position + segment.num_tokens - 1);
      if (first == end) continue;
      const int32_t document = static_cast<int32_t>(documents.size());
      const int64_t begin = first * dims.compress_stride_tokens;
      tokens.push_back({.row = num_tokens,
                        .num_tokens = (end - 1) * dims.compress_stride_tokens +
                                      dims.compress_block_tokens - begin,
                        .position = begin,
                        .document = document,
                        .is_halo = 0});
      Document row{};
      row.cmp_block_begin = num_blocks - first;
      documents.push_back(row);
      runs.push_back({document, first, end - first});
      sequences.push_back(segment.document);
      num_tokens += tokens.back().num_tokens;
      num_blocks += end - first;
    }
  }

  std::vector<Segment> tokens;
  std::vector<Document> documents;
  std::vector<BlockRun> runs;
  std::vector<int32_t> sequences;  // of the documents
  int64_t num_tokens = 0;
  int64_t num_blocks = 0;
};

absl::Status AppendSummaries(const AppendTokensParams& params, const NewBlocks& blocks,
                             Workers& workers) {
  const AttentionDims& dims = params.dims;
  const int64_t element_bytes = SizeOf(dims.dtype);
  const int64_t k_row = int64_t{dims.num_kv_heads} * dims.head_dim_qk;
  const int64_t v_row = int64_t{dims.num_kv_heads} * dims.head_dim_v;
  const auto memory =
      AllocateMemory((blocks.num_tokens + blocks.num_blocks) * (k_row + v_row) * element_bytes);
  if (!memory.ok()) return memory.status();
  char* const k = static_cast<char*>((*memory)->data());            // [num_tokens,Hkv,Dk]
  char* const v = k + blocks.num_tokens * k_row * element_bytes;    // [num_tokens,Hkv,Dv]
  char* const kc = v + blocks.num_tokens * v_row * element_bytes;   // [num_blocks,Hkv,Dk]
  char* const vc = kc + blocks.num_blocks * k_row * element_bytes;  // [num_blocks,Hkv,Dv]

  const std::vector<Segment> pieces = SplitAtPages(dims, blocks.tokens);
  absl::Status status = workers.Run(
      static_cast<int64_t>(pieces.size()) * dims.num_kv_heads, 0, [&](int64_t item, char*) {
        const Segment& piece = pieces[item / dims.num_kv_heads];
        const int32_t kv_head = static_cast<int32_t>(item % dims.num_kv_heads);
        char* const record =
            RecordOf(dims, params.tables, params.tables.cmp, blocks.sequences[piece.document],
                     piece.position / dims.select_block_tokens, kv_head);
        for (int64_t i = 0; i < piece.num_tokens; ++i) {
          const int64_t row = piece.row + i;
          CopyStrided(dims.dtype, KeyOf(dims, record, piece.position + i), dims.select_block_tokens,
                      k + (row * k_row + kv_head * dims.head_dim_qk) * element_bytes, 1,
                      dims.head_dim_qk);
          std::memcpy(v + (row * v_row + kv_head * dims.head_dim_v) * element_bytes,
                      ValueOf(dims, record, piece.position + i), dims.head_dim_v * element_bytes);
        }
      });
  if (!status.ok()) return status;

  const auto compress = [&](const char* tokens, char* summaries, int32_t head_dim,
                            const CompressorWeights& weights) {
    const int64_t row = int64_t{dims.num_kv_heads} * head_dim;
    return Compress({.dims = dims,
                     .head_dim = head_dim,
                     .compressor = params.compressor,
                     .weights = weights,
                     .tokens = {.own = {tokens, row, head_dim},
                                .halo = {},
                                .segments = blocks.tokens.data(),
                                .num_segments = static_cast<int32_t>(blocks.tokens.size())},
                     .documents = blocks.documents.data(),
                     .runs = blocks.runs.data(),
                     .num_runs = static_cast<int32_t>(blocks.runs.size()),
                     .summaries = {summaries, row, head_dim}},
                    workers);
  };
  status = compress(k, kc, dims.head_dim_qk, params.weights_k);
  if (!status.ok()) return status;
  status = compress(v, vc, dims.head_dim_v, params.weights_v);
  if (!status.ok()) return status;

  for (const BlockRun& run : blocks.runs) {
    for (int64_t block = run.first_block; block < run.first_block + run.num_blocks; ++block) {
      const int64_t row = blocks.documents[run.document].cmp_block_begin + block;
      const SummaryRow to = SummaryOf(dims, params.tables, blocks.sequences[run.document], block);
      std::memcpy(to.kc, kc + row * k_row * element_bytes, k_row * element_bytes);
      std::memcpy(to.vc, vc + row * v_row * element_bytes, v_row * element_bytes);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status AppendTokens(const AppendTokensParams& params, Workers& workers) {
  const int32_t num_heads = params.dims.num_kv_heads;
  const std::vector<Segment> segments = SegmentsOf(params.rows, params.num_rows);
  const std::vector<Segment> pieces = SplitAtPages(params.dims, segments);
  const absl::Status status =
      workers.Run(static_cast<int64_t>(pieces.size()) * num_heads, 0, [&](int64_t item, char*) {
        const Segment& piece = pieces[item / num_heads];
        const int32_t kv_head = static_cast<int32_t>(item % num_heads);
        StoreTokens(params, params.slc, params.tables.slc, piece, kv_head);
        StoreTokens(params, params.win, params.tables.win, piece, kv_head);
        StoreTokens(params, params.cmp, params.tables.cmp, piece, kv_head);
      });
  if (!status.ok() || !params.compresses) return status;
  const NewBlocks blocks(params.dims, segments);
  return blocks.num_blocks == 0 ? absl::OkStatus() : AppendSummaries(params, blocks, workers);
}

}  // namespace nsa::kernels::cpu
