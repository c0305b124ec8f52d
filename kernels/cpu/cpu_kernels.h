// The kernels on the host's cores. Host memory, every call has finished when it returns.
//
// Each result is the same bit for bit whatever the number of threads, the cut of queries into calls
// and segments, and the place (own or halo, own record or slot) that a token is read from; except
// that gradients of keys, values and parameters depend on the cut. Any number of threads may call
// one object; calls that compute run one after another.
#ifndef KERNELS_CPU_CPU_KERNELS_H_
#define KERNELS_CPU_CPU_KERNELS_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cpu/workers.h"
#include "kernels/host_order.h"
#include "kernels/kernels.h"

namespace nsa::kernels {

struct CpuKernelsOptions {
  int num_threads = 0;  // the caller's included; 0: as many as the host has cores
};

class CpuKernels : public HostOrder {
 public:
  static absl::StatusOr<std::unique_ptr<Kernels>> Create(const CpuKernelsOptions& options = {});

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

  int64_t WindowBackwardScratchBytes(const AttentionDims& dims,
                                     const BackwardLimits& limits) const override;
  int64_t SummariesBackwardScratchBytes(const AttentionDims& dims,
                                        const BackwardLimits& limits) const override;
  int64_t SelectedBackwardScratchBytes(const AttentionDims& dims,
                                       const BackwardLimits& limits) const override;
  int64_t CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                       int32_t hidden_width, int64_t num_blocks) const override;
  absl::Status GateBackward(const GateBackwardParams& params, void* stream) override;
  absl::Status AttendWindowBackward(const AttendWindowBackwardParams& params,
                                    void* stream) override;
  absl::Status AttendSelectedBackward(const AttendSelectedBackwardParams& params,
                                      void* stream) override;
  absl::Status AttendSummariesBackward(const AttendSummariesBackwardParams& params,
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
  explicit CpuKernels(std::unique_ptr<cpu::Workers> workers) : workers_(std::move(workers)) {}

  const std::unique_ptr<cpu::Workers> workers_;
};

}  // namespace nsa::kernels

#endif  // KERNELS_CPU_CPU_KERNELS_H_
