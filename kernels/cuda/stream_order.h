// Streams and events of one GPU, also while a graph is captured.
#ifndef KERNELS_CUDA_STREAM_ORDER_H_
#define KERNELS_CUDA_STREAM_ORDER_H_

#include <cuda_runtime_api.h>

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cuda {

// The calls of Kernels of the same names; the calling thread's device is that of the stream.
absl::StatusOr<std::unique_ptr<Stream>> CreateStream(int device);
absl::StatusOr<std::unique_ptr<Event>> CreateEvent(int device, EventUse use);
absl::Status Record(Event& event, cudaStream_t stream);
absl::Status WaitFor(Event& event, cudaStream_t stream);
absl::StatusOr<bool> IsCapturing(cudaStream_t stream);
absl::StatusOr<double> SecondsBetween(Event& begin, Event& end);

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_STREAM_ORDER_H_
