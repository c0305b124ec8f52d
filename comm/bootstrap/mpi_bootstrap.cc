#include "comm/bootstrap/mpi_bootstrap.h"

#include <mpi.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "comm/bootstrap/control_plane.h"
#include "comm/bootstrap/rendezvous.h"
#include "comm/bootstrap/socket.h"
#include "comm/errors.h"
#include "comm/wire.h"

namespace nsa::comm {
namespace {

// Room for the name of the group and the addresses of rank 0.
using Announcement = std::array<char, 8192>;

absl::Status MpiError(absl::string_view expression, int error) {
  std::array<char, MPI_MAX_ERROR_STRING> text;
  int length = 0;
  MPI_Error_string(error, text.data(), &length);
  return absl::InternalError(
      absl::StrCat(expression, ": ", absl::string_view(text.data(), length)));
}

bool MpiRuns() {
  int initialized = 0;
  int finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized != 0 && finalized == 0;
}

// Errors as return codes while it lives; MPI's default is to end the program.
class ReturnErrors {
 public:
  ReturnErrors() {
    MPI_Comm_get_errhandler(MPI_COMM_WORLD, &before_);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  }
  ~ReturnErrors() {
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, before_);
    MPI_Errhandler_free(&before_);
  }
  ReturnErrors(const ReturnErrors&) = delete;
  ReturnErrors& operator=(const ReturnErrors&) = delete;

