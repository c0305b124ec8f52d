// Kernels over host memory that compute with other kernels on memory of theirs: every call copies
// what it reads there and what it writes back. Slow, and for tests only: what is written for host
// memory then also tests a device.
#ifndef KERNELS_CUDA_MIRRORED_KERNELS_H_
#define KERNELS_CUDA_MIRRORED_KERNELS_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/host_order.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cuda {

// Streams are not passed on: the calls wait.
class MirroredKernels : public HostOrder {
 public:
  explicit MirroredKernels(std::shared_ptr<Kernels> device) : device_(std::move(device)) {}

  absl::Status Supports(const AttentionDims& dims) const override;
  int64_t RecordBytes(const AttentionDims& dims) const override;

  absl::StatusOr<std::unique_ptr<Memory>> Allocate(int64_t num_bytes) override;
  absl::Status CopyFromHost(void* dst, const void* host_src, int64_t num_bytes,
                            void* stream) override;
  absl::Status CopyToHost(void* host_dst, const void* src, int64_t num_bytes,
                          void* stream) override;

  absl::Status CopyRows(const CopyRowsParams& params, void* stream) override;
  absl::Status Compress(const CompressParams& params, void* stream) override;
  absl::Status PackBlocks(const PackBlocksParams& params, void* stream) override;
  int64_t ScoreScratchBytes(const AttentionDims& dims, const ScoreLimits& limits) const override;
  absl::Status ScoreAndSelect(const ScoreAndSelectParams& params, void* stream) override;
  absl::Status PlanFetch(const PlanFetchParams& params, void* stream) override;
  absl::Status AttendSelected(const AttendSelectedParams& params, void* stream) override;
  absl::Status AttendWindow(const AttendWindowParams& params, void* stream) override;

  absl::Status Zero(void* dst, int64_t num_bytes, void* stream) override;
  int64_t WindowBackwardScratchBytes(const AttentionDims& dims,
                                     const BackwardLimits& limits) const override;
  int64_t SummariesBackwardScratchBytes(const AttentionDims& dims,
                                        const BackwardLimits& limits) const override;
  absl::Status AttendWindowBackward(const AttendWindowBackwardParams& params,
                                    void* stream) override;
  absl::Status AttendSummariesBackward(const AttendSummariesBackwardParams& params,
                                       void* stream) override;
  int64_t SelectedBackwardScratchBytes(const AttentionDims& dims,
                                       const BackwardLimits& limits) const override;
  int64_t CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                       int32_t hidden_width, int64_t num_blocks) const override;
  absl::Status GateBackward(const GateBackwardParams& params, void* stream) override;
  absl::Status AttendSelectedBackward(const AttendSelectedBackwardParams& params,
                                      void* stream) override;
  absl::Status CompressBackward(const CompressBackwardParams& params, void* stream) override;
  absl::Status UnpackGradients(const UnpackGradientsParams& params, void* stream) override;
  absl::Status PlanReturn(const PlanReturnParams& params, void* stream) override;
  absl::Status AddIndexedRows(const AddIndexedRowsParams& params, void* stream) override;
  absl::Status AddRows(const AddRowsParams& params, void* stream) override;
  absl::Status StoreGradient(const StoreGradientParams& params, void* stream) override;

  int64_t DecodeScratchBytes(const AttentionDims& dims, const DecodeLimits& limits) const override;
  absl::Status AppendTokens(const AppendTokensParams& params, void* stream) override;
  absl::Status DecodeSelect(const DecodeSelectParams& params, void* stream) override;
  absl::Status DecodeAttend(const DecodeAttendParams& params, void* stream) override;
  absl::Status CopyPieces(const CopyPiecesParams& params, void* stream) override;

 private:
  const std::shared_ptr<Kernels> device_;
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_MIRRORED_KERNELS_H_
