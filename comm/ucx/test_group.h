// Groups of processes on this host, for tests and measurements.
#ifndef COMM_UCX_TEST_GROUP_H_
#define COMM_UCX_TEST_GROUP_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/communicator.h"
#include "comm/ucx/ucx_communicator.h"

namespace nsa::comm::ucx {

struct Transport {
  std::string name;
  std::string tls;
};

inline std::vector<Transport> Transports() {
  return {{"SharedMemory", "sm,tcp,self"}, {"Tcp", "tcp,self"}};
}

// Collective: communicator number `group` of the processes that meet at `port`.
inline absl::StatusOr<std::unique_ptr<Communicator>> CreateOnThisHost(const Transport& transport,
                                                                      int rank, int size, int port,
                                                                      int group,
                                                                      absl::Duration timeout) {
  TcpBootstrapOptions meeting;
  meeting.rank = rank;
  meeting.world_size = size;
  meeting.master_addr = "127.0.0.1";
  meeting.master_port = port;
  meeting.timeout = absl::Seconds(30);
  meeting.group = absl::StrCat(group);
  auto bootstrap = CreateTcpBootstrap(meeting);
  if (!bootstrap.ok()) return bootstrap.status();
  UcxOptions options;
  options.timeout = timeout;
  options.tls = transport.tls;
  return UcxCommunicator::Create(*std::move(bootstrap), options);
}

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_TEST_GROUP_H_
