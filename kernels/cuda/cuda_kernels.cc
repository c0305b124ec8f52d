#include "kernels/cuda/cuda_kernels.h"

#include <cuda_runtime_api.h>
#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <initializer_list>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/decode_work.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/dispatch.h"
#include "kernels/cuda/record_layout.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/stream_order.h"
#include "kernels/cuda/supports.h"

namespace nsa::kernels {
namespace {

using cuda::CheckAligned;

// Major compute capabilities.
constexpr int kOldest = 8;
constexpr int kHopper = 9;

cudaStream_t ToStream(void* stream) { return static_cast<cudaStream_t>(stream); }

// The first that is not OK.
absl::Status First(std::initializer_list<absl::Status> statuses) {
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

// Launches the kernel that serves `dims` on the device.
template <class Params>
absl::Status Enqueue(const cuda::Stage<Params>& stage, const Params& params,
                     const AttentionDims& dims, const cuda::Device& device, void* stream) {
  return cuda::ToStatus(stage.Choose(dims, device.path)(params, device, ToStream(stream)),
                        stage.name);
}

// Launches a stage that has one kernel for all dims.
template <class Params>
absl::Status Enqueue(const cuda::Stage<Params>& stage, const Params& params,
                     const cuda::Device& device, void* stream) {
  return cuda::ToStatus(stage.portable(params, device, ToStream(stream)), stage.name);
}

absl::StatusOr<int> Attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  NSA_RETURN_IF_CUDA_ERROR(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Kernels>> CudaKernels::Create(const CudaKernelsOptions& options) {
  const int device = options.device;
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess) {
    cudaGetLastError();  // without a GPU or a driver, there are none
    num_devices = 0;
  }
  if (device < 0 || device >= num_devices) {
    return absl::InvalidArgumentError(absl::StrCat(
        "device = ", device, ": there are ", num_devices, " CUDA devices",
        error != cudaSuccess ? absl::StrCat(" (", cudaGetErrorString(error), ")") : ""));
  }
  const auto major = Attribute(cudaDevAttrComputeCapabilityMajor, device);
  if (!major.ok()) return major.status();
  if (*major < kOldest) {
    return absl::InvalidArgumentError(absl::StrCat("device = ", device, ": compute capability ",
                                                   *major, ".x, the CUDA kernels need ", kOldest,
                                                   ".0 and up"));
  }
  const cuda::Path path = *major == kHopper && options.path == CudaPath::kAuto
                              ? cuda::Path::kHopper
                              : cuda::Path::kPortable;
  const auto num_sms = Attribute(cudaDevAttrMultiProcessorCount, device);
  if (!num_sms.ok()) return num_sms.status();
  const auto shared_bytes = Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!shared_bytes.ok()) return shared_bytes.status();
  return absl::WrapUnique(new CudaKernels(device, {*num_sms, *shared_bytes, path}));
}

absl::Status CudaKernels::Supports(const AttentionDims& dims) const {
  return cuda::SupportsDims(dims);
}

int64_t CudaKernels::RecordBytes(const AttentionDims& dims) const {
  return cuda::RecordBytes(dims);
}

int64_t CudaKernels::RowAlignment() const { return cuda::kAlignmentBytes; }

absl::StatusOr<std::unique_ptr<Memory>> CudaKernels::Allocate(int64_t num_bytes) {
  return cuda::AllocateDeviceMemory(device_, num_bytes);
}

absl::Status CudaKernels::CopyFromHost(void* dst, const void* host_src, int64_t num_bytes,
                                       void* stream) {
  if (num_bytes == 0) return absl::OkStatus();
  const cuda::ScopedDevice scope(device_);
  return First(
      {scope.status(), NSA_CUDA_STATUS(cudaMemcpyAsync(dst, host_src, num_bytes,
                                                       cudaMemcpyHostToDevice, ToStream(stream)))});
}

absl::Status CudaKernels::CopyToHost(void* host_dst, const void* src, int64_t num_bytes,
                                     void* stream) {
  if (num_bytes == 0) return absl::OkStatus();
  const cuda::ScopedDevice scope(device_);
  return First(
      {scope.status(), NSA_CUDA_STATUS(cudaMemcpyAsync(host_dst, src, num_bytes,
                                                       cudaMemcpyDeviceToHost, ToStream(stream)))});
}

absl::Status CudaKernels::Synchronize(void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First({scope.status(), NSA_CUDA_STATUS(cudaStreamSynchronize(ToStream(stream)))});
}

absl::StatusOr<std::unique_ptr<Stream>> CudaKernels::CreateStream() {
  const cuda::ScopedDevice scope(device_);
  if (!scope.status().ok()) return scope.status();
  return cuda::CreateStream(device_);
}

absl::StatusOr<std::unique_ptr<Event>> CudaKernels::CreateEvent(EventUse use) {
  const cuda::ScopedDevice scope(device_);
  if (!scope.status().ok()) return scope.status();
  return cuda::CreateEvent(device_, use);
}

absl::Status CudaKernels::Record(Event& event, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First({scope.status(), cuda::Record(event, ToStream(stream))});
}

absl::Status CudaKernels::WaitFor(Event& event, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First({scope.status(), cuda::WaitFor(event, ToStream(stream))});
}

absl::StatusOr<bool> CudaKernels::IsCapturing(void* stream) {
  const cuda::ScopedDevice scope(device_);
  if (!scope.status().ok()) return scope.status();
  return cuda::IsCapturing(ToStream(stream));
}

absl::StatusOr<double> CudaKernels::SecondsBetween(Event& begin, Event& end) {
  const cuda::ScopedDevice scope(device_);
  if (!scope.status().ok()) return scope.status();
  return cuda::SecondsBetween(begin, end);
}

void CudaKernels::BeginRange(const char* name) { nvtxRangePushA(name); }

void CudaKernels::EndRange() { nvtxRangePop(); }

absl::Status CudaKernels::CopyRows(const CopyRowsParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status = First({scope.status(), CheckAligned("src", params.src)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kCopyRows, params, properties_, stream);
}

absl::Status CudaKernels::Compress(const CompressParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("tokens", params.tokens),
             CheckAligned("weights", params.weights), CheckAligned("summaries", params.summaries)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kCompress, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::PackBlocks(const PackBlocksParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("k", params.k), CheckAligned("v", params.v)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kPackBlocks, params, params.dims, properties_, stream);
}

int64_t CudaKernels::ScoreScratchBytes(const AttentionDims& dims, const ScoreLimits& limits) const {
  return static_cast<int64_t>(cuda::ScoreSelectScratchBytes(dims, limits));
}

absl::Status CudaKernels::ScoreAndSelect(const ScoreAndSelectParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.queries.q), CheckAligned("kc", params.kc),
             CheckAligned("vc", params.vc), CheckAligned("o_cmp", params.o_cmp)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kScoreAndSelect, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::PlanFetch(const PlanFetchParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First(
      {scope.status(), Enqueue(cuda::kPlanFetch, params, params.dims, properties_, stream)});
}

absl::Status CudaKernels::AttendSelected(const AttendSelectedParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.queries.q),
             CheckAligned("o_cmp", params.gate.o_cmp), CheckAligned("o_win", params.gate.o_win),
             CheckAligned("o", params.gate.o), CheckAligned("o_slc", params.o_slc)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kAttendSelected, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::AttendWindow(const AttendWindowParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.queries.q), CheckAligned("k", params.k),
             CheckAligned("v", params.v), CheckAligned("o_win", params.o_win)});
  if (!status.ok()) return status;
  cuda::Device device = properties_;
  device.num_sms = std::max(1, device.num_sms - params.sms_to_leave);
  return Enqueue(cuda::kAttendWindow, params, params.dims, device, stream);
}

