#include "kernels/cpu/cpu_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "kernels/cpu/memory.h"
#include "kernels/cpu/stages.h"

namespace nsa::kernels {
namespace {

absl::Status Require(bool holds, absl::string_view field, double value, absl::string_view rule) {
  if (holds) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " = ", value, ": the CPU kernels support ", rule));
}

bool IsHeadDim(int32_t dim) { return dim == 64 || dim == 128 || dim == 192 || dim == 256; }

bool IsBlock(int32_t tokens, int32_t part) { return tokens > 0 && part > 0 && tokens % part == 0; }

}  // namespace

absl::StatusOr<std::unique_ptr<Kernels>> CpuKernels::Create(const CpuKernelsOptions& options) {
  if (options.num_threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_threads = ", options.num_threads, " must not be negative"));
  }
  const int num_cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  auto workers = cpu::Workers::Create(options.num_threads == 0 ? num_cores : options.num_threads);
  if (!workers.ok()) return workers.status();
  return absl::WrapUnique(new CpuKernels(*std::move(workers)));
}

absl::Status CpuKernels::Supports(const AttentionDims& d) const {
  constexpr absl::string_view kHeadDims = "64, 128, 192, 256";
  const absl::Status rules[] = {
      Require(d.dtype == DType::kF32 || d.dtype == DType::kBF16 || d.dtype == DType::kF16, "dtype",
              static_cast<int>(d.dtype), "f32, bf16, f16"),
      Require(d.num_kv_heads >= 1, "num_kv_heads", d.num_kv_heads, "1 and more"),
      Require(IsBlock(d.num_q_heads, d.num_kv_heads), "num_q_heads", d.num_q_heads,
              "positive multiples of num_kv_heads"),
      Require(IsHeadDim(d.head_dim_qk), "head_dim_qk", d.head_dim_qk, kHeadDims),
      Require(IsHeadDim(d.head_dim_v), "head_dim_v", d.head_dim_v, kHeadDims),
      Require(IsBlock(d.compress_stride_tokens, 16), "compress_stride_tokens",
              d.compress_stride_tokens, "positive multiples of 16"),
      Require(IsBlock(d.compress_block_tokens, d.compress_stride_tokens), "compress_block_tokens",
              d.compress_block_tokens, "positive multiples of compress_stride_tokens"),
      Require(IsBlock(d.select_block_tokens, d.compress_stride_tokens), "select_block_tokens",
              d.select_block_tokens, "positive multiples of compress_stride_tokens"),
      Require(d.num_initial_blocks >= 0, "num_initial_blocks", d.num_initial_blocks, "0 and more"),
      Require(d.num_local_blocks >= 1, "num_local_blocks", d.num_local_blocks, "1 and more"),
      Require(d.num_selected_blocks - d.num_local_blocks >= d.num_initial_blocks,
              "num_selected_blocks", d.num_selected_blocks,
              "num_initial_blocks + num_local_blocks and more"),
      Require(d.window_tokens >= 1, "window_tokens", d.window_tokens, "1 and more"),
      Require(std::isfinite(d.softmax_scale), "softmax_scale", d.softmax_scale, "finite values"),
  };
  for (const absl::Status& rule : rules) {
    if (!rule.ok()) return rule;
  }
  return absl::OkStatus();
}

int64_t CpuKernels::RecordBytes(const AttentionDims& dims) const { return cpu::RecordBytes(dims); }

absl::StatusOr<std::unique_ptr<Memory>> CpuKernels::Allocate(int64_t num_bytes) {
  return cpu::AllocateMemory(num_bytes);
}

absl::Status CpuKernels::CopyFromHost(void* dst, const void* host_src, int64_t num_bytes,
                                      void* /*stream*/) {
  if (num_bytes > 0) std::memcpy(dst, host_src, num_bytes);
  return absl::OkStatus();
}

absl::Status CpuKernels::CopyToHost(void* host_dst, const void* src, int64_t num_bytes,
                                    void* /*stream*/) {
  if (num_bytes > 0) std::memcpy(host_dst, src, num_bytes);
  return absl::OkStatus();
}

absl::Status CpuKernels::CopyRows(const CopyRowsParams& params, void* /*stream*/) {
  cpu::CopyRows(params);
  return absl::OkStatus();
}

absl::Status CpuKernels::Compress(const CompressParams& params, void* /*stream*/) {
  return cpu::Compress(params, *workers_);
}