 private:
  MPI_Errhandler before_;
};

// MPI has no wait with a deadline.
absl::Status AwaitRequest(MPI_Request& request, absl::string_view call, int rank,
                          absl::Span<const int> awaited, absl::Duration timeout,
                          absl::Time deadline) {
  while (true) {
    int done = 0;
    if (const int error = MPI_Test(&request, &done, MPI_STATUS_IGNORE); error != MPI_SUCCESS) {
      return MpiError("MPI_Test", error);
    }
    if (done != 0) return absl::OkStatus();
    if (absl::Now() >= deadline) return WaitTimedOut(call, rank, awaited, timeout);
    absl::SleepFor(absl::Microseconds(200));
  }
}

std::vector<int> AllBut(int rank, int size) {
  std::vector<int> others;
  for (int other = 0; other < size; ++other) {
    if (other != rank) others.push_back(other);
  }
  return others;
}

// From rank 0 to all. `announcement` must outlive the request: after an error MPI may still hold
// it.
absl::Status Broadcast(Announcement& announcement, int rank, int size, absl::Duration timeout,
                       absl::Time deadline) {
  MPI_Request request = MPI_REQUEST_NULL;
  if (const int error = MPI_Ibcast(announcement.data(), static_cast<int>(announcement.size()),
                                   MPI_CHAR, 0, MPI_COMM_WORLD, &request);
      error != MPI_SUCCESS) {
    return MpiError("MPI_Ibcast", error);
  }
  const std::vector<int> awaited = rank == 0 ? AllBut(0, size) : std::vector<int>{0};
  return AwaitRequest(request, "rendezvous by MPI", rank, awaited, timeout, deadline);
}

std::string HostName() {
  std::array<char, 256> name = {};
  (void)gethostname(name.data(), name.size() - 1);
  return name.data();
}

struct Master {
  std::string error;  // why rank 0 does not listen; empty: it does
  std::string group;
  std::string host;                    // of rank 0
  std::vector<std::string> addresses;  // of that host
  int port = 0;
};

std::string Encode(const Master& master) {
  WireWriter writer;
  writer.PutString(master.error);
  writer.PutString(master.group);
  writer.PutString(master.host);
  writer.PutInt64(master.port);
  writer.PutInt64(static_cast<int64_t>(master.addresses.size()));
  for (const std::string& address : master.addresses) writer.PutString(address);
  return writer.bytes();
}

absl::StatusOr<Master> Decode(const Announcement& announcement) {
  WireReader reader(absl::string_view(announcement.data(), announcement.size()));
  Master master;
  master.error = reader.GetString();
  master.group = reader.GetString();
  master.host = reader.GetString();
  master.port = static_cast<int>(reader.GetInt64());
  const int64_t count = reader.GetInt64();
  for (int64_t i = 0; i < count && reader.ok(); ++i) {
    master.addresses.push_back(reader.GetString());
  }
  if (!reader.ok()) return absl::InternalError("rendezvous by MPI: cannot read the announcement");
  return master;
}

// Where a rank on `host` should look for rank 0: loopback first on the same host, else not at all.
absl::StatusOr<std::vector<SocketAddress>> Endpoints(const Master& master) {
  const bool same_host = master.host == HostName();
  std::vector<SocketAddress> endpoints;
  for (const std::string& host : master.addresses) {
    auto resolved = Resolve(host, absl::InfiniteFuture());  // an address: nothing is looked up
    if (!resolved.ok()) continue;
    for (const SocketAddress& address : *resolved) {
      if (address.is_loopback() && !same_host) continue;
      const auto at = address.is_loopback() ? endpoints.begin() : endpoints.end();
      endpoints.insert(at, address.WithPort(master.port));
    }
  }
  if (endpoints.empty()) {
    return absl::UnavailableError("rendezvous by MPI: rank 0 has no address to reach it by");
  }
  return endpoints;
}

absl::StatusOr<Fd> ListenAnywhere() {
  absl::StatusOr<Fd> listener = absl::InternalError("no address");
  for (const char* any : {"::", "0.0.0.0"}) {
    const auto addresses = Resolve(any, absl::InfiniteFuture());
    if (!addresses.ok()) continue;
    listener = Listen(addresses->front());
    if (listener.ok()) break;
  }
  return listener;
}

// The numeric host without the port.
std::string HostOf(const SocketAddress& address) {
  std::string text = address.ToString();
  text.resize(text.rfind(':'));
  if (text.front() == '[') text = text.substr(1, text.size() - 2);
  return text;
}

// Begins to listen, and says where.
absl::Status Announce(Fd& listener, Master& master) {
  absl::StatusOr<Fd> listening = ListenAnywhere();
  if (!listening.ok()) return listening.status();
  listener = *std::move(listening);
  const absl::StatusOr<SocketAddress> bound = BoundAddress(listener);
  if (!bound.ok()) return bound.status();
  // Tells this group from another that listens on the same port of another address.
  std::random_device random;
  master.group = absl::StrCat("mpi/", random(), "/", random());
  master.host = HostName();
  master.port = bound->port();
  for (const SocketAddress& address : LocalAddresses()) {
    master.addresses.push_back(HostOf(address));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<MpiSession>> MpiSession::Start() {
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized != 0) return absl::FailedPreconditionError("MPI is already initialised");
  int provided = 0;
  if (const int error = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
      error != MPI_SUCCESS) {
    return MpiError("MPI_Init_thread", error);
  }
  int rank = 0;
  int size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return std::unique_ptr<MpiSession>(new MpiSession(rank, size));
}

absl::Status MpiSession::Finish(absl::Duration timeout) {
  if (!MpiRuns()) return absl::FailedPreconditionError("MPI does not run");
  {
    const ReturnErrors return_errors;
    MPI_Request request = MPI_REQUEST_NULL;
    if (const int error = MPI_Ibarrier(MPI_COMM_WORLD, &request); error != MPI_SUCCESS) {
      return MpiError("MPI_Ibarrier", error);
    }
    if (absl::Status s = AwaitRequest(request, "MpiSession::Finish", rank_, AllBut(rank_, size_),
                                      timeout, absl::Now() + timeout);
        !s.ok()) {
      return s;
    }
  }
  if (const int error = MPI_Finalize(); error != MPI_SUCCESS) {
    return MpiError("MPI_Finalize", error);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Bootstrap>> CreateMpiBootstrap(const MpiBootstrapOptions& options) {
  if (absl::Status s = CheckTimeout(options.timeout); !s.ok()) return s;
  if (!MpiRuns()) return absl::FailedPreconditionError("MPI is not initialised");
  const ReturnErrors return_errors;
  int rank = 0;
  int size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const absl::Time deadline = absl::Now() + options.timeout;

  Fd listener;
  absl::Status listening;
  auto announcement = std::make_unique<Announcement>();
  announcement->fill(0);
  if (rank == 0) {
    Master master;
    listening = Announce(listener, master);
    // The others hear of a failure, or they would wait for this rank.
    if (!listening.ok()) master.error = std::string(listening.message());
    std::string bytes = Encode(master);
    while (bytes.size() > announcement->size()) {
      master.addresses.pop_back();
      bytes = Encode(master);
    }
    std::copy(bytes.begin(), bytes.end(), announcement->begin());
  }
  if (absl::Status s = Broadcast(*announcement, rank, size, options.timeout, deadline); !s.ok()) {
    // A collective of MPI cannot be cancelled, so its buffer stays.
    (void)announcement.release();
    return s;
  }
  if (!listening.ok()) return listening;
  const absl::StatusOr<Master> master = Decode(*announcement);
  if (!master.ok()) return master.status();
  if (!master->error.empty()) {
    return absl::UnavailableError(absl::StrCat("rendezvous by MPI: rank 0: ", master->error));
  }

  const Meeting meeting = {master->group, size, options.timeout, deadline};
  std::vector<Fd> links;
  if (rank == 0) {
    absl::StatusOr<std::vector<Fd>> joined = ServeRendezvous(listener, meeting);
    if (!joined.ok()) return joined.status();
    links = *std::move(joined);
  } else {
    const absl::StatusOr<std::vector<SocketAddress>> endpoints = Endpoints(*master);
    if (!endpoints.ok()) return endpoints.status();
    absl::StatusOr<Fd> socket = JoinRendezvous(*endpoints, rank, meeting);
    if (!socket.ok()) return socket.status();
    links.push_back(*std::move(socket));
  }
  return ControlPlane::Create(rank, size, std::move(links));
}

}  // namespace nsa::comm
