#include "tools/launch/launch.h"

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/bootstrap/bootstrap.h"
#include "comm/bootstrap/mpi_bootstrap.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/loopback/loopback.h"
#include "tools/launch/device.h"

namespace nsa::tools {
namespace {

constexpr int kMaxThreads = 4096;

using RankFunction = std::function<absl::Status(const RankContext&)>;

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

RankContext MakeContext(const Device& device, std::shared_ptr<comm::Communicator> communicator,
                        std::shared_ptr<kernels::Kernels> kernels) {
  return {.communicator = std::move(communicator),
          .kernels = std::move(kernels),
          .device = device.kind(),
          .device_name = device.name(),
          .alone = nullptr};
}

absl::StatusOr<RankContext> MakeAlone(Device device, std::shared_ptr<kernels::Kernels> kernels,
                                      const LaunchOptions& options) {
  auto communicator = device.ConnectAlone(options.timeout);
  if (!communicator.ok()) return communicator.status();
  if (device.gpus == nullptr) {
    device.num_threads = ThreadsPerRank(options.num_threads, /*num_ranks_on_host=*/1);
    auto on_all_cores = device.CreateKernels();
    if (!on_all_cores.ok()) return on_all_cores.status();
    kernels = *std::move(on_all_cores);
  }
  return MakeContext(device, *std::move(communicator), std::move(kernels));
}

// A rank that gives up must not leave the others to their deadlines.
absl::Status RunRank(const Device& device, std::shared_ptr<comm::Communicator> communicator,
                     std::shared_ptr<kernels::Kernels> kernels, const LaunchOptions& options,
                     const RankFunction& function) {
  RankContext context = MakeContext(device, communicator, kernels);
  context.alone = [&] { return MakeAlone(device, kernels, options); };
  absl::Status status = function(context);
  if (!status.ok() && communicator->HealthCheck().ok()) communicator->Abort(status.ToString());
  return status;
}

// The error that explains the others: of the rank that failed, not of those that heard of it.
absl::Status RootCause(const std::vector<absl::Status>& statuses) {
  absl::Status cause;
  for (const absl::Status& status : statuses) {
    const bool hearsay = absl::IsAborted(status) || absl::IsUnavailable(status);
    if (!status.ok() && !hearsay) return status;
    if (cause.ok()) cause = status;
  }
  return cause;
}

absl::Status RunThreads(const LaunchOptions& options, const RankFunction& function) {
  const int num_ranks = std::max(options.num_ranks, 1);
  const Device device = {.gpus = nullptr,
                         .num_threads = ThreadsPerRank(options.num_threads, num_ranks)};
  absl::StatusOr<std::vector<std::unique_ptr<comm::Communicator>>> communicators =
      comm::LoopbackGroup::Create(num_ranks, {.timeout = options.timeout});
  if (!communicators.ok()) return communicators.status();
  std::vector<std::shared_ptr<kernels::Kernels>> kernels;
  for (int rank = 0; rank < num_ranks; ++rank) {
    auto created = device.CreateKernels();
    if (!created.ok()) return created.status();
    kernels.push_back(*std::move(created));
  }
  std::vector<absl::Status> statuses(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      statuses[rank] = RunRank(device, std::move((*communicators)[rank]), std::move(kernels[rank]),
                               options, function);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return RootCause(statuses);
}

// InvalidArgument when `options` and `place` contradict each other.
absl::Status CheckOptions(const LaunchOptions& options, const ProcessPlace& place) {
  const std::string& backend = options.backend;
  const std::string& device = options.device;
  if (backend != "auto" && backend != "loopback" && backend != "ucx" && backend != "nccl") {
    return Invalid("backend = \"", backend, "\": must be auto, loopback, ucx or nccl");
  }
  if (device != "auto" && device != "cpu" && device != "cuda") {
    return Invalid("device = \"", device, "\": must be auto, cpu or cuda");
  }
  if (backend == "nccl" && device == "cpu") {
    return Invalid(
        "backend = \"nccl\": moves GPUs' memory; with device = \"cpu\" it must be auto, ",
        "loopback or ucx");
  }
  if ((backend == "loopback" || backend == "ucx") && device == "cuda") {
    return Invalid("backend = \"", backend,
                   "\": moves the host's memory; with device = \"cuda\" it ",
                   "must be auto or nccl");
  }
  if (options.num_ranks < 0) {
    return Invalid("ranks = ", options.num_ranks, ": must be 0 or more");
  }
  if (options.num_threads < 0 || options.num_threads > kMaxThreads) {
    return Invalid("threads = ", options.num_threads, ": must lie in [0, ", kMaxThreads, "]");
  }
  if (place.origin == Origin::kThreads) {
    if (backend == "ucx") {
      return Invalid("backend = \"ucx\": must be started by mpirun, or with RANK, WORLD_SIZE, ",
                     "MASTER_ADDR and MASTER_PORT in the environment as torchrun sets them");
    }
    if (options.num_ranks > 1 && (device == "cuda" || backend == "nccl")) {
      return Invalid("ranks = ", options.num_ranks,
                     ": must be 0 or 1 on GPUs, where each rank is a ",
                     "process; mpirun or torchrun start several");
    }
    if (options.num_ranks > kMaxThreads) {
      return Invalid("ranks = ", options.num_ranks, ": must lie in [0, ", kMaxThreads,
                     "] where they are threads of one process");
    }
    return absl::OkStatus();
  }
  if (backend == "loopback") {
    if (place.size == 1) return absl::OkStatus();
    return Invalid("backend = \"loopback\": makes all ranks in one process, but this is one of ",
                   place.size, " processes");
  }
  if (options.num_ranks != 0 && options.num_ranks != place.size) {
    return Invalid("ranks = ", options.num_ranks, ": must be 0 or the number of processes, ",
                   place.size);
  }
  return absl::OkStatus();
}

// For a rank at `place`. InvalidArgument when what is asked for is not there.
absl::StatusOr<Device> ChooseDevice(const LaunchOptions& options, const ProcessPlace& place) {
  const Device cpu = {.gpus = nullptr,
                      .num_threads = ThreadsPerRank(options.num_threads, place.num_ranks_on_host)};
  const std::string& backend = options.backend;
  const bool several_threads = place.origin == Origin::kThreads && options.num_ranks > 1;
  if (options.device == "cpu" || backend == "loopback" || backend == "ucx" || several_threads) {
    return cpu;
  }
  absl::StatusOr<std::shared_ptr<Gpus>> gpus = absl::NotFoundError("this program uses no GPUs");
  if (options.find_gpus != nullptr) gpus = options.find_gpus();
  if (!gpus.ok()) {
    if (options.device == "cuda") {
      return Invalid("device = \"cuda\": must be auto or cpu, as ", gpus.status().message());
    }
    if (backend == "nccl") {
      return Invalid("backend = \"nccl\": must be auto, loopback or ucx, as ",
                     gpus.status().message());
    }
    return cpu;
  }
  const bool enough = place.num_ranks_on_host <= (*gpus)->count();
  // A launcher may show each process a GPU of its own; that they differ AgreeOnDevice finds out.
  if (!enough && (*gpus)->count() != 1) {
    return Invalid("device = \"", options.device, "\": there are ", place.num_ranks_on_host,
                   " ranks on this host and ", (*gpus)->count(),
                   " GPUs; must be cpu, or ranks at most as many as GPUs");
  }
  const int gpu = enough ? place.local_rank : 0;
  absl::StatusOr<std::string> uuid = (*gpus)->UuidOf(gpu);
  if (!uuid.ok()) return uuid.status();
  return Device{.gpus = *std::move(gpus), .gpu = gpu, .gpu_uuid = *std::move(uuid)};
}

// This process as one rank of those that `bootstrap` brings together.
absl::Status RunProcess(absl::StatusOr<std::unique_ptr<comm::Bootstrap>> bootstrap,
                        const absl::StatusOr<Device>& device, const LaunchOptions& options,
                        const RankFunction& function) {
  if (!bootstrap.ok()) return bootstrap.status();
  auto kernels = device.ok() ? device->CreateKernels() : device.status();
  absl::Status agreed = AgreeOnDevice(kernels.status(), device.ok() ? *device : Device(),
                                      **bootstrap, options.device, options.timeout);
  if (!agreed.ok()) return agreed;
  auto communicator = device->Connect(*std::move(bootstrap), options.timeout);
  if (!communicator.ok()) return communicator.status();
  return RunRank(*device, *std::move(communicator), *std::move(kernels), options, function);
}

absl::Status RunUnderMpi(const ProcessPlace& place, const LaunchOptions& options,
                         const RankFunction& function) {
  absl::StatusOr<std::unique_ptr<comm::MpiSession>> session = comm::MpiSession::Start();
  if (!session.ok()) return session.status();
  absl::Status status = RunProcess(comm::CreateMpiBootstrap({.timeout = options.timeout}),
                                   ChooseDevice(options, place), options, function);
  return status.ok() ? (*session)->Finish(options.timeout) : status;
}

absl::Status RunAfterRendezvous(const Environment& environment, const ProcessPlace& place,
                                const LaunchOptions& options, const RankFunction& function) {
  absl::StatusOr<comm::TcpBootstrapOptions> tcp = comm::TcpBootstrapOptionsFrom(environment);
  if (!tcp.ok()) return tcp.status();
  tcp->timeout = options.timeout;
  return RunProcess(comm::CreateTcpBootstrap(*tcp), ChooseDevice(options, place), options,
                    function);
}

// All ranks in this process, or the only one on a GPU.
absl::Status RunHere(const LaunchOptions& options, const RankFunction& function) {
  const absl::StatusOr<Device> device = ChooseDevice(options, ProcessPlace());
  if (!device.ok()) return device.status();
  if (device->gpus == nullptr) return RunThreads(options, function);
  auto kernels = device->CreateKernels();
  if (!kernels.ok()) return kernels.status();
  auto communicator = device->ConnectAlone(options.timeout);
  if (!communicator.ok()) return communicator.status();
  return RunRank(*device, *std::move(communicator), *std::move(kernels), options, function);
}

}  // namespace

absl::Status RankContext::Wait() const {
  const absl::Status status = kernels->Synchronize(/*stream=*/nullptr);
  const absl::Status health = communicator->HealthCheck();
  return health.ok() ? status : health;
}

absl::Status RunRanks(const LaunchOptions& options, const Environment& environment,
                      const RankFunction& function) {
  absl::StatusOr<ProcessPlace> place = FindProcessPlace(environment);
  if (!place.ok()) return place.status();
  if (absl::Status status = CheckOptions(options, *place); !status.ok()) return status;
  const Origin origin = options.backend == "loopback" ? Origin::kThreads : place->origin;
  switch (origin) {
    case Origin::kThreads:
      return RunHere(options, function);
    case Origin::kMpi:
      return RunUnderMpi(*place, options, function);
    case Origin::kRendezvous:
      return RunAfterRendezvous(environment, *place, options, function);
  }
  return absl::InternalError("unknown origin of ranks");
}

}  // namespace nsa::tools