absl::Status CpuKernels::PackBlocks(const PackBlocksParams& params, void* /*stream*/) {
  return cpu::PackBlocks(params, *workers_);
}

int64_t CpuKernels::ScoreScratchBytes(const AttentionDims& /*dims*/,
                                      const ScoreLimits& /*limits*/) const {
  return 0;  // each thread has its own
}

absl::Status CpuKernels::ScoreAndSelect(const ScoreAndSelectParams& params, void* /*stream*/) {
  return cpu::ScoreAndSelect(params, *workers_);
}

absl::Status CpuKernels::PlanFetch(const PlanFetchParams& params, void* /*stream*/) {
  cpu::PlanFetch(params);
  return absl::OkStatus();
}

absl::Status CpuKernels::AttendSelected(const AttendSelectedParams& params, void* /*stream*/) {
  return cpu::AttendSelected(params, *workers_);
}

absl::Status CpuKernels::AttendWindow(const AttendWindowParams& params, void* /*stream*/) {
  return cpu::AttendWindow(params, *workers_);
}

int64_t CpuKernels::WindowBackwardScratchBytes(const AttentionDims& /*dims*/,
                                               const BackwardLimits& /*limits*/) const {
  return 0;  // each thread has its own
}

int64_t CpuKernels::SummariesBackwardScratchBytes(const AttentionDims& /*dims*/,
                                                  const BackwardLimits& /*limits*/) const {
  return 0;
}

int64_t CpuKernels::SelectedBackwardScratchBytes(const AttentionDims& dims,
                                                 const BackwardLimits& limits) const {
  return cpu::SelectedBackwardScratchBytes(dims, limits);
}

int64_t CpuKernels::CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                                 int32_t hidden_width, int64_t num_blocks) const {
  return cpu::CompressBackwardScratchBytes(dims, compressor, hidden_width, num_blocks);
}

absl::Status CpuKernels::GateBackward(const GateBackwardParams& params, void* /*stream*/) {
  return cpu::GateBackward(params, *workers_);
}

absl::Status CpuKernels::AttendWindowBackward(const AttendWindowBackwardParams& params,
                                              void* /*stream*/) {
  return cpu::AttendWindowBackward(params, *workers_);
}

absl::Status CpuKernels::AttendSelectedBackward(const AttendSelectedBackwardParams& params,
                                                void* /*stream*/) {
  return cpu::AttendSelectedBackward(params, *workers_);
}

absl::Status CpuKernels::AttendSummariesBackward(const AttendSummariesBackwardParams& params,
                                                 void* /*stream*/) {
  return cpu::AttendSummariesBackward(params, *workers_);
}

absl::Status CpuKernels::CompressBackward(const CompressBackwardParams& params, void* /*stream*/) {
  return cpu::CompressBackward(params, *workers_);
}

absl::Status CpuKernels::UnpackGradients(const UnpackGradientsParams& params, void* /*stream*/) {
  return cpu::UnpackGradients(params, *workers_);
}

absl::Status CpuKernels::PlanReturn(const PlanReturnParams& params, void* /*stream*/) {
  cpu::PlanReturn(params);
  return absl::OkStatus();
}

absl::Status CpuKernels::AddIndexedRows(const AddIndexedRowsParams& params, void* /*stream*/) {
  return cpu::AddIndexedRows(params, *workers_);
}

absl::Status CpuKernels::AddRows(const AddRowsParams& params, void* /*stream*/) {
  return cpu::AddRows(params, *workers_);
}

absl::Status CpuKernels::StoreGradient(const StoreGradientParams& params, void* /*stream*/) {
  return cpu::StoreGradient(params, *workers_);
}

int64_t CpuKernels::DecodeScratchBytes(const AttentionDims& dims,
                                       const DecodeLimits& limits) const {
  return cpu::DecodeScratchBytes(dims, limits);
}

absl::Status CpuKernels::AppendTokens(const AppendTokensParams& params, void* /*stream*/) {
  return cpu::AppendTokens(params, *workers_);
}

absl::Status CpuKernels::DecodeSelect(const DecodeSelectParams& params, void* /*stream*/) {
  return cpu::DecodeSelect(params, *workers_);
}

absl::Status CpuKernels::DecodeAttend(const DecodeAttendParams& params, void* /*stream*/) {
  return cpu::DecodeAttend(params, *workers_);
}

absl::Status CpuKernels::CopyPieces(const CopyPiecesParams& params, void* /*stream*/) {
  return cpu::CopyPieces(params, *workers_);
}

}  // namespace nsa::kernels
