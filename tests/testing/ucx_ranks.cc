#include "tests/testing/ucx_ranks.h"

#include <utility>

#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/ucx/ucx_communicator.h"

namespace nsa::test {

absl::StatusOr<std::unique_ptr<comm::Communicator>> MakeUcxRank(int rank, int size, int port,
                                                                const UcxRanksOptions& options) {
  comm::TcpBootstrapOptions bootstrap_options;
  bootstrap_options.rank = rank;
  bootstrap_options.world_size = size;
  bootstrap_options.master_addr = "127.0.0.1";
  bootstrap_options.master_port = port;
  bootstrap_options.port_offset = 0;
  bootstrap_options.timeout = absl::Seconds(30);
  auto bootstrap = comm::CreateTcpBootstrap(bootstrap_options);
  if (!bootstrap.ok()) return bootstrap.status();
  comm::UcxOptions ucx_options;
  ucx_options.timeout = options.timeout;
  ucx_options.tls = options.tls;
  return comm::UcxCommunicator::Create(*std::move(bootstrap), ucx_options);
}

}  // namespace nsa::test
