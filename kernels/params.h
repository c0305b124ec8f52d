// What each stage is given: plain structs, no dependency, so that device code may include them.
//
// Pointers refer to the memory of the implementation that is called (Kernels::Allocate). Params are
// trusted: the engine validates what a user passes.
//
// Symbols: T queries of this rank, Hq, Hkv, Dk, Dv, G = Hq / Hkv, n as in types.h; N compression
// blocks and B select blocks of the whole sequence, in global order; esize = SizeOf(dims.dtype).
#ifndef KERNELS_PARAMS_H_
#define KERNELS_PARAMS_H_

#include <cstdint>

#include "kernels/types.h"

namespace nsa::kernels {

// The caller's tokens of one tensor and the halo tokens received from other ranks.
struct TokenRows {
  ConstTensor3 own;         // [T,Hkv,D] dims.dtype
  ConstTensor3 halo;        // [H,Hkv,D] dims.dtype, nullable when H = 0
  const Segment* segments;  // [num_segments] ascending by (document, position), not overlapping
  int32_t num_segments;
};

// Copies rows of a strided tensor into consecutive rows of a dense one (a halo about to be sent).
struct CopyRowsParams {
  DType dtype;
  int32_t num_heads;
  int32_t head_dim;
  ConstTensor3 src;         // [rows,heads,head_dim]
  const Segment* segments;  // [num_segments] only row and num_tokens are read
  int32_t num_segments;
  void* dst;  // [sum of num_tokens,heads,head_dim] dense
};

// Learned parameters of a compressor (semantics: "Compression"). H' is 1 or num_kv_heads, F the
// hidden width. Which ones are set follows from the compressor; pe may be null with any of them.
struct CompressorWeights {
  DType dtype = DType::kF32;
  int32_t num_heads = 1;         // H'
  int32_t hidden_width = 0;      // F
  const void* weight = nullptr;  // [H',l]      weighted
  const void* pe = nullptr;      // [H',l,D]    weighted, linear, mlp; nullable
  const void* w = nullptr;       // [H',D,l*D]  linear
  const void* w1 = nullptr;      // [H',F,l*D]  mlp
  const void* b1 = nullptr;      // [H',F]      mlp
  const void* w2 = nullptr;      // [H',D,F]    mlp
  const void* b2 = nullptr;      // [H',D]      mlp
};

// NSA equation 7 on one tensor (k or v): summary i of a document = phi(tokens [i*d, i*d + l)).
struct CompressParams {
  AttentionDims dims;
  int32_t head_dim;  // Dk for k, Dv for v
  Compressor compressor;
  CompressorWeights weights;
  TokenRows tokens;           // every token of every run is covered by the segments
  const Document* documents;  // [num_documents]
  const BlockRun* runs;       // [num_runs] compression blocks to make
  int32_t num_runs;
  Tensor3 summaries;  // [N,Hkv,head_dim] dims.dtype; row cmp_block_begin + i is written
};

// Packs K and V of whole select blocks, per kv head, into records of RecordBytes() in the layout
// that AttendSelected reads. Tokens past the document's end are zero.
struct PackBlocksParams {
  AttentionDims dims;
  TokenRows k;                // Dk
  TokenRows v;                // Dv
  const Document* documents;  // [num_documents]
  const BlockRun* runs;       // [num_runs] select blocks this rank owns, in order
  int32_t num_runs;
  int64_t num_blocks;  // sum of the runs' num_blocks
  void* records;       // [Hkv,num_blocks] records
};

// Which queries a call works on. No other rows and heads of any output are touched.
struct Queries {
  ConstTensor3 q;           // [T,Hq,Dk] dims.dtype
  const Segment* segments;  // [num_segments] cover all T rows
  int32_t num_segments;
  const Document* documents;  // [num_documents]
  int64_t num_tokens;         // T
  HeadRange kv_heads;         // of Hkv
};

// What the scratch of ScoreAndSelect grows with; upper bounds do.
struct ScoreLimits {
  int64_t num_tokens;      // T
  int32_t num_segments;    // of the queries
  int64_t num_cmp_blocks;  // N
  int32_t num_documents;
};

// Stages 4 and 5: compressed attention (NSA equations 5 and 7), importance (8 to 10), top-n (11,
// 12).
struct ScoreAndSelectParams {
  AttentionDims dims;
  Queries queries;
  ConstTensor3 kc;         // [N,Hkv,Dk] dims.dtype, summaries of k of the whole sequence
  ConstTensor3 vc;         // [N,Hkv,Dv] dims.dtype, summaries of v
  int64_t num_cmp_blocks;  // N
  int32_t num_documents;   // of queries.documents
  Tensor3 o_cmp;           // [T,Hq,Dv] dims.dtype; 0 for a query that sees no block
  float* lse_cmp;          // [T,Hq] natural log, nullable; -inf for a query that sees no block
  int32_t* block_indices;  // [T,Hkv,n] ascending, counted in the query's document, -1 padded
  void* scratch;  // ScoreScratchBytes; 256-byte aligned; not shared with a call beside this
};

// Who owns which select block: rank and place in the owner's window of records.
struct BlockOwners {
  const int32_t* rank;            // [B]
  const int32_t* ordinal;         // [B] place among its owner's blocks
  const int64_t* blocks_of_rank;  // [P]
  int64_t num_blocks;             // B
  int32_t num_ranks;              // P
  int32_t this_rank;
};

// Stage 6, first half: the distinct remote (block, kv head) pairs that queries
// [query_begin, *query_end) select, as a list to gather; and a table that says where each selected
// block lies. *query_end is the first query whose blocks no longer fit into `capacity` slots.
struct PlanFetchParams {
  AttentionDims dims;
  Queries queries;               // q is not read
  const int32_t* block_indices;  // [T,Hkv,n]
  BlockOwners owners;
  int64_t record_bytes;
  int64_t query_begin;
  int64_t capacity;  // slots; enough for the picks of any one query
  // [Hkv,B] own: record index; remote: num_own_records + slot; not selected: -1
  int32_t* locations;
  int32_t* peers;             // [capacity] rank to read slot i from
  int64_t* offsets;           // [capacity] byte offset in that rank's window
  int32_t* num_slots;         // scalar: slots filled
  int64_t* query_end;         // scalar
  int64_t* num_remote_picks;  // scalar: remote picks before deduplication, nullable
  int64_t* slots_of_rank;     // [P] slots filled with records of each rank, nullable
};

// o = g_cmp * o_cmp + g_slc * o_slc + g_win * o_win (NSA equation 5), fused into the last writer.
struct GateParams {
  const void* gate;  // [T,Hq,3] gate_dtype, order (cmp, slc, win)
  DType gate_dtype;
  int64_t row_stride;   // in elements
  int64_t head_stride;  // in elements; the last dimension is contiguous
  ConstTensor3 o_cmp;   // [T,Hq,Dv] dims.dtype
  ConstTensor3 o_win;   // [T,Hq,Dv] dims.dtype
  Tensor3 o;            // [T,Hq,Dv] dims.dtype; may be o_cmp's memory
};

// Stages 7 and 8: attention over the selected blocks' tokens up to the query's own, then the gate.
struct AttendSelectedParams {
  AttentionDims dims;
  Queries queries;
  int64_t query_begin;  // only queries [query_begin, query_end) are computed
  int64_t query_end;
  const int32_t* block_indices;  // [T,Hkv,n]
  const int32_t* locations;      // [Hkv,B]
  int64_t num_blocks;            // B
  const void* own_records;       // locations < num_own_records
  int64_t num_own_records;
  const void* slots;  // the others
  Tensor3 o_slc;      // [T,Hq,Dv] dims.dtype, data nullable
  float* lse_slc;     // [T,Hq] natural log, nullable
  GateParams gate;
};

// Sliding window: token t attends to tokens (t - w, t] of its document.
struct AttendWindowParams {
  AttentionDims dims;
  Queries queries;
  TokenRows k;     // Dk
  TokenRows v;     // Dv
  Tensor3 o_win;   // [T,Hq,Dv] dims.dtype
  float* lse_win;  // [T,Hq] natural log, nullable
  // Streaming multiprocessors to leave to work on other streams; host implementations ignore it.
  int32_t sms_to_leave = 0;
};

}  // namespace nsa::kernels

#endif  // KERNELS_PARAMS_H_
