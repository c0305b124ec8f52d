#include "benchmarks/gpu_rank.h"

#include <cuda_runtime_api.h>

#include <utility>

#include "absl/time/time.h"
#include "benchmarks/gpu_timer.h"
#include "comm/bootstrap/mpi_bootstrap.h"
#include "comm/bootstrap/tcp_bootstrap.h"

namespace nsa::benchmarks {
namespace {

absl::Status RunWith(std::unique_ptr<comm::Bootstrap> bootstrap, comm::NcclOptions options,
                     const std::function<absl::Status(GpuRank rank)>& run) {
  int num_gpus = 0;
  NSA_BENCHMARK_OK(CudaStatus(cudaGetDeviceCount(&num_gpus), "cudaGetDeviceCount"));
  options.device = bootstrap->rank() % num_gpus;
  NSA_BENCHMARK_OK(CudaStatus(cudaSetDevice(options.device), "cudaSetDevice"));
  auto communicator = comm::NcclCommunicator::Create(std::move(bootstrap), options);
  if (!communicator.ok()) return communicator.status();
  return run({options.device, *std::move(communicator)});
}

}  // namespace

absl::Status RunOnGpu(bool under_mpirun, comm::NcclOptions options,
                      const std::function<absl::Status(GpuRank rank)>& run) {
  if (!under_mpirun) {
    comm::TcpBootstrapOptions alone;
    alone.master_addr = "127.0.0.1";
    alone.master_port = 29400;
    auto bootstrap = comm::CreateTcpBootstrap(alone);
    return bootstrap.ok() ? RunWith(*std::move(bootstrap), options, run) : bootstrap.status();
  }
  auto session = comm::MpiSession::Start();
  if (!session.ok()) return session.status();
  auto bootstrap = comm::CreateMpiBootstrap();
  if (!bootstrap.ok()) return bootstrap.status();
  NSA_BENCHMARK_OK(RunWith(*std::move(bootstrap), options, run));
  return (*session)->Finish(absl::Seconds(60));
}

}  // namespace nsa::benchmarks
