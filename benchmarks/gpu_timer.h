// One way to time work on a GPU, for all benchmarks: device events, the L2 flushed before.
#ifndef BENCHMARKS_GPU_TIMER_H_
#define BENCHMARKS_GPU_TIMER_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "comm/communicator.h"

#define NSA_BENCHMARK_OK(expression)                                        \
  do {                                                                      \
    if (absl::Status _status = (expression); !_status.ok()) return _status; \
  } while (false)

namespace nsa::benchmarks {

// OK, or Internal with `what` failed and why.
absl::Status CudaStatus(cudaError_t error, absl::string_view what);

class GpuTimer {
 public:
  // Larger than the L2 of any GPU that the kernels are built for.
  static constexpr int64_t kFlushBytes = int64_t{256} << 20;

  // On the current device.
  static absl::StatusOr<std::unique_ptr<GpuTimer>> Create();
  ~GpuTimer();
  GpuTimer(const GpuTimer&) = delete;
  GpuTimer& operator=(const GpuTimer&) = delete;

  // Milliseconds between an event before `work` and one after, on stream(); what `prepare` enqueues
  // or waits for comes between the flush, if any, and the first event.
  absl::StatusOr<double> Time(absl::FunctionRef<absl::Status()> prepare,
                              absl::FunctionRef<absl::Status()> work, bool flush = true);

  cudaStream_t stream() const { return stream_; }

 private:
  GpuTimer() = default;

  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
  void* flush_ = nullptr;
};

struct Spread {
  double median, min, max;
};
// Of at least one value.
Spread SpreadOf(std::vector<double> values);

// Collective: the largest of the ranks' values.
absl::StatusOr<double> LargestOfRanks(comm::Communicator& communicator, double mine);

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_GPU_TIMER_H_