int64_t CudaKernels::WindowBackwardScratchBytes(const AttentionDims& dims,
                                                const BackwardLimits& limits) const {
  return static_cast<int64_t>(cuda::WindowBackwardScratchBytes(dims, limits));
}

int64_t CudaKernels::SummariesBackwardScratchBytes(const AttentionDims& dims,
                                                   const BackwardLimits& limits) const {
  return static_cast<int64_t>(cuda::SummariesBackwardScratchBytes(dims, limits));
}

absl::Status CudaKernels::AttendWindowBackward(const AttendWindowBackwardParams& params,
                                               void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.queries.q), CheckAligned("k", params.k),
             CheckAligned("v", params.v), CheckAligned("d_o", params.outputs.d_o)});
  if (!status.ok()) return status;
  cuda::Device device = properties_;
  device.num_sms = std::max(1, device.num_sms - params.sms_to_leave);
  return Enqueue(cuda::kAttendWindowBackward, params, params.dims, device, stream);
}

absl::Status CudaKernels::AttendSummariesBackward(const AttendSummariesBackwardParams& params,
                                                  void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.queries.q), CheckAligned("kc", params.kc),
             CheckAligned("vc", params.vc), CheckAligned("d_o", params.outputs.d_o)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kAttendSummariesBackward, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::Zero(void* dst, int64_t num_bytes, void* stream) {
  if (num_bytes == 0) return absl::OkStatus();
  const cuda::ScopedDevice scope(device_);
  return First(
      {scope.status(), NSA_CUDA_STATUS(cudaMemsetAsync(dst, 0, num_bytes, ToStream(stream)))});
}

