#include "tools/launch/launch.h"

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "comm/bootstrap/bootstrap.h"
#include "comm/bootstrap/mpi_bootstrap.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/loopback/loopback.h"
#include "comm/ucx/ucx_communicator.h"

namespace nsa::tools {
namespace {

using RankFunction = std::function<absl::Status(const RankContext&)>;

// A rank that gives up must not leave the others to their deadlines.
absl::Status RunRank(const RankContext& context, const RankFunction& function) {
  absl::Status status = function(context);
  if (!status.ok() && context.communicator->HealthCheck().ok()) {
    context.communicator->Abort(status.ToString());
  }
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

absl::Status RunThreads(int num_ranks, absl::Duration timeout, const RankFunction& function) {
  absl::StatusOr<std::vector<std::unique_ptr<comm::Communicator>>> communicators =
      comm::LoopbackGroup::Create(num_ranks, {.timeout = timeout});
  if (!communicators.ok()) return communicators.status();
  std::vector<absl::Status> statuses(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      statuses[rank] = RunRank(
          {.communicator = std::move((*communicators)[rank]), .num_ranks_on_host = num_ranks},
          function);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return RootCause(statuses);
}

// This process as one rank of those that `bootstrap` brings together.
absl::Status RunProcess(absl::StatusOr<std::unique_ptr<comm::Bootstrap>> bootstrap,
                        int num_ranks_on_host, absl::Duration timeout,
                        const RankFunction& function) {
  if (!bootstrap.ok()) return bootstrap.status();
  comm::UcxOptions options;
  options.timeout = timeout;
  options.connect_timeout = timeout;
  absl::StatusOr<std::unique_ptr<comm::Communicator>> communicator =
      comm::UcxCommunicator::Create(*std::move(bootstrap), options);
  if (!communicator.ok()) return communicator.status();
  return RunRank({.communicator = *std::move(communicator), .num_ranks_on_host = num_ranks_on_host},
                 function);
}

absl::Status RunUnderMpi(int num_ranks_on_host, absl::Duration timeout,
                         const RankFunction& function) {
  absl::StatusOr<std::unique_ptr<comm::MpiSession>> session = comm::MpiSession::Start();
  if (!session.ok()) return session.status();
  absl::Status status = RunProcess(comm::CreateMpiBootstrap({.timeout = timeout}),
                                   num_ranks_on_host, timeout, function);
  return status.ok() ? (*session)->Finish(timeout) : status;
}

absl::Status RunAfterRendezvous(const Environment& environment, int num_ranks_on_host,
                                absl::Duration timeout, const RankFunction& function) {
  absl::StatusOr<comm::TcpBootstrapOptions> options = comm::TcpBootstrapOptionsFrom(environment);
  if (!options.ok()) return options.status();
  options->timeout = timeout;
  return RunProcess(comm::CreateTcpBootstrap(*options), num_ranks_on_host, timeout, function);
}

// InvalidArgument when what is asked for is not what `place` is.
absl::Status CheckOptions(const LaunchOptions& options, const ProcessPlace& place) {
  const std::string& backend = options.backend;
  if (backend != "auto" && backend != "loopback" && backend != "ucx") {
    return absl::InvalidArgumentError(
        absl::StrCat("backend = \"", backend, "\": must be auto, loopback or ucx"));
  }
  if (options.num_ranks < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("ranks = ", options.num_ranks, ": must be 0 or more"));
  }
  if (backend == "ucx" && place.origin == Origin::kThreads) {
    return absl::InvalidArgumentError(
        "backend = \"ucx\": must be started by mpirun, or with RANK, WORLD_SIZE, MASTER_ADDR and "
        "MASTER_PORT in the environment as torchrun sets them");
  }
  if (backend == "loopback" && place.size > 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("backend = \"loopback\": makes all ranks in one process, but this is one of ",
                     place.size, " processes"));
  }
  if (backend != "loopback" && place.origin != Origin::kThreads && options.num_ranks != 0 &&
      options.num_ranks != place.size) {
    return absl::InvalidArgumentError(absl::StrCat(
        "ranks = ", options.num_ranks, ": must be 0 or the number of processes, ", place.size));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status RunRanks(const LaunchOptions& options, const Environment& environment,
                      const RankFunction& function) {
  absl::StatusOr<ProcessPlace> place = FindProcessPlace(environment);
  if (!place.ok()) return place.status();
  if (absl::Status status = CheckOptions(options, *place); !status.ok()) return status;
  const Origin origin = options.backend == "loopback" ? Origin::kThreads : place->origin;
  switch (origin) {
    case Origin::kThreads:
      return RunThreads(std::max(options.num_ranks, 1), options.timeout, function);
    case Origin::kMpi:
      return RunUnderMpi(place->num_ranks_on_host, options.timeout, function);
    case Origin::kRendezvous:
      return RunAfterRendezvous(environment, place->num_ranks_on_host, options.timeout, function);
  }
  return absl::InternalError("unknown origin of ranks");
}

int ThreadsPerRank(int requested, int num_ranks_on_host) {
  if (requested > 0) return requested;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, cores / std::max(1, num_ranks_on_host));
}

}  // namespace nsa::tools
