// The stages of the CPU backend, one file each; cpu_kernels.cc says which method is which stage.
// Each returns OK or ResourceExhausted when scratch could not be had.
#ifndef KERNELS_CPU_STAGES_H_
#define KERNELS_CPU_STAGES_H_

#include <cstdint>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "kernels/cpu/tile_ops.h"
#include "kernels/cpu/workers.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

absl::Status Compress(const CompressParams& params, Workers& workers);  // compress.cc
absl::Status ScoreAndSelect(const ScoreAndSelectParams& params,
                            Workers& workers);  // score_and_select.cc
void PlanFetch(const PlanFetchParams& params);  // plan_fetch.cc
absl::Status AttendSelected(const AttendSelectedParams& params,
                            Workers& workers);  // attend_selected.cc
absl::Status AttendWindow(const AttendWindowParams& params, Workers& workers);  // attend_window.cc

// The same for keys and values that lie elsewhere, found by the caller: of `params` neither what
// says where they lie nor the documents are read.
//
// rows[i] = summary `first` + i of a document, for i < count.
using FindSummaries = absl::FunctionRef<void(int32_t document, int64_t first, int32_t count,
                                             int32_t kv_head, const void** rows)>;
absl::Status ScoreAndSelect(const ScoreAndSelectParams& params, FindSummaries find_kc,
                            FindSummaries find_vc, Workers& workers);
// The record of a select block; what it holds past the last query of a run may be anything.
using FindRecord = absl::FunctionRef<const char*(int32_t document, int64_t block, int32_t kv_head)>;
absl::Status AttendSelected(const AttendSelectedParams& params, FindRecord find_record,
                            Workers& workers);
// keys [Dk,kTileKeys] and values [kTileKeys,Dv] of tokens [tile, tile + kTileKeys) of a document.
// Only those `seen` need be there; the other values have to be finite.
using LoadWindowTile = absl::FunctionRef<void(int32_t document, int64_t tile, int32_t kv_head,
                                              VisibleKeys seen, float* keys, float* values)>;
absl::Status AttendWindow(const AttendWindowParams& params, LoadWindowTile load_tile,
                          Workers& workers);

// Decoding: decode_append.cc, decode_select.cc, decode_attend.cc.
absl::Status AppendTokens(const AppendTokensParams& params, Workers& workers);
int64_t DecodeScratchBytes(const AttentionDims& dims, const DecodeLimits& limits);
absl::Status DecodeSelect(const DecodeSelectParams& params, Workers& workers);
absl::Status DecodeAttend(const DecodeAttendParams& params, Workers& workers);

absl::Status GateBackward(const GateBackwardParams& params, Workers& workers);  // gate_backward.cc
absl::Status AttendWindowBackward(const AttendWindowBackwardParams& params,
                                  Workers& workers);  // attend_window_backward.cc
int64_t SelectedBackwardScratchBytes(const AttentionDims& dims, const BackwardLimits& limits);
absl::Status AttendSelectedBackward(const AttendSelectedBackwardParams& params,
                                    Workers& workers);  // attend_selected_backward.cc
absl::Status AttendSummariesBackward(const AttendSummariesBackwardParams& params,
                                     Workers& workers);  // attend_summaries_backward.cc
int64_t CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                     int32_t hidden_width, int64_t num_blocks);
absl::Status CompressBackward(const CompressBackwardParams& params,
                              Workers& workers);  // compress_backward.cc

// gradients.cc
absl::Status UnpackGradients(const UnpackGradientsParams& params, Workers& workers);
void PlanReturn(const PlanReturnParams& params);
absl::Status AddIndexedRows(const AddIndexedRowsParams& params, Workers& workers);
absl::Status AddRows(const AddRowsParams& params, Workers& workers);
absl::Status StoreGradient(const StoreGradientParams& params, Workers& workers);

// pack.cc
//
// A record is K of a select block as [Dk,l'], a column per token, then V as [l',Dv], both in the
// storage dtype: the attention multiplies by K's columns, so the transposition is done once.
int64_t RecordBytes(const AttentionDims& dims);
absl::Status PackBlocks(const PackBlocksParams& params, Workers& workers);
void CopyRows(const CopyRowsParams& params);
absl::Status CopyPieces(const CopyPiecesParams& params, Workers& workers);

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_STAGES_H_