int64_t CudaKernels::SelectedBackwardScratchBytes(const AttentionDims& dims,
                                                  const BackwardLimits& limits) const {
  return cuda::SelectedBackwardScratchBytes(dims, limits);
}

int64_t CudaKernels::CompressBackwardScratchBytes(const AttentionDims& dims, Compressor compressor,
                                                  int32_t hidden_width, int64_t num_blocks) const {
  return cuda::CompressBackwardScratchBytes(dims, compressor, hidden_width, num_blocks);
}

absl::Status CudaKernels::GateBackward(const GateBackwardParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("d_o", params.d_o), CheckAligned("o_cmp", params.o_cmp),
             CheckAligned("o_slc", params.o_slc), CheckAligned("o_win", params.o_win)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kGateBackward, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::AttendSelectedBackward(const AttendSelectedBackwardParams& params,
                                                 void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status = First({scope.status(), CheckAligned("q", params.queries.q),
                                     CheckAligned("d_o", params.outputs.d_o)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kAttendSelectedBackward, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::CompressBackward(const CompressBackwardParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status = First({scope.status(), CheckAligned("tokens", params.tokens),
                                     CheckAligned("weights", params.weights)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kCompressBackward, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::UnpackGradients(const UnpackGradientsParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First(
      {scope.status(), Enqueue(cuda::kUnpackGradients, params, params.dims, properties_, stream)});
}

absl::Status CudaKernels::PlanReturn(const PlanReturnParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First(
      {scope.status(), Enqueue(cuda::kPlanReturn, params, params.dims, properties_, stream)});
}

absl::Status CudaKernels::AddIndexedRows(const AddIndexedRowsParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First({scope.status(), Enqueue(cuda::kAddIndexedRows, params, properties_, stream)});
}

absl::Status CudaKernels::AddRows(const AddRowsParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First({scope.status(), Enqueue(cuda::kAddRows, params, properties_, stream)});
}

absl::Status CudaKernels::StoreGradient(const StoreGradientParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First({scope.status(), Enqueue(cuda::kStoreGradient, params, properties_, stream)});
}

int64_t CudaKernels::DecodeScratchBytes(const AttentionDims& dims,
                                        const DecodeLimits& limits) const {
  return limits.num_rows * dims.num_kv_heads *
         cuda::MakeDecodeScratch(dims, limits.max_tokens).bytes;
}

absl::Status CudaKernels::AppendTokens(const AppendTokensParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status = First(
      {scope.status(), CheckAligned("slc.k", params.slc.k), CheckAligned("slc.v", params.slc.v),
       CheckAligned("win.k", params.win.k), CheckAligned("win.v", params.win.v),
       CheckAligned("cmp.k", params.cmp.k), CheckAligned("cmp.v", params.cmp.v),
       CheckAligned("weights_k", params.weights_k), CheckAligned("weights_v", params.weights_v)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kAppendTokens, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::DecodeSelect(const DecodeSelectParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.q), CheckAligned("o_cmp", params.o_cmp)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kDecodeSelect, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::DecodeAttend(const DecodeAttendParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.q), CheckAligned("o", params.o),
             CheckAligned("o_slc", params.o_slc), CheckAligned("o_win", params.o_win)});
  if (!status.ok()) return status;
  return Enqueue(cuda::kDecodeAttend, params, params.dims, properties_, stream);
}

absl::Status CudaKernels::CopyPieces(const CopyPiecesParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First({scope.status(), Enqueue(cuda::kCopyPieces, params, properties_, stream)});
}

}  // namespace nsa::kernels
