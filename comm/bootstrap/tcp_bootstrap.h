// Rendezvous over TCP, with the meaning that torchrun gives to rank, world size, master address and
// master port.
#ifndef COMM_BOOTSTRAP_TCP_BOOTSTRAP_H_
#define COMM_BOOTSTRAP_TCP_BOOTSTRAP_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "comm/bootstrap/bootstrap.h"

namespace nsa::comm {

struct TcpBootstrapOptions {
  int rank = 0;
  int world_size = 1;
  std::string master_addr;  // of the host of rank 0: a name, an IPv4 or an IPv6 address
  int master_port = 0;
  absl::Duration timeout = absl::Seconds(300);

  // Rank 0 listens on the first free one of `num_ports` ports that begin at master_port +
  // port_offset (counted on from 1024 past 65535), and the others look for it there. The master
  // port itself is left alone, because torchrun, or torch.distributed in the same process, listens
  // on it.
  int port_offset = 1000;
  int num_ports = 16;

  // Ranks meet only ranks with the same value. Groups that are made at the same time with the same
  // master port need different ones.
  std::string group;
};

// Reads RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT by `lookup`, which gives nullptr for what is
// not set. main() passes [](const char* name) { return std::getenv(name); }. InvalidArgument names
// the variable, its value and the rule.
absl::StatusOr<TcpBootstrapOptions> TcpBootstrapOptionsFrom(
    const std::function<const char*(const char* name)>& lookup);

// "host:port" where a rank 0 on this host can be met, with port_offset 0: a port that is free now.
// `host`: a name or an address that the others know this host by; empty: the first address of its
// interfaces that is not loopback, else 127.0.0.1. InvalidArgument when `host` is not known,
// Unavailable when no port is free there.
absl::StatusOr<std::string> FreeRendezvousAddress(const std::string& host = "");

// Collective. Rank 0 listens only while the ranks gather. With a loopback master address it listens
// on loopback alone. Nothing is encrypted and no secret is asked: meant for a cluster's own
// network.
//   InvalidArgument     options break a rule, ranks disagree, or a rank comes twice: told to all
//   FailedPrecondition  ranks run different builds: told to all
//   DeadlineExceeded    names the ranks that did not come
//   Unavailable         a rank died meanwhile, or no port is free
//   ResourceExhausted   rank 0 can open no more connections: told to all
absl::StatusOr<std::unique_ptr<Bootstrap>> CreateTcpBootstrap(const TcpBootstrapOptions& options);

}  // namespace nsa::comm

#endif  // COMM_BOOTSTRAP_TCP_BOOTSTRAP_H_
