#include "comm/nccl/test_group.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/time/time.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/conformance/gpus.h"
#include "comm/conformance/host_view.h"
#include "comm/cuda_memory.h"
#include "comm/cuda_status.h"

namespace nsa::comm::nccl {

absl::StatusOr<std::unique_ptr<Communicator>> CreateOnThisHost(const std::string& group, int rank,
                                                               int size, int port,
                                                               NcclOptions options) {
  const int device = conformance::GpuOfRank(rank);
  NSA_COMM_CUDA_OK(cudaSetDevice(device));
  TcpBootstrapOptions meeting;
  meeting.rank = rank;
  meeting.world_size = size;
  meeting.master_addr = "127.0.0.1";
  meeting.master_port = port;
  meeting.timeout = absl::Seconds(30);
  meeting.group = group;
  auto bootstrap = CreateTcpBootstrap(meeting);
  if (!bootstrap.ok()) return bootstrap.status();
  options.device = device;
  return NcclCommunicator::Create(*std::move(bootstrap), options);
}

absl::StatusOr<std::unique_ptr<Communicator>> HostView(std::unique_ptr<Communicator> comm) {
  auto memory = CreateCudaMemory(conformance::GpuOfRank(comm->rank()));
  if (!memory.ok()) return memory.status();
  return conformance::MakeHostView(std::move(comm), *std::move(memory), [](Window& window) {
    return static_cast<DeviceWindow&>(window).TakeListError();
  });
}

}  // namespace nsa::comm::nccl
