// Ranks as processes of this host that talk through UCX.
#ifndef TESTS_TESTING_UCX_RANKS_H_
#define TESTS_TESTING_UCX_RANKS_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "comm/communicator.h"

namespace nsa::test {

struct UcxRanksOptions {
  absl::Duration timeout = absl::Seconds(30);
  std::string tls = "";  // UCX_TLS; empty leaves it to UCX
};

// In process `rank` of `size`: its communicator, met at `port` of this host.
absl::StatusOr<std::unique_ptr<comm::Communicator>> MakeUcxRank(int rank, int size, int port,
                                                                const UcxRanksOptions& options);

}  // namespace nsa::test

#endif  // TESTS_TESTING_UCX_RANKS_H_
