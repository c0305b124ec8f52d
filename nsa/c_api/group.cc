// Groups: which ranks there are, on which devices, and what moves bytes between them. The one place
// in nsa/ that chooses among backends.
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/nccl/lazy_nccl.h"
#include "comm/ucx/lazy_ucx.h"
#include "nsa/c_api/arguments.h"
#include "nsa/c_api/handles.h"
#include "tools/launch/device.h"
#include "tools/launch/environment.h"
#include "tools/launch/gpus.h"

namespace nsa::c_api {
namespace {

constexpr int32_t kMaxThreads = 4096;
constexpr int64_t kDefaultTimeoutMs = 60'000;

// Where this process stands, and where its ranks meet.
struct Place {
  comm::TcpBootstrapOptions bootstrap;
  int num_ranks_on_host = 1;
};

const char* Lookup(const char* name) { return std::getenv(name); }

// What mpirun calls RANK and WORLD_SIZE.
const char* LookupUnderMpi(const char* name) {
  const absl::string_view asked = name;
  if (asked == "RANK") return std::getenv("OMPI_COMM_WORLD_RANK");
  if (asked == "WORLD_SIZE") return std::getenv("OMPI_COMM_WORLD_SIZE");
  return std::getenv(name);
}

absl::StatusOr<Place> PlaceInEnvironment() {
  const absl::StatusOr<tools::ProcessPlace> process = tools::FindProcessPlace(Lookup);
  if (!process.ok()) return process.status();
  Place place = {.bootstrap = {}, .num_ranks_on_host = process->num_ranks_on_host};
  if (process->size == 1) return place;
  absl::StatusOr<comm::TcpBootstrapOptions> options = comm::TcpBootstrapOptionsFrom(
      process->origin == tools::Origin::kMpi ? LookupUnderMpi : Lookup);
  if (!options.ok()) return options.status();
  place.bootstrap = *std::move(options);
  return place;
}

// "host:port", "[address]:port".
absl::Status ParseRendezvous(absl::string_view text, comm::TcpBootstrapOptions& options) {
  const size_t colon = text.rfind(':');
  absl::string_view host = text.substr(0, colon);
  const bool has_brackets = absl::ConsumePrefix(&host, "[") && absl::ConsumeSuffix(&host, "]");
  if (colon == absl::string_view::npos || host.empty() ||
      (!has_brackets && absl::StrContains(host, ':')) ||
      !absl::SimpleAtoi(text.substr(colon + 1), &options.master_port)) {
    return Invalid("rendezvous = \"", text, "\": must be host:port or [address]:port");
  }
  options.master_addr = std::string(host);
  options.port_offset = 0;
  return absl::OkStatus();
}

absl::StatusOr<Place> PlaceInOptions(const nsa_group_options& options) {
  Place place;
  place.bootstrap.world_size = OrDefault(options.size, 1);
  place.bootstrap.rank = options.rank;
  Reader reader;
  reader.Require(options.size >= 0, "size", options.size, "must be 0, for one rank, or more");
  reader.Require(options.rank >= 0 && options.rank < place.bootstrap.world_size, "rank",
                 options.rank, absl::StrCat("must lie in [0, ", place.bootstrap.world_size, ")"));
  if (!reader.status().ok()) return reader.status();
  if (place.bootstrap.world_size == 1) return place;
  if (options.rendezvous == nullptr) {
    return Invalid("rendezvous: null; must be host:port for size = ", options.size);
  }
  if (absl::Status s = ParseRendezvous(options.rendezvous, place.bootstrap); !s.ok()) return s;
  return place;
}

absl::StatusOr<Place> FindPlace(const nsa_group_options& options) {
  absl::StatusOr<Place> place =
      options.from_environment != 0 ? PlaceInEnvironment() : PlaceInOptions(options);
  if (!place.ok()) return place;
  if (place->bootstrap.world_size == 1) {
    // There is nobody to meet.
    place->bootstrap.master_addr = "127.0.0.1";
    place->bootstrap.master_port = 1;
  }
  if (options.name != nullptr) place->bootstrap.group = options.name;
  return place;
}

// Rules of the options alone.
absl::Status CheckOptions(const nsa_group_options& options) {
  const int32_t transport = options.transport;
  Reader reader;
  reader.Require(options.device >= NSA_DEVICE_CPU, "device", options.device,
                 "must be NSA_DEVICE_CPU (-1) or the number of a GPU");
  reader.Require(transport >= NSA_TRANSPORT_AUTO && transport <= NSA_TRANSPORT_NCCL, "transport",
                 transport, "must be one of nsa_transport, 0 to 3");
  reader.Require(transport != NSA_TRANSPORT_NCCL || options.device >= 0, "transport", transport,
                 "NSA_TRANSPORT_NCCL moves GPUs' memory, but device is NSA_DEVICE_CPU");
  reader.Require(transport != NSA_TRANSPORT_LOOPBACK || options.device < 0, "transport", transport,
                 "NSA_TRANSPORT_LOOPBACK moves the host's memory, but device is a GPU");
  reader.Require(options.num_threads >= 0 && options.num_threads <= kMaxThreads, "num_threads",
                 options.num_threads, absl::StrCat("must lie in [0, ", kMaxThreads, "]"));
  reader.Require(options.timeout_ms >= 0, "timeout_ms", options.timeout_ms,
                 "must be 0, for the default, or more");
  const bool has_place = options.rank != 0 || options.size != 0 || options.rendezvous != nullptr;
  reader.Require(options.from_environment == 0 || !has_place, "from_environment",
                 options.from_environment, "rank, size and rendezvous must then be zero");
  reader.Require(options.nccl_comm == nullptr ||
                     (options.device >= 0 &&
                      (transport == NSA_TRANSPORT_AUTO || transport == NSA_TRANSPORT_NCCL)),
                 "nccl_comm", "set", "must be null but for a GPU and NSA_TRANSPORT_NCCL");
  return reader.status();
}

absl::StatusOr<tools::Device> FindDevice(const nsa_group_options& options, int num_ranks_on_host) {
  tools::Device device;
  if (options.device == NSA_DEVICE_CPU) {
    device.num_threads = tools::ThreadsPerRank(options.num_threads, num_ranks_on_host);
    return device;
  }
  absl::StatusOr<std::shared_ptr<tools::Gpus>> gpus = tools::FindGpus();
  if (!gpus.ok()) {
    return Invalid("device = ", options.device, ": must be NSA_DEVICE_CPU (-1), as ",
                   gpus.status().message());
  }
  if (options.device >= (*gpus)->count()) {
    return Invalid("device = ", options.device, ": must be below ", (*gpus)->count(),
                   ", the number of GPUs that this process sees");
  }
  absl::StatusOr<std::string> uuid = (*gpus)->UuidOf(options.device);
  if (!uuid.ok()) return uuid.status();
  device.gpus = *std::move(gpus);
  device.gpu = options.device;
  device.gpu_uuid = *std::move(uuid);
  device.over_ucx = options.transport == NSA_TRANSPORT_UCX;
  device.adopted_nccl = options.nccl_comm;
  return device;
}

// The library that moves bytes of `device` between ranks.
absl::Status OpenTransport(const tools::Device& device) {
  return device.gpus != nullptr && !device.over_ucx ? comm::OpenNccl() : comm::OpenUcx();
}

absl::StatusOr<nsa_group> MakeGroup(const nsa_group_options& options) {
  if (absl::Status s = CheckOptions(options); !s.ok()) return s;
  absl::StatusOr<Place> place = FindPlace(options);
  if (!place.ok()) return place.status();
  const bool is_alone = place->bootstrap.world_size == 1;
  if (options.transport == NSA_TRANSPORT_LOOPBACK && !is_alone) {
    return Invalid(
        "transport = NSA_TRANSPORT_LOOPBACK: joins no other process, but this is one of ",
        place->bootstrap.world_size);
  }
  const absl::Duration timeout =
      absl::Milliseconds(OrDefault(options.timeout_ms, kDefaultTimeoutMs));
  place->bootstrap.timeout = timeout;
  const absl::StatusOr<tools::Device> device = FindDevice(options, place->num_ranks_on_host);

  // A rank that cannot take part says so to those that can.
  absl::StatusOr<std::unique_ptr<comm::Bootstrap>> bootstrap =
      comm::CreateTcpBootstrap(place->bootstrap);
  if (!bootstrap.ok()) return bootstrap.status();
  absl::StatusOr<std::unique_ptr<kernels::Kernels>> kernels =
      device.ok() ? device->CreateKernels() : device.status();
  absl::Status ready = kernels.status();
  const bool opens_transport =
      !is_alone || options.transport == NSA_TRANSPORT_UCX || options.nccl_comm != nullptr;
  if (ready.ok() && opens_transport) ready = OpenTransport(*device);
  if (absl::Status s = tools::AgreeOnDevice(ready, device.ok() ? *device : tools::Device(),
                                            **bootstrap, absl::StrCat(options.device), timeout);
      !s.ok()) {
    return s;
  }
  const bool over_loopback = device->gpus == nullptr && !opens_transport;
  absl::StatusOr<std::unique_ptr<comm::Communicator>> communicator =
      over_loopback ? device->ConnectAlone(timeout)
                    : device->Connect(*std::move(bootstrap), timeout);
  if (!communicator.ok()) return communicator.status();
  return nsa_group{.communicator = *std::move(communicator), .kernels = *std::move(kernels)};
}

}  // namespace
}  // namespace nsa::c_api

