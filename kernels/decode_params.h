// What each stage of decoding is given: plain structs, as in params.h, whose symbols and rules hold
// here too.
//
// A sequence's keys and values lie in pages: page j holds select block j, tokens [j*l', (j+1)*l'),
// as the records of its Hkv kv heads, one behind the other, in the layout of PackBlocks. Its
// summaries lie in summary pages: page m holds compression blocks [64m, 64(m+1)), a row each of
// kc [Hkv,Dk] and then vc [Hkv,Dv]. Tables say where the pages of each sequence are; a page may lie
// in another device's memory, as long as kernels can load it. What a page holds past the sequence's
// end may be anything, NaN too, and changes no result.
#ifndef KERNELS_DECODE_PARAMS_H_
#define KERNELS_DECODE_PARAMS_H_

#include <cstdint>

#include "kernels/params.h"
#include "kernels/types.h"

namespace nsa::kernels {

// Compression blocks of a summary page.
constexpr int32_t kSummaryPageBlocks = 64;

// One new token: row i of a step's tensors belongs to rows[i]. Rows of one sequence are consecutive
// and ascending by position; all are appended before any attends.
struct DecodeRow {
  int32_t sequence;  // row of the tables; -1: no token, whose rows of the outputs are not touched
  int64_t position;  // in the sequence
};

// Addresses of pages, by sequence. Entries that a step does not need may be anything: it needs, of
// a query at position t, slc pages it selects, win pages of (t - w, t], cmp pages of the tokens of
// blocks that end in the step's tokens, and summary pages of blocks that end at or before t.
// Branches that share k and v share tables.
struct PageTables {
  void* const* slc;        // [sequences, max_pages]
  void* const* win;        // [sequences, max_pages]
  void* const* cmp;        // [sequences, max_pages]
  void* const* summaries;  // [sequences, max_summary_pages]
  int64_t max_pages;
  int64_t max_summary_pages;
};

// Keys and values of new tokens.
struct NewTokens {
  ConstTensor3 k;  // [R,Hkv,Dk] dims.dtype; data nullable: nothing is appended to this branch
  ConstTensor3 v;  // [R,Hkv,Dv] dims.dtype
};

// Writes new tokens into their pages, and into summary pages what of compression blocks ends with
// them (NSA equation 7): block i exists from token i*d + l - 1 on.
struct AppendTokensParams {
  AttentionDims dims;
  const DecodeRow* rows;  // [num_rows]
  int64_t num_rows;       // R
  PageTables tables;
  // Branches that share a table have the same k and v.
  NewTokens slc, win, cmp;
  bool compresses;  // else no summary is written
  Compressor compressor;
  CompressorWeights weights_k, weights_v;
};

// What the scratch of a step grows with; upper bounds do.
struct DecodeLimits {
  int64_t num_rows;    // R
  int64_t max_tokens;  // of a sequence; below 2^31
};

// Compressed attention over a sequence's summaries, importance and top-n (NSA equations 5 to 12):
// what ScoreAndSelect computes for one query. Leaves o_cmp in the scratch for DecodeAttend, and
// what else needs no selection: it may attend to the window. It may begin while AppendTokens, which
// stands before it in the stream, still runs: what a step is given has to be there before that
// begins.
struct DecodeSelectParams {
  AttentionDims dims;
  const DecodeRow* rows;  // [num_rows]
  int64_t num_rows;       // R
  int64_t max_tokens;     // as in the limits: no position reaches it
  PageTables tables;
  ConstTensor3 q;          // [R,Hq,Dk] dims.dtype
  int32_t* block_indices;  // [R,Hkv,n] ascending, -1 padded
  Tensor3 o_cmp;           // [R,Hq,Dv] dims.dtype, data nullable: for a caller who looks
  float* lse_cmp;          // [R,Hq] natural log, nullable
  // DecodeScratchBytes; 256-byte aligned. Zeroed once, before the first step; it serves steps of
  // any number of rows, but of one dims and max_tokens.
  void* scratch;
};

// Attention over the selected blocks and over the window, and the gate: what AttendSelected and
// AttendWindow compute.
struct DecodeAttendParams {
  AttentionDims dims;
  const DecodeRow* rows;  // [num_rows]
  int64_t num_rows;       // R
  int64_t max_tokens;
  PageTables tables;
  ConstTensor3 q;                // [R,Hq,Dk] dims.dtype
  const int32_t* block_indices;  // [R,Hkv,n]
  const void* gate;              // [R,Hq,3] gate_dtype, order (cmp, slc, win)
  DType gate_dtype;
  int64_t gate_row_stride;   // in elements
  int64_t gate_head_stride;  // in elements; the last dimension is contiguous
  Tensor3 o;                 // [R,Hq,Dv] dims.dtype
  Tensor3 o_slc, o_win;      // [R,Hq,Dv] dims.dtype, data nullable
  float* lse_slc;            // [R,Hq] natural log, nullable
  float* lse_win;
  void* scratch;  // that DecodeSelect has written
};

// Copies pieces of equal size: piece i from src[i] to dst[i].
struct CopyPiecesParams {
  const void* const* src;  // [count]
  void* const* dst;        // [count]
  int64_t count;
  int64_t num_bytes;  // of a piece; a multiple of 16
};

}  // namespace nsa::kernels

#endif  // KERNELS_DECODE_PARAMS_H_
