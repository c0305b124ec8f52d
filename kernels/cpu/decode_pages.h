// Where the pages of sequences lie, and a step's rows as the stages of the forward take queries: a
// sequence is a document.
#ifndef KERNELS_CPU_DECODE_PAGES_H_
#define KERNELS_CPU_DECODE_PAGES_H_

#include <cstdint>
#include <vector>

#include "kernels/cpu/stages.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

// The record of a page of one of the tables.
inline char* RecordOf(const AttentionDims& dims, const PageTables& tables, void* const* table,
                      int32_t sequence, int64_t page, int32_t kv_head) {
  return static_cast<char*>(table[sequence * tables.max_pages + page]) +
         kv_head * RecordBytes(dims);
}

// The first of a row's kc [Hkv,Dk] and vc [Hkv,Dv].
struct SummaryRow {
  char* kc;
  char* vc;
};

inline SummaryRow SummaryOf(const AttentionDims& dims, const PageTables& tables, int32_t sequence,
                            int64_t block) {
  const int64_t kc_bytes = dims.num_kv_heads * dims.head_dim_qk * SizeOf(dims.dtype);
  const int64_t vc_bytes = dims.num_kv_heads * dims.head_dim_v * SizeOf(dims.dtype);
  char* const page = static_cast<char*>(
      tables.summaries[sequence * tables.max_summary_pages + block / kSummaryPageBlocks]);
  char* const kc = page + block % kSummaryPageBlocks * (kc_bytes + vc_bytes);
  return {.kc = kc, .vc = kc + kc_bytes};
}

// The rows of each sequence, in order; a row without a token is in none.
inline std::vector<Segment> SegmentsOf(const DecodeRow* rows, int64_t num_rows) {
  std::vector<Segment> segments;
  for (int64_t i = 0; i < num_rows; ++i) {
    if (rows[i].sequence < 0) continue;
    if (!segments.empty()) {
      Segment& last = segments.back();
      if (last.document == rows[i].sequence && last.row + last.num_tokens == i &&
          last.position + last.num_tokens == rows[i].position) {
        ++last.num_tokens;
        continue;
      }
    }
    segments.push_back({.row = i,
                        .num_tokens = 1,
                        .position = rows[i].position,
                        .document = rows[i].sequence,
                        .is_halo = 0});
  }
  return segments;
}

inline Queries QueriesOf(const AttentionDims& dims, const ConstTensor3& q,
                         const std::vector<Segment>& segments, int64_t num_rows) {
  return {.q = q,
          .segments = segments.data(),
          .num_segments = static_cast<int32_t>(segments.size()),
          .documents = nullptr,
          .num_tokens = num_rows,
          .kv_heads = dims.all_kv_heads()};
}

// A step's scratch: o_cmp and o_win [R,Hq,Dv] dims.dtype.
inline int64_t BranchOutputBytes(const AttentionDims& dims, int64_t num_rows) {
  return num_rows * dims.num_q_heads * dims.head_dim_v * SizeOf(dims.dtype);
}

inline Tensor3 BranchOutput(const AttentionDims& dims, void* data) {
  return {data, int64_t{dims.num_q_heads} * dims.head_dim_v, dims.head_dim_v};
}

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_DECODE_PAGES_H_
