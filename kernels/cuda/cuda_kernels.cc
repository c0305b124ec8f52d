#include "kernels/cuda/cuda_kernels.h"

#include <cuda_runtime_api.h>
#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <initializer_list>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/record_layout.h"
#include "kernels/cuda/score_select.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/stream_order.h"
#include "kernels/cuda/supports.h"

namespace nsa::kernels {
namespace {

using cuda::CheckAligned;

constexpr int kMajorArchitecture = 9;  // the only one that the kernels are compiled for

cudaStream_t ToStream(void* stream) { return static_cast<cudaStream_t>(stream); }

// The first that is not OK.
absl::Status First(std::initializer_list<absl::Status> statuses) {
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
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
  if (*major != kMajorArchitecture) {
    return absl::InvalidArgumentError(absl::StrCat("device = ", device, ": compute capability ",
                                                   *major, ".x, the CUDA kernels need ",
                                                   kMajorArchitecture, ".x"));
  }
  const auto num_sms = Attribute(cudaDevAttrMultiProcessorCount, device);
  if (!num_sms.ok()) return num_sms.status();
  const auto shared_bytes = Attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!shared_bytes.ok()) return shared_bytes.status();
  return absl::WrapUnique(new CudaKernels(device, {*num_sms, *shared_bytes}));
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
  return NSA_CUDA_STATUS(cuda::LaunchCopyRows(params, properties_, ToStream(stream)));
}

absl::Status CudaKernels::Compress(const CompressParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("tokens", params.tokens),
             CheckAligned("weights", params.weights), CheckAligned("summaries", params.summaries)});
  if (!status.ok()) return status;
  const bool has_matrix =
      params.compressor == Compressor::kLinear || params.compressor == Compressor::kMlp;
  return has_matrix
             ? NSA_CUDA_STATUS(cuda::LaunchCompressMatrix(params, properties_, ToStream(stream)))
             : NSA_CUDA_STATUS(cuda::LaunchCompressSum(params, properties_, ToStream(stream)));
}

absl::Status CudaKernels::PackBlocks(const PackBlocksParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("k", params.k), CheckAligned("v", params.v)});
  if (!status.ok()) return status;
  return NSA_CUDA_STATUS(cuda::LaunchPackBlocks(params, ToStream(stream)));
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
  return NSA_CUDA_STATUS(cuda::LaunchScoreAndSelect(params, properties_.num_sms, ToStream(stream)));
}

absl::Status CudaKernels::PlanFetch(const PlanFetchParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  return First({scope.status(),
                NSA_CUDA_STATUS(cuda::LaunchPlanFetch(params, properties_, ToStream(stream)))});
}

absl::Status CudaKernels::AttendSelected(const AttendSelectedParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.queries.q),
             CheckAligned("o_cmp", params.gate.o_cmp), CheckAligned("o_win", params.gate.o_win),
             CheckAligned("o", params.gate.o), CheckAligned("o_slc", params.o_slc)});
  if (!status.ok()) return status;
  return cuda::HasFastAttendSelected(params.dims) ? NSA_CUDA_STATUS(cuda::LaunchAttendSelectedFast(
                                                        params, properties_, ToStream(stream)))
                                                  : NSA_CUDA_STATUS(cuda::LaunchAttendSelectedAny(
                                                        params, properties_, ToStream(stream)));
}

absl::Status CudaKernels::AttendWindow(const AttendWindowParams& params, void* stream) {
  const cuda::ScopedDevice scope(device_);
  const absl::Status status =
      First({scope.status(), CheckAligned("q", params.queries.q), CheckAligned("k", params.k),
             CheckAligned("v", params.v), CheckAligned("o_win", params.o_win)});
  if (!status.ok()) return status;
  cuda::Device device = properties_;
  device.num_sms = std::max(1, device.num_sms - params.sms_to_leave);
  return cuda::HasFastAttendWindow(params.dims)
             ? NSA_CUDA_STATUS(cuda::LaunchAttendWindowFast(params, device, ToStream(stream)))
             : NSA_CUDA_STATUS(cuda::LaunchAttendWindowAny(params, ToStream(stream)));
}

}  // namespace nsa::kernels
