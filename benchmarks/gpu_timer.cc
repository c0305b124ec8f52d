#include "benchmarks/gpu_timer.h"

#include <algorithm>
#include <string>

#include "absl/memory/memory.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace nsa::benchmarks {

absl::Status CudaStatus(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

absl::StatusOr<std::unique_ptr<GpuTimer>> GpuTimer::Create() {
  auto timer = absl::WrapUnique(new GpuTimer());
  NSA_BENCHMARK_OK(CudaStatus(cudaStreamCreateWithFlags(&timer->stream_, cudaStreamNonBlocking),
                              "cudaStreamCreateWithFlags"));
  NSA_BENCHMARK_OK(CudaStatus(cudaEventCreate(&timer->begin_), "cudaEventCreate"));
  NSA_BENCHMARK_OK(CudaStatus(cudaEventCreate(&timer->end_), "cudaEventCreate"));
  NSA_BENCHMARK_OK(CudaStatus(cudaMalloc(&timer->flush_, kFlushBytes), "cudaMalloc"));
  return timer;
}

GpuTimer::~GpuTimer() {
  if (flush_ != nullptr) (void)cudaFree(flush_);
  if (end_ != nullptr) (void)cudaEventDestroy(end_);
  if (begin_ != nullptr) (void)cudaEventDestroy(begin_);
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

absl::StatusOr<double> GpuTimer::Time(absl::FunctionRef<absl::Status()> prepare,
                                      absl::FunctionRef<absl::Status()> work, bool flush) {
  if (flush) {
    NSA_BENCHMARK_OK(CudaStatus(cudaMemsetAsync(flush_, 0, kFlushBytes, stream_), "flush the L2"));
  }
  NSA_BENCHMARK_OK(prepare());
  NSA_BENCHMARK_OK(CudaStatus(cudaEventRecord(begin_, stream_), "cudaEventRecord"));
  NSA_BENCHMARK_OK(work());
  NSA_BENCHMARK_OK(CudaStatus(cudaEventRecord(end_, stream_), "cudaEventRecord"));
  NSA_BENCHMARK_OK(CudaStatus(cudaStreamSynchronize(stream_), "the timed work"));
  float milliseconds = 0;
  NSA_BENCHMARK_OK(
      CudaStatus(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime"));
  return milliseconds;
}

Spread SpreadOf(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  const double median =
      values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
  return {median, values.front(), values.back()};
}

absl::StatusOr<double> LargestOfRanks(comm::Communicator& communicator, double mine) {
  auto all = communicator.HostAllGather(absl::StrCat(mine));
  if (!all.ok()) return all.status();
  double largest = mine;
  for (const std::string& one : *all) {
    double value = 0;
    if (!absl::SimpleAtod(one, &value)) {
      return absl::InternalError(absl::StrCat("a rank sent \"", one, "\", which is no number"));
    }
    largest = std::max(largest, value);
  }
  return largest;
}

}  // namespace nsa::benchmarks
