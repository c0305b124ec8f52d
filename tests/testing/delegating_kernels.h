// Kernels that pass every call on, for tests to override some.
#ifndef TESTS_TESTING_DELEGATING_KERNELS_H_
#define TESTS_TESTING_DELEGATING_KERNELS_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace nsa::test {

class DelegatingKernels : public kernels::Kernels {
 public:
  explicit DelegatingKernels(std::shared_ptr<kernels::Kernels> to) : to_(std::move(to)) {}

  absl::Status Supports(const kernels::AttentionDims& dims) const override {
    return to_->Supports(dims);
  }
  int64_t RecordBytes(const kernels::AttentionDims& dims) const override {
    return to_->RecordBytes(dims);
  }
  int64_t RowAlignment() const override { return to_->RowAlignment(); }
  absl::StatusOr<std::unique_ptr<kernels::Memory>> Allocate(int64_t num_bytes) override {
    return to_->Allocate(num_bytes);
  }
  absl::Status CopyFromHost(void* dst, const void* src, int64_t num_bytes, void* stream) override {
    return to_->CopyFromHost(dst, src, num_bytes, stream);
  }
  absl::Status CopyToHost(void* dst, const void* src, int64_t num_bytes, void* stream) override {
    return to_->CopyToHost(dst, src, num_bytes, stream);
  }
  absl::Status Synchronize(void* stream) override { return to_->Synchronize(stream); }
  absl::StatusOr<std::unique_ptr<kernels::Stream>> CreateStream() override {
    return to_->CreateStream();
  }
  absl::StatusOr<std::unique_ptr<kernels::Event>> CreateEvent(kernels::EventUse use) override {
    return to_->CreateEvent(use);
  }
  absl::Status Record(kernels::Event& event, void* stream) override {
    return to_->Record(event, stream);
  }
  absl::Status WaitFor(kernels::Event& event, void* stream) override {
    return to_->WaitFor(event, stream);
  }
  absl::StatusOr<bool> IsCapturing(void* stream) override { return to_->IsCapturing(stream); }
  absl::StatusOr<double> SecondsBetween(kernels::Event& begin, kernels::Event& end) override {
    return to_->SecondsBetween(begin, end);
  }
  void BeginRange(const char* name) override { to_->BeginRange(name); }
  void EndRange() override { to_->EndRange(); }
  int64_t ScoreScratchBytes(const kernels::AttentionDims& dims,
                            const kernels::ScoreLimits& limits) const override {
    return to_->ScoreScratchBytes(dims, limits);
  }
  absl::Status CopyRows(const kernels::CopyRowsParams& params, void* stream) override {
    return to_->CopyRows(params, stream);
  }
  absl::Status Compress(const kernels::CompressParams& params, void* stream) override {
    return to_->Compress(params, stream);
  }
  absl::Status PackBlocks(const kernels::PackBlocksParams& params, void* stream) override {
    return to_->PackBlocks(params, stream);
  }
  absl::Status ScoreAndSelect(const kernels::ScoreAndSelectParams& params, void* stream) override {
    return to_->ScoreAndSelect(params, stream);
  }
  absl::Status PlanFetch(const kernels::PlanFetchParams& params, void* stream) override {
    return to_->PlanFetch(params, stream);
  }
  absl::Status AttendSelected(const kernels::AttendSelectedParams& params, void* stream) override {
    return to_->AttendSelected(params, stream);
  }
  absl::Status AttendWindow(const kernels::AttendWindowParams& params, void* stream) override {
    return to_->AttendWindow(params, stream);
  }
  absl::Status Zero(void* dst, int64_t num_bytes, void* stream) override {
    return to_->Zero(dst, num_bytes, stream);
  }
  int64_t WindowBackwardScratchBytes(const kernels::AttentionDims& dims,
                                     const kernels::BackwardLimits& limits) const override {
    return to_->WindowBackwardScratchBytes(dims, limits);
  }
  int64_t SelectedBackwardScratchBytes(const kernels::AttentionDims& dims,
                                       const kernels::BackwardLimits& limits) const override {
    return to_->SelectedBackwardScratchBytes(dims, limits);
  }
  int64_t SummariesBackwardScratchBytes(const kernels::AttentionDims& dims,
                                        const kernels::BackwardLimits& limits) const override {
    return to_->SummariesBackwardScratchBytes(dims, limits);
  }
  int64_t CompressBackwardScratchBytes(const kernels::AttentionDims& dims, Compressor compressor,
                                       int32_t hidden_width, int64_t num_blocks) const override {
    return to_->CompressBackwardScratchBytes(dims, compressor, hidden_width, num_blocks);
  }
  absl::Status GateBackward(const kernels::GateBackwardParams& params, void* stream) override {
    return to_->GateBackward(params, stream);
  }
  absl::Status AttendWindowBackward(const kernels::AttendWindowBackwardParams& params,
                                    void* stream) override {
    return to_->AttendWindowBackward(params, stream);
  }
  absl::Status AttendSelectedBackward(const kernels::AttendSelectedBackwardParams& params,
                                      void* stream) override {
    return to_->AttendSelectedBackward(params, stream);
  }
  absl::Status AttendSummariesBackward(const kernels::AttendSummariesBackwardParams& params,
                                       void* stream) override {
    return to_->AttendSummariesBackward(params, stream);
  }
  absl::Status CompressBackward(const kernels::CompressBackwardParams& params,
                                void* stream) override {
    return to_->CompressBackward(params, stream);
  }
  absl::Status UnpackGradients(const kernels::UnpackGradientsParams& params,
                               void* stream) override {
    return to_->UnpackGradients(params, stream);
  }
  absl::Status PlanReturn(const kernels::PlanReturnParams& params, void* stream) override {
    return to_->PlanReturn(params, stream);
  }
  absl::Status AddIndexedRows(const kernels::AddIndexedRowsParams& params, void* stream) override {
    return to_->AddIndexedRows(params, stream);
  }
  absl::Status AddRows(const kernels::AddRowsParams& params, void* stream) override {
    return to_->AddRows(params, stream);
  }
  absl::Status StoreGradient(const kernels::StoreGradientParams& params, void* stream) override {
    return to_->StoreGradient(params, stream);
  }
  int64_t DecodeScratchBytes(const kernels::AttentionDims& dims,
                             const kernels::DecodeLimits& limits) const override {
    return to_->DecodeScratchBytes(dims, limits);
  }
  absl::Status AppendTokens(const kernels::AppendTokensParams& params, void* stream) override {
    return to_->AppendTokens(params, stream);
  }
  absl::Status DecodeSelect(const kernels::DecodeSelectParams& params, void* stream) override {
    return to_->DecodeSelect(params, stream);
  }
  absl::Status DecodeAttend(const kernels::DecodeAttendParams& params, void* stream) override {
    return to_->DecodeAttend(params, stream);
  }
  absl::Status CopyPieces(const kernels::CopyPiecesParams& params, void* stream) override {
    return to_->CopyPieces(params, stream);
  }

 private:
  std::shared_ptr<kernels::Kernels> to_;
};

}  // namespace nsa::test

#endif  // TESTS_TESTING_DELEGATING_KERNELS_H_
