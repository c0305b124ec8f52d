// What each stage of the backward is given: plain structs, as in params.h, whose symbols and rules
// hold here too.
//
// For branch b in (cmp, slc, win), o = sum over b of g_b * o_b, and D_b = g_b * (dO . o_b). With
// P = exp(scale * q.k - lse_b) over the keys that the branch attends to,
//   dV = (g_b * P)^T dO,  dS = P * (g_b * dO V^T - D_b),  dQ = scale * dS K,  dK = scale * dS^T Q.
// A query without a key (lse_b = -inf) adds nothing.
//
// Gradients are summed in f32 before they go to the caller's tensors. A stage that `adds` does so
// to what is there; else it writes all it names, zero where nothing contributes. No sum depends on
// threads or timing: repeated calls give the same bits. dq, dgate: for each query, sums run over
// blocks in global order in tiles of fixed size, so that grouping queries changes no bit.
#ifndef KERNELS_BACKWARD_PARAMS_H_
#define KERNELS_BACKWARD_PARAMS_H_

#include <cstdint>

#include "kernels/params.h"
#include "kernels/types.h"

namespace nsa::kernels {

// Gradients of one tensor of TokenRows, at the same rows; every row lies in a segment or is not
// touched.
struct TokenGradients {
  float* own;   // [T,Hkv,D] dense
  float* halo;  // [H,Hkv,D] dense, nullable when H = 0
  bool adds;
};

// What a branch's backward knows of its queries' outputs.
struct OutputGradients {
  ConstTensor3 d_o;    // [T,Hq,Dv] dims.dtype
  const float* lse;    // [T,Hq] of the branch
  const float* gate;   // [T,Hq] g_b
  const float* delta;  // [T,Hq] D_b
};

// [T,G*kv_heads.size(),Dk] dense, the heads of Queries::kv_heads alone.
struct QueryGradients {
  float* dq;
  bool adds;
};

// What the scratch of the stages grows with; upper bounds do.
struct BackwardLimits {
  int64_t num_tokens;      // T
  int32_t num_segments;    // of the queries
  int32_t num_kv_heads;    // of a call: Queries::kv_heads.size()
  int64_t num_cmp_blocks;  // N
  int64_t num_slc_blocks;  // B
  int64_t num_records;     // own ones and slots
  int32_t num_documents;
};

// dgate_b = dO . o_b; and what the branches' backwards need of each row.
struct GateBackwardParams {
  AttentionDims dims;
  int64_t num_tokens;  // T
  const void* gate;    // [T,Hq,3] gate_dtype, order (cmp, slc, win)
  DType gate_dtype;
  int64_t row_stride;   // of gate, in elements
  int64_t head_stride;  // of gate, in elements
  ConstTensor3 d_o;     // [T,Hq,Dv] dims.dtype
  ConstTensor3 o_cmp;   // [T,Hq,Dv] dims.dtype
  ConstTensor3 o_slc;
  ConstTensor3 o_win;
  float* d_gate;  // [T,Hq,3] dense
  float* gates;   // [3,T,Hq] g_b
  float* deltas;  // [3,T,Hq] D_b
};

// Of AttendWindow.
struct AttendWindowBackwardParams {
  AttentionDims dims;
  Queries queries;
  TokenRows k;  // Dk
  TokenRows v;  // Dv
  OutputGradients outputs;
  QueryGradients queries_gradients;
  TokenGradients dk;  // Dk; heads of queries.kv_heads
  TokenGradients dv;  // Dv
  // Streaming multiprocessors to leave to work on other streams; host implementations ignore it.
  int32_t sms_to_leave = 0;
  void* scratch = nullptr;  // WindowBackwardScratchBytes; 256-byte aligned
};

// Of AttendSelected. Gradients of a record are K's [l',Dk] then V's [l',Dv], f32, a row a token;
// those of the locations' order: own record i at own_gradients + i * (Dk + Dv) * l', slot i
// likewise in slot_gradients. Heads of queries.kv_heads and, if not `adds`, all their own records
// are written; of the slots, those that `locations` names for these heads.
struct AttendSelectedBackwardParams {
  AttentionDims dims;
  Queries queries;
  int64_t query_begin;  // only queries [query_begin, query_end) are computed
  int64_t query_end;
  const int32_t* block_indices;  // [T,Hkv,n]
  const int32_t* locations;      // [Hkv,B]
  int64_t num_blocks;            // B
  int32_t num_documents;         // of queries.documents
  const void* own_records;       // locations < num_own_records
  int64_t num_own_records;
  const void* slots;  // the others
  OutputGradients outputs;
  QueryGradients queries_gradients;  // rows [query_begin, query_end)
  float* own_gradients;              // [num_own_records, (Dk+Dv)*l']
  bool adds_to_own;
  float* slot_gradients;  // [slots, (Dk+Dv)*l'], always overwritten
  void* scratch;          // SelectedBackwardScratchBytes; 256-byte aligned
};

// Of the compressed attention in ScoreAndSelect.
struct AttendSummariesBackwardParams {
  AttentionDims dims;
  Queries queries;
  ConstTensor3 kc;         // [N,Hkv,Dk] dims.dtype
  ConstTensor3 vc;         // [N,Hkv,Dv] dims.dtype
  int64_t num_cmp_blocks;  // N
  int32_t num_documents;   // of queries.documents
  OutputGradients outputs;
  QueryGradients queries_gradients;
  // [N,Hkv*(Dk+Dv)] dense: of kc [Hkv,Dk], then of vc [Hkv,Dv] in each row. Heads of
  // queries.kv_heads of every row are overwritten.
  float* d_summaries;
  void* scratch;  // SummariesBackwardScratchBytes; 256-byte aligned
};

// Gradients of CompressorWeights, in their shapes, f32; those of unset weights are null.
struct CompressorWeightGradients {
  float* weight = nullptr;
  float* pe = nullptr;
  float* w = nullptr;
  float* w1 = nullptr;
  float* b1 = nullptr;
  float* w2 = nullptr;
  float* b2 = nullptr;
};

// Of Compress, on one tensor (k or v). Overwrites the weights' gradients with what the runs'
// blocks contribute, also when there are none.
struct CompressBackwardParams {
  AttentionDims dims;
  int32_t head_dim;  // Dk for k, Dv for v
  Compressor compressor;
  CompressorWeights weights;
  TokenRows tokens;           // every token of every run is covered by the segments
  const Document* documents;  // [num_documents]
  const BlockRun* runs;       // [num_runs] compression blocks, ascending
  int32_t num_runs;
  int64_t num_blocks;          // sum of the runs' num_blocks
  const float* d_summaries;    // row cmp_block_begin + i, head h: + h * head_dim
  int64_t d_summaries_stride;  // of a row, in elements
  TokenGradients d_tokens;     // rows that no block of the runs covers get zero unless it adds
  CompressorWeightGradients d_weights;
  void* scratch;  // CompressBackwardScratchBytes; 256-byte aligned
};

// Adds the gradients of own records to those of the tokens they were packed from.
struct UnpackGradientsParams {
  AttentionDims dims;
  const float* record_gradients;  // [Hkv,num_blocks,(Dk+Dv)*l']
  const Segment* segments;        // [num_segments] of the tokens, as PackBlocks was given
  int32_t num_segments;
  const Document* documents;  // [num_documents]
  const BlockRun* runs;       // [num_runs] as PackBlocks was given
  int32_t num_runs;
  int64_t num_blocks;
  TokenGradients dk;  // Dk; always added to
  TokenGradients dv;  // Dv
};

// The slots of one peer that hold gradients of this rank's records, in the order of the records.
struct PlanReturnParams {
  AttentionDims dims;
  HeadRange kv_heads;
  const int32_t* peer_locations;  // [Hkv,B] the peer's `locations`
  int64_t peer_own_records;       // the peer's num_own_records
  int32_t peer;
  BlockOwners owners;
  int64_t record_gradient_bytes;
  int64_t capacity;      // at least kv_heads.size() * this rank's blocks
  int32_t* peers;        // [capacity] = peer
  int64_t* offsets;      // [capacity] byte offset in the peer's window of slot gradients
  int32_t* own_records;  // [capacity] whose gradient it is
  int32_t* count;        // scalar
};

// dst[rows[i]] += src[i], for i < *count; no row occurs twice.
struct AddIndexedRowsParams {
  float* dst;            // [.,row_elements]
  const float* src;      // [count,row_elements]
  const int32_t* rows;   // [count]
  const int32_t* count;  // scalar
  int64_t max_count;
  int64_t row_elements;
};

// dst[segments' rows] += src, whose rows are consecutive; no row occurs twice. Only row and
// num_tokens of a segment are read.
struct AddRowsParams {
  float* dst;        // [rows,row_elements] dense
  const float* src;  // [sum of num_tokens,row_elements] dense
  const Segment* segments;
  int32_t num_segments;
  int64_t row_elements;
};

// A gradient on its way to the caller: dst = src, or dst += src.
struct StoreGradientParams {
  const float* src;  // [rows,heads,head_dim] dense
  int64_t num_rows;
  int32_t num_heads;
  int32_t head_dim;
  Tensor3 dst;      // [rows,heads,head_dim]
  DType dst_dtype;  // f32 or that of the activations
  bool adds;        // in f32, rounded once
};

}  // namespace nsa::kernels

#endif  // KERNELS_BACKWARD_PARAMS_H_
