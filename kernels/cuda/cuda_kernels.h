// The kernels on one NVIDIA GPU, for bf16 and f16 activations. `stream` is a cudaStream_t.
//
// They are made for Hopper; GPUs of compute capability 8.0 and up run portable ones (dispatch.h),
// which the driver compiles where they are first used.
//
// A call enqueues and does not wait, Allocate and Synchronize apart; it may be captured in a graph.
// Each result is the same bit for bit whatever the cut of queries into calls and segments, and the
// place (own or halo, own record or slot) that a token is read from; of the backward, dq and d_gate
// are. Any number of threads may call one object. InvalidArgument when a tensor's rows are not
// aligned to 16 bytes. Gradients in f32 are moved 16 bytes at a time: row_elements is a multiple of
// 4.
#ifndef KERNELS_CUDA_CUDA_KERNELS_H_
#define KERNELS_CUDA_CUDA_KERNELS_H_

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/launch.h"
#include "kernels/kernels.h"

namespace nsa::kernels {

enum class CudaPath : int8_t {
  kAuto,      // what is fastest on the GPU
  kPortable,  // the kernels of all GPUs on Hopper too: machine code of the PTX that others run
};

struct CudaKernelsOptions {
  int device = 0;  // CUDA's number of the GPU
  CudaPath path = CudaPath::kAuto;
};

class CudaKernels : public Kernels {
 public:
  // InvalidArgument when there is no such GPU, or it is older than compute capability 8.0.
  static absl::StatusOr<std::unique_ptr<Kernels>> Create(const CudaKernelsOptions& options = {});

  absl::Status Supports(const AttentionDims& dims) const override;
  int64_t RecordBytes(const AttentionDims& dims) const override;

  int64_t RowAlignment() const override;

  absl::StatusOr<std::unique_ptr<Memory>> Allocate(int64_t num_bytes) override;
  absl::Status CopyFromHost(void* dst, const void* host_src, int64_t num_bytes,
                            void* stream) override;
  absl::Status CopyToHost(void* host_dst, const void* src, int64_t num_bytes,
                          void* stream) override;
  absl::Status Synchronize(void* stream) override;

  absl::StatusOr<std::unique_ptr<Stream>> CreateStream() override;
  absl::StatusOr<std::unique_ptr<Event>> CreateEvent(EventUse use) override;
  absl::Status Record(Event& event, void* stream) override;
  absl::Status WaitFor(Event& event, void* stream) override;
  absl::StatusOr<bool> IsCapturing(void* stream) override;
  absl::StatusOr<double> SecondsBetween(Event& begin, Event& end) override;
  void BeginRange(const char* name) override;  // of NVTX
  void EndRange() override;

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
  absl::Status AttendWindowBackward(const AttendWindowBackwardParams& params,
                                    void* stream) override;
  absl::Status AttendSummariesBackward(const AttendSummariesBackwardParams& params,
                                       void* stream) override;
  absl::Status Zero(void* dst, int64_t num_bytes, void* stream) override;
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
  CudaKernels(int device, const cuda::Device& properties)
      : device_(device), properties_(properties) {}

  const int device_;
  const cuda::Device properties_;
};

}  // namespace nsa::kernels

#endif  // KERNELS_CUDA_CUDA_KERNELS_H_