using nsa::c_api::CheckSet;
using nsa::c_api::Run;

nsa_status nsa_group_create(const nsa_group_options* options, nsa_group** group) {
  return Run([&]() -> absl::Status {
    const auto read = nsa::c_api::ReadStruct("options", options);
    if (!read.ok()) return read.status();
    if (absl::Status s = CheckSet("group", group); !s.ok()) return s;
    absl::StatusOr<nsa_group> made = nsa::c_api::MakeGroup(*read);
    if (!made.ok()) return made.status();
    *group = new nsa_group(*std::move(made));
    return absl::OkStatus();
  });
}

void nsa_group_destroy(nsa_group* group) { delete group; }

nsa_status nsa_rendezvous_address(const char* host, const char** text) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("text", text); !s.ok()) return s;
    absl::StatusOr<std::string> address =
        nsa::comm::FreeRendezvousAddress(host == nullptr ? "" : host);
    if (!address.ok()) return address.status();
    *text = nsa::c_api::KeepText(*std::move(address));
    return absl::OkStatus();
  });
}

nsa_status nsa_group_rank(const nsa_group* group, int32_t* rank, int32_t* size) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("group", group); !s.ok()) return s;
    if (rank != nullptr) *rank = group->communicator->rank();
    if (size != nullptr) *size = group->communicator->size();
    return absl::OkStatus();
  });
}

nsa_status nsa_group_barrier(nsa_group* group) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("group", group); !s.ok()) return s;
    return group->communicator->Barrier();
  });
}

nsa_status nsa_group_health(nsa_group* group) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("group", group); !s.ok()) return s;
    return group->communicator->HealthCheck();
  });
}

nsa_status nsa_group_abort(nsa_group* group, const char* reason) {
  return Run([&]() -> absl::Status {
    if (absl::Status s = CheckSet("group", group); !s.ok()) return s;
    group->communicator->Abort(reason == nullptr ? "" : reason);
    return absl::OkStatus();
  });
}
