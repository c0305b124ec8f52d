#include "comm/nccl/test_group.h"

#include <cuda_runtime_api.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

#include "absl/time/time.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/nccl/cuda_status.h"

namespace nsa::comm::nccl {

int CountGpus() {
  const pid_t child = fork();
  if (child == 0) {
    int count = 0;
    _exit(cudaGetDeviceCount(&count) == cudaSuccess ? std::min(count, 100) : 0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return 0;
  return WEXITSTATUS(status);
}

absl::StatusOr<std::unique_ptr<Communicator>> CreateOnThisHost(const std::string& group, int rank,
                                                               int size, int port,
                                                               NcclOptions options) {
  NSA_NCCL_CUDA_OK(cudaSetDevice(rank));
  TcpBootstrapOptions meeting;
  meeting.rank = rank;
  meeting.world_size = size;
  meeting.master_addr = "127.0.0.1";
  meeting.master_port = port;
  meeting.timeout = absl::Seconds(30);
  meeting.group = group;
  auto bootstrap = CreateTcpBootstrap(meeting);
  if (!bootstrap.ok()) return bootstrap.status();
  options.device = rank;
  return NcclCommunicator::Create(*std::move(bootstrap), options);
}

}  // namespace nsa::comm::nccl
