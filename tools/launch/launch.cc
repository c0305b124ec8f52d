#include "tools/launch/launch.h"

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "comm/loopback/loopback.h"

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

}  // namespace

absl::Status RunRanks(const LaunchOptions& options, const Environment& environment,
                      const RankFunction& function) {
  if (options.backend != "auto" && options.backend != "loopback") {
    return absl::InvalidArgumentError(
        absl::StrCat("backend = \"", options.backend, "\": must be auto or loopback"));
  }
  if (options.num_ranks < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("ranks = ", options.num_ranks, ": must be 0 or more"));
  }
  absl::StatusOr<ProcessPlace> place = FindProcessPlace(environment);
  if (!place.ok()) return place.status();
  return RunThreads(std::max(options.num_ranks, 1), options.timeout, function);
}

int ThreadsPerRank(int requested, int num_ranks_on_host) {
  if (requested > 0) return requested;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, cores / std::max(1, num_ranks_on_host));
}

}  // namespace nsa::tools
