// TCP sockets with deadlines.
#ifndef COMM_BOOTSTRAP_SOCKET_H_
#define COMM_BOOTSTRAP_SOCKET_H_

#include <sys/socket.h>

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace nsa::comm {

// An open file descriptor, closed with its owner.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) {
    if (this != &other) Reset(std::exchange(other.fd_, -1));
    return *this;
  }
  ~Fd() { Reset(-1); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }
  void Reset(int fd);

 private:
  int fd_ = -1;
};

// An IPv4 or IPv6 address with a port.
class SocketAddress {
 public:
  SocketAddress(const sockaddr* address, socklen_t length);
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage_); }
  socklen_t length() const { return length_; }
  int family() const { return storage_.ss_family; }
  bool is_loopback() const;
  int port() const;
  SocketAddress WithPort(int port) const;
  std::string ToString() const;  // "10.0.0.1:29500", "[::1]:29500"

 private:
  sockaddr_storage storage_ = {};
  socklen_t length_;
};

// The addresses of `host`, a name or an address, with port 0. A name is looked up by the system,
// in a thread that is left behind when the deadline passes.
absl::StatusOr<std::vector<SocketAddress>> Resolve(const std::string& host, absl::Time deadline);

// The addresses of this host's interfaces that are up, loopback last, with port 0.
std::vector<SocketAddress> LocalAddresses();

// A non-blocking listening socket. AlreadyExists when the port is taken.
absl::StatusOr<Fd> Listen(const SocketAddress& address);
absl::StatusOr<SocketAddress> BoundAddress(const Fd& socket);

// A non-blocking connected socket, with delays off and keep-alive on.
absl::StatusOr<Fd> Connect(const SocketAddress& address, absl::Time deadline);
// The next connection waiting at `listener`, likewise; invalid when there is none.
// ResourceExhausted when this process can open no more.
absl::StatusOr<Fd> Accept(const Fd& listener);

// Waits for poll(2) `events`. DeadlineExceeded or OK, also when the peer hung up.
absl::Status AwaitSocket(const Fd& socket, short events, absl::Time deadline);

// Whole buffers. Unavailable when the connection ends before.
absl::Status SendAll(const Fd& socket, absl::string_view bytes, absl::Time deadline);
absl::Status ReceiveAll(const Fd& socket, size_t num_bytes, std::string& bytes,
                        absl::Time deadline);

// "Connection reset by peer" and its like.
std::string ErrnoText(int error);

// For poll(2): milliseconds until `deadline`, rounded up, at least 0.
int PollTimeout(absl::Time deadline);

}  // namespace nsa::comm

#endif  // COMM_BOOTSTRAP_SOCKET_H_
