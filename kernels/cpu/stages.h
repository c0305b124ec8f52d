// The stages of the CPU backend, one file each; cpu_kernels.cc says which method is which stage.
// Each returns OK or ResourceExhausted when scratch could not be had.
#ifndef KERNELS_CPU_STAGES_H_
#define KERNELS_CPU_STAGES_H_

#include "absl/status/status.h"
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

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_STAGES_H_
