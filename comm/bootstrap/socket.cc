#include "comm/bootstrap/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"

namespace nsa::comm {
namespace {

// How long a peer may be silent at the level of TCP before its host counts as gone. A stopped
// process is not silent at that level.
constexpr int kKeepIdleSeconds = 10;
constexpr int kKeepIntervalSeconds = 5;
constexpr int kKeepProbes = 4;

void SetOption(int fd, int level, int name, int value) {
  // These options only tune; a kernel without one works too.
  (void)setsockopt(fd, level, name, &value, sizeof(value));
}

void TuneConnection(int fd) {
  SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, kKeepIdleSeconds);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, kKeepIntervalSeconds);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPCNT, kKeepProbes);
  SetOption(fd, IPPROTO_TCP, TCP_USER_TIMEOUT,
            1000 * (kKeepIdleSeconds + kKeepIntervalSeconds * kKeepProbes));
}

absl::Status SocketError(absl::string_view what, int error) {
  return absl::UnavailableError(absl::StrCat(what, ": ", ErrnoText(error)));
}

// What a look-up gives; shared with the thread that makes it.
struct Lookup {
  absl::Notification done;
  int error = 0;
  std::vector<SocketAddress> addresses;
};

void RunLookup(const std::string& host, int flags, Lookup& lookup) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  addrinfo* list = nullptr;
  lookup.error = getaddrinfo(host.c_str(), nullptr, &hints, &list);
  if (lookup.error != 0) return;
  for (const addrinfo* entry = list; entry != nullptr; entry = entry->ai_next) {
    if (entry->ai_family == AF_INET || entry->ai_family == AF_INET6) {
      lookup.addresses.emplace_back(entry->ai_addr, entry->ai_addrlen);
    }
  }
  freeaddrinfo(list);
}

}  // namespace

void Fd::Reset(int fd) {
  if (fd_ >= 0) close(fd_);
  fd_ = fd;
}

std::string ErrnoText(int error) {
  char buffer[256];
  return strerror_r(error, buffer, sizeof(buffer));
}

int PollTimeout(absl::Time deadline) {
  const absl::Duration left = deadline - absl::Now();
  if (left <= absl::ZeroDuration()) return 0;
  return static_cast<int>(
      std::min<int64_t>(absl::ToInt64Milliseconds(left + absl::Microseconds(999)), 1 << 30));
}

SocketAddress::SocketAddress(const sockaddr* address, socklen_t length) : length_(length) {
  std::memcpy(&storage_, address, std::min<size_t>(length, sizeof(storage_)));
}

bool SocketAddress::is_loopback() const {
  if (family() == AF_INET) {
    const auto* in = reinterpret_cast<const sockaddr_in*>(&storage_);
    return (ntohl(in->sin_addr.s_addr) >> 24) == 127;
  }
  const auto* in6 = reinterpret_cast<const sockaddr_in6*>(&storage_);
  return IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr);
}

int SocketAddress::port() const {
  return ntohs(family() == AF_INET ? reinterpret_cast<const sockaddr_in*>(&storage_)->sin_port
                                   : reinterpret_cast<const sockaddr_in6*>(&storage_)->sin6_port);
}

SocketAddress SocketAddress::WithPort(int port) const {
  SocketAddress copy = *this;
  const in_port_t network_port = htons(static_cast<uint16_t>(port));
  if (family() == AF_INET) {
    reinterpret_cast<sockaddr_in*>(&copy.storage_)->sin_port = network_port;
  } else {
    reinterpret_cast<sockaddr_in6*>(&copy.storage_)->sin6_port = network_port;
  }
  return copy;
}

std::string SocketAddress::ToString() const {
  char host[NI_MAXHOST] = "?";
  (void)getnameinfo(get(), length_, host, sizeof(host), nullptr, 0, NI_NUMERICHOST);
  return family() == AF_INET6 ? absl::StrCat("[", host, "]:", port())
                              : absl::StrCat(host, ":", port());
}

absl::StatusOr<std::vector<SocketAddress>> Resolve(const std::string& host, absl::Time deadline) {
  auto lookup = std::make_shared<Lookup>();
  RunLookup(host, AI_NUMERICHOST, *lookup);
  if (lookup->error == 0) return lookup->addresses;
  lookup = std::make_shared<Lookup>();
  std::thread([lookup, host] {
    RunLookup(host, AI_ADDRCONFIG, *lookup);
    lookup->done.Notify();
  }).detach();
  if (!lookup->done.WaitForNotificationWithDeadline(deadline)) {
    return absl::DeadlineExceededError(absl::StrCat("looking up the address of '", host, "'"));
  }
  if (lookup->error != 0 || lookup->addresses.empty()) {
    return absl::NotFoundError(
        absl::StrCat("looking up the address of '", host, "': ", gai_strerror(lookup->error)));
  }
  return lookup->addresses;
}

