// Run by mpirun: every rank gathers by an MPI-made Bootstrap, then sees rank 1 leave.
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "comm/bootstrap/mpi_bootstrap.h"

namespace nsa::comm {
namespace {

// Rank 0 cannot open a socket: the others hear of it, and do not wait for it.
absl::Status ExpectRankZeroFails(int rank) {
  rlimit limit = {};
  getrlimit(RLIMIT_NOFILE, &limit);
  if (rank == 0) {
    const int next = open("/dev/null", O_RDONLY);
    close(next);
    const rlimit none = {static_cast<rlim_t>(next), limit.rlim_max};
    setrlimit(RLIMIT_NOFILE, &none);
  }
  const absl::Time start = absl::Now();
  const absl::Status status = CreateMpiBootstrap({absl::Seconds(20)}).status();
  setrlimit(RLIMIT_NOFILE, &limit);
  if (!absl::IsUnavailable(status) || !absl::StrContains(status.message(), "Too many open files") ||
      absl::StrContains(status.message(), "rank 0") != (rank != 0)) {
    return absl::InternalError(absl::StrCat("rank 0 without sockets: ", status.ToString()));
  }
  if (absl::Now() - start > absl::Seconds(10)) return absl::InternalError("not at once");
  return absl::OkStatus();
}

absl::Status RunRank() {
  if (!absl::IsFailedPrecondition(CreateMpiBootstrap().status())) {
    return absl::InternalError("a bootstrap without MPI");
  }
  auto session = MpiSession::Start();
  if (!session.ok()) return session.status();
  if (MpiSession::Start().ok()) return absl::InternalError("two sessions");
  for (int round = 0; round < 3; ++round) {
    auto bootstrap = CreateMpiBootstrap({absl::Seconds(20)});
    if (!bootstrap.ok()) return bootstrap.status();
    if ((*bootstrap)->rank() != (*session)->rank() || (*bootstrap)->size() != (*session)->size()) {
      return absl::InternalError("rank or size");
    }
    auto all =
        (*bootstrap)
            ->AllGather(absl::StrCat("rank ", (*session)->rank()), absl::Seconds(10), "test");
    if (!all.ok()) return all.status();
    for (int rank = 0; rank < (*session)->size(); ++rank) {
      if ((*all)[rank] != absl::StrCat("rank ", rank)) return absl::InternalError((*all)[rank]);
    }
  }
  if (absl::Status s = ExpectRankZeroFails((*session)->rank()); !s.ok()) return s;
  if (auto after = CreateMpiBootstrap({absl::Seconds(20)}); !after.ok()) return after.status();
  // A timeout must be positive.
  if (auto bad = CreateMpiBootstrap({absl::ZeroDuration()}); bad.ok()) {
    return absl::InternalError("a timeout of 0");
  }
  return (*session)->Finish(absl::Seconds(20));
}

}  // namespace
}  // namespace nsa::comm

int main() {
  const absl::Status status = nsa::comm::RunRank();
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return 1;
}
