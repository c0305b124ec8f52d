// Time for the host to enqueue ahead: what it enqueues behind a held stream runs without gaps, so
// that device events around it see the device's time and not the host's.
#ifndef BENCHMARKS_HOLD_STREAM_H_
#define BENCHMARKS_HOLD_STREAM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace nsa::benchmarks {

// Keeps `stream` busy for that long.
cudaError_t HoldStream(int64_t nanoseconds, cudaStream_t stream);

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_HOLD_STREAM_H_