std::vector<SocketAddress> LocalAddresses() {
  std::vector<SocketAddress> addresses;
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return addresses;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
    if (entry->ifa_addr->sa_family == AF_INET) {
      addresses.emplace_back(entry->ifa_addr, sizeof(sockaddr_in));
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
      const auto* in6 = reinterpret_cast<const sockaddr_in6*>(entry->ifa_addr);
      // A link-local address means nothing on another host.
      if (!IN6_IS_ADDR_LINKLOCAL(&in6->sin6_addr)) {
        addresses.emplace_back(entry->ifa_addr, sizeof(sockaddr_in6));
      }
    }
  }
  freeifaddrs(list);
  std::stable_partition(addresses.begin(), addresses.end(),
                        [](const SocketAddress& a) { return !a.is_loopback(); });
  return addresses;
}

absl::StatusOr<Fd> Listen(const SocketAddress& address) {
  Fd socket_fd(socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket_fd.valid()) return SocketError("socket", errno);
  // A port whose last connections still linger may be taken again; one that is listened on may not.
  SetOption(socket_fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  if (address.family() == AF_INET6) SetOption(socket_fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, 0);
  if (bind(socket_fd.get(), address.get(), address.length()) != 0 ||
      listen(socket_fd.get(), SOMAXCONN) != 0) {
    const std::string text =
        absl::StrCat("listening on ", address.ToString(), ": ", ErrnoText(errno));
    return errno == EADDRINUSE ? absl::AlreadyExistsError(text) : absl::UnavailableError(text);
  }
  return socket_fd;
}

absl::StatusOr<SocketAddress> BoundAddress(const Fd& socket) {
  sockaddr_storage storage = {};
  socklen_t length = sizeof(storage);
  if (getsockname(socket.get(), reinterpret_cast<sockaddr*>(&storage), &length) != 0) {
    return SocketError("getsockname", errno);
  }
  return SocketAddress(reinterpret_cast<sockaddr*>(&storage), length);
}

absl::StatusOr<Fd> Connect(const SocketAddress& address, absl::Time deadline) {
  Fd socket_fd(socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket_fd.valid()) return SocketError("socket", errno);
  const std::string what = absl::StrCat("connecting to ", address.ToString());
  if (connect(socket_fd.get(), address.get(), address.length()) != 0) {
    if (errno != EINPROGRESS) return SocketError(what, errno);
    if (absl::Status s = AwaitSocket(socket_fd, POLLOUT, deadline); !s.ok()) {
      return absl::DeadlineExceededError(what);
    }
    int error = 0;
    socklen_t length = sizeof(error);
    (void)getsockopt(socket_fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) return SocketError(what, error);
  }
  TuneConnection(socket_fd.get());
  // A port of this host that nobody listens on can, with bad luck, be connected to itself.
  sockaddr_storage own = {};
  socklen_t length = sizeof(own);
  if (getsockname(socket_fd.get(), reinterpret_cast<sockaddr*>(&own), &length) == 0 &&
      length == address.length() && std::memcmp(&own, address.get(), length) == 0) {
    return SocketError(what, ECONNREFUSED);
  }
  return socket_fd;
}

absl::StatusOr<Fd> Accept(const Fd& listener) {
  Fd socket_fd(accept4(listener.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (socket_fd.valid()) {
    TuneConnection(socket_fd.get());
  } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
    return absl::ResourceExhaustedError(absl::StrCat("accepting a connection: ", ErrnoText(errno)));
  }
  return socket_fd;
}

absl::Status AwaitSocket(const Fd& socket, short events, absl::Time deadline) {
  while (true) {
    pollfd entry = {socket.get(), events, 0};
    const int ready = poll(&entry, 1, PollTimeout(deadline));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return SocketError("poll", errno);
    if (absl::Now() >= deadline) return absl::DeadlineExceededError("waiting for a socket");
  }
}

absl::Status SendAll(const Fd& socket, absl::string_view bytes, absl::Time deadline) {
  while (!bytes.empty()) {
    const ssize_t n = send(socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n >= 0) {
      bytes.remove_prefix(n);
    } else if (errno == EAGAIN) {
      if (absl::Status s = AwaitSocket(socket, POLLOUT, deadline); !s.ok()) return s;
    } else if (errno != EINTR) {
      return SocketError("sending", errno);
    }
  }
  return absl::OkStatus();
}

absl::Status ReceiveAll(const Fd& socket, size_t num_bytes, std::string& bytes,
                        absl::Time deadline) {
  bytes.resize(num_bytes);
  size_t got = 0;
  while (got < num_bytes) {
    const ssize_t n = recv(socket.get(), bytes.data() + got, num_bytes - got, 0);
    if (n > 0) {
      got += n;
    } else if (n == 0) {
      return absl::UnavailableError("the connection was closed");
    } else if (errno == EAGAIN) {
      if (absl::Status s = AwaitSocket(socket, POLLIN, deadline); !s.ok()) return s;
    } else if (errno != EINTR) {
      return SocketError("receiving", errno);
    }
  }
  return absl::OkStatus();
}

}  // namespace nsa::comm
