// Groups of processes on this host, each with a GPU, for tests and measurements.
#ifndef COMM_NCCL_TEST_GROUP_H_
#define COMM_NCCL_TEST_GROUP_H_

#include <cuda_runtime_api.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/communicator.h"
#include "comm/cuda_status.h"
#include "comm/nccl/nccl_communicator.h"

namespace nsa::comm::nccl {

// Collective: the communicator `group` of the processes that meet at `port`. The rank's GPU, as
// conformance::GpuOfRank says, becomes current.
absl::StatusOr<std::unique_ptr<Communicator>> CreateOnThisHost(const std::string& group, int rank,
                                                               int size, int port,
                                                               NcclOptions options);

// `comm`, made by CreateOnThisHost for `rank`, for host memory.
absl::StatusOr<std::unique_ptr<Communicator>> HostView(std::unique_ptr<Communicator> comm);

// A copy of `values` in device memory.
template <typename T>
absl::StatusOr<DevicePtr<T>> ToDevice(const std::vector<T>& values) {
  absl::StatusOr<DevicePtr<T>> device = AllocateDevice<T>(values.size());
  if (!device.ok()) return device.status();
  NSA_COMM_CUDA_OK(
      cudaMemcpy(device->get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return device;
}

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_TEST_GROUP_H_
