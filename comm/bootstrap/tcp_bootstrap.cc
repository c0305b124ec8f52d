#include "comm/bootstrap/tcp_bootstrap.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "comm/bootstrap/control_plane.h"
#include "comm/bootstrap/rendezvous.h"
#include "comm/bootstrap/socket.h"
#include "comm/errors.h"

namespace nsa::comm {
namespace {

constexpr int kFirstPort = 1024;
constexpr int kPortEnd = 65536;
// A name server that has not answered by then will not.
constexpr absl::Duration kResolveTime = absl::Seconds(10);

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

absl::Status CheckOptions(const TcpBootstrapOptions& options) {
  if (options.world_size < 1) {
    return Invalid("world_size (WORLD_SIZE): ", options.world_size, "; must be >= 1");
  }
  if (options.rank < 0 || options.rank >= options.world_size) {
    return Invalid("rank (RANK): ", options.rank, "; must be in [0, world_size), which is ",
                   options.world_size);
  }
  if (options.master_addr.empty()) {
    return Invalid("master_addr (MASTER_ADDR): empty; must name the host of rank 0");
  }
  if (options.master_port < 1 || options.master_port >= kPortEnd) {
    return Invalid("master_port (MASTER_PORT): ", options.master_port, "; must be in [1, 65535]");
  }
  if (options.port_offset < 0 || options.port_offset >= kPortEnd) {
    return Invalid("port_offset: ", options.port_offset, "; must be in [0, 65535]");
  }
  if (options.num_ports < 1 || options.num_ports > 1024) {
    return Invalid("num_ports: ", options.num_ports, "; must be in [1, 1024]");
  }
  return CheckTimeout(options.timeout);
}

std::vector<int> Ports(const TcpBootstrapOptions& options) {
  std::vector<int> ports;
  for (int i = 0; i < options.num_ports; ++i) {
    const int port = options.master_port + options.port_offset + i;
    ports.push_back(port < kPortEnd ? port
                                    : kFirstPort + (port - kPortEnd) % (kPortEnd - kFirstPort));
  }
  return ports;
}

// Where rank 0 binds: loopback when that is the master address, else every interface, because the
// address that others know this host by need not be one of its own.
absl::StatusOr<std::vector<SocketAddress>> ListenAddresses(
    const std::vector<SocketAddress>& master) {
  std::vector<SocketAddress> loopback;
  for (const SocketAddress& address : master) {
    if (address.is_loopback()) loopback.push_back(address);
  }
  if (loopback.size() == master.size()) return loopback;
  // IPv6's wildcard takes IPv4 too; a host without IPv6 has only the other.
  std::vector<SocketAddress> any;
  for (const char* wildcard : {"::", "0.0.0.0"}) {
    auto resolved = Resolve(wildcard, absl::InfiniteFuture());
    if (resolved.ok()) any.insert(any.end(), resolved->begin(), resolved->end());
  }
  return any;
}

// The first free port. When the holder of an earlier one turns out to be a rank 0 of this very
// group, there are two: it then tells all ranks, this one among them.
absl::StatusOr<Fd> ListenOnFirstFree(const std::vector<SocketAddress>& master,
                                     const std::vector<int>& ports, const Meeting& meeting) {
  const absl::StatusOr<std::vector<SocketAddress>> addresses = ListenAddresses(master);
  if (!addresses.ok()) return addresses.status();
  absl::Status last;
  for (int port : ports) {
    for (const SocketAddress& address : *addresses) {
      absl::StatusOr<Fd> listener = Listen(address.WithPort(port));
      if (listener.ok()) return listener;
      last = listener.status();
      if (absl::IsAlreadyExists(last)) break;
    }
    if (!absl::IsAlreadyExists(last)) continue;
    for (const SocketAddress& address : master) {
      const absl::Status other = TryJoin(address.WithPort(port), 0, meeting).status();
      if (!absl::IsNotFound(other)) return other;
    }
  }
  return absl::UnavailableError(
      absl::StrCat("master_port (MASTER_PORT): rank 0 can listen on none of the ports ",
                   ports.front(), " to ", ports.back(), ": ", last.message()));
}

absl::StatusOr<int> IntegerFrom(const std::function<const char*(const char*)>& lookup,
                                const char* name) {
  const char* value = lookup(name);
  if (value == nullptr) return Invalid(name, ": not set; must be an integer");
  int number;
  if (!absl::SimpleAtoi(value, &number)) {
    return Invalid(name, ": '", value, "'; must be an integer");
  }
  return number;
}

}  // namespace

absl::StatusOr<TcpBootstrapOptions> TcpBootstrapOptionsFrom(
    const std::function<const char*(const char* name)>& lookup) {
  TcpBootstrapOptions options;
  const std::pair<const char*, int*> integers[] = {{"RANK", &options.rank},
                                                   {"WORLD_SIZE", &options.world_size},
                                                   {"MASTER_PORT", &options.master_port}};
  for (const auto& [name, field] : integers) {
    const absl::StatusOr<int> value = IntegerFrom(lookup, name);
    if (!value.ok()) return value.status();
    *field = *value;
  }
  const char* master_addr = lookup("MASTER_ADDR");
  if (master_addr == nullptr) return Invalid("MASTER_ADDR: not set; must name the host of rank 0");
  options.master_addr = master_addr;
  if (absl::Status s = CheckOptions(options); !s.ok()) return s;
  return options;
}

absl::StatusOr<std::string> FreeRendezvousAddress(const std::string& host) {
  std::vector<SocketAddress> hosts;
  if (host.empty()) hosts = LocalAddresses();
  if (hosts.empty()) {
    auto resolved = Resolve(host.empty() ? "127.0.0.1" : host, absl::Now() + kResolveTime);
    if (!resolved.ok()) {
      return Invalid("host: '", host, "'; must name this host: ", resolved.status().message());
    }
    hosts = *std::move(resolved);
  }
  const absl::StatusOr<std::vector<SocketAddress>> addresses = ListenAddresses({hosts.front()});
  if (!addresses.ok()) return addresses.status();
  absl::Status last;
  for (const SocketAddress& address : *addresses) {
    const absl::StatusOr<Fd> listener = Listen(address.WithPort(0));
    const absl::StatusOr<SocketAddress> bound =
        listener.ok() ? BoundAddress(*listener) : listener.status();
    if (!bound.ok()) {
      last = bound.status();
      continue;
    }
    if (host.empty()) return hosts.front().WithPort(bound->port()).ToString();
    return absl::StrCat(host.find(':') == std::string::npos ? host : absl::StrCat("[", host, "]"),
                        ":", bound->port());
  }
  return last;
}

absl::StatusOr<std::unique_ptr<Bootstrap>> CreateTcpBootstrap(const TcpBootstrapOptions& options) {
  if (absl::Status s = CheckOptions(options); !s.ok()) return s;
  if (options.world_size == 1) return ControlPlane::Create(0, 1, {});

  const absl::Time deadline = absl::Now() + options.timeout;
  // The port tells apart groups whose port ranges overlap.
  const Meeting meeting = {absl::StrCat(options.master_port, "/", options.group),
                           options.world_size, options.timeout, deadline};
  const absl::StatusOr<std::vector<SocketAddress>> master = Resolve(options.master_addr, deadline);
  if (!master.ok()) {
    const absl::StatusCode code = absl::IsNotFound(master.status())
                                      ? absl::StatusCode::kInvalidArgument
                                      : master.status().code();
    return absl::Status(
        code, absl::StrCat("master_addr (MASTER_ADDR): '", options.master_addr,
                           "'; must name the host of rank 0: ", master.status().message()));
  }
  const std::vector<int> ports = Ports(options);
  std::vector<Fd> links;
  if (options.rank == 0) {
    absl::StatusOr<Fd> listener = ListenOnFirstFree(*master, ports, meeting);
    if (!listener.ok()) return listener.status();
    absl::StatusOr<std::vector<Fd>> joined = ServeRendezvous(*listener, meeting);
    if (!joined.ok()) return joined.status();
    links = *std::move(joined);
  } else {
    std::vector<SocketAddress> endpoints;
    for (int port : ports) {
      for (const SocketAddress& address : *master) endpoints.push_back(address.WithPort(port));
    }
    absl::StatusOr<Fd> socket = JoinRendezvous(endpoints, options.rank, meeting);
    if (!socket.ok()) return socket.status();
    links.push_back(*std::move(socket));
  }
  return ControlPlane::Create(options.rank, options.world_size, std::move(links));
}

}  // namespace nsa::comm
