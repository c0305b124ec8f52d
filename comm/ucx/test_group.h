// Groups of processes on this host, for tests and measurements.
#ifndef COMM_UCX_TEST_GROUP_H_
#define COMM_UCX_TEST_GROUP_H_

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/communicator.h"
#include "comm/conformance/host_view.h"
#include "comm/device_memory.h"
#include "comm/ucx/ucx_communicator.h"

namespace nsa::comm::ucx {

struct Transport {
  std::string name;
  std::string tls;
  // Makes a rank's device memory; null: its buffers lie in host memory.
  std::function<absl::StatusOr<std::shared_ptr<DeviceMemory>>(int rank)> memory = nullptr;
};

inline std::vector<Transport> Transports() {
  return {{"SharedMemory", "sm,tcp,self"}, {"Tcp", "tcp,self"}};
}

// Collective: the communicator `group` of the processes that meet at `port`, for host memory in any
// case.
inline absl::StatusOr<std::unique_ptr<Communicator>> CreateOnThisHost(const Transport& transport,
                                                                      int rank, int size, int port,
                                                                      absl::AlphaNum group,
                                                                      absl::Duration timeout) {
  TcpBootstrapOptions meeting;
  meeting.rank = rank;
  meeting.world_size = size;
  meeting.master_addr = "127.0.0.1";
  meeting.master_port = port;
  meeting.timeout = absl::Seconds(30);
  meeting.group = std::string(group.Piece());
  auto bootstrap = CreateTcpBootstrap(meeting);
  if (!bootstrap.ok()) return bootstrap.status();
  UcxOptions options;
  options.timeout = timeout;
  options.tls = transport.tls;
  if (transport.memory == nullptr) return UcxCommunicator::Create(*std::move(bootstrap), options);
  auto memory = transport.memory(rank);
  if (!memory.ok()) return memory.status();
  options.device_memory = *memory;
  auto comm = UcxCommunicator::Create(*std::move(bootstrap), options);
  if (!comm.ok()) return comm.status();
  return conformance::MakeHostView(*std::move(comm), *std::move(memory));
}

}  // namespace nsa::comm::ucx

#endif  // COMM_UCX_TEST_GROUP_H_
