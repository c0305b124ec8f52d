#include "tools/launch/device.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/loopback/loopback.h"
#include "comm/ucx/ucx_communicator.h"
#include "kernels/cpu/cpu_kernels.h"

namespace nsa::tools {
namespace {

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

}  // namespace

std::string Device::name() const {
  if (gpus != nullptr) return gpus->NameOf(gpu);
  return absl::StrCat(num_threads, num_threads == 1 ? " CPU thread" : " CPU threads");
}

absl::StatusOr<std::unique_ptr<kernels::Kernels>> Device::CreateKernels() const {
  if (gpus != nullptr) return gpus->CreateKernels(gpu);
  return kernels::CpuKernels::Create({.num_threads = num_threads});
}

absl::StatusOr<std::unique_ptr<comm::Communicator>> Device::Connect(
    std::unique_ptr<comm::Bootstrap> bootstrap, absl::Duration timeout) const {
  if (gpus != nullptr) return gpus->CreateCommunicator(std::move(bootstrap), gpu, timeout);
  comm::UcxOptions options;
  options.timeout = timeout;
  options.connect_timeout = timeout;
  return comm::UcxCommunicator::Create(std::move(bootstrap), options);
}

absl::StatusOr<std::unique_ptr<comm::Communicator>> Device::ConnectAlone(
    absl::Duration timeout) const {
  if (gpus == nullptr) {
    auto group = comm::LoopbackGroup::Create(1, {.timeout = timeout});
    if (!group.ok()) return group.status();
    return std::move((*group)[0]);
  }
  comm::TcpBootstrapOptions options;
  options.master_addr = "127.0.0.1";
  options.master_port = 1;  // any: there is nobody to meet
  auto bootstrap = comm::CreateTcpBootstrap(options);
  if (!bootstrap.ok()) return bootstrap.status();
  return Connect(*std::move(bootstrap), timeout);
}

absl::StatusOr<Device> ChooseDevice(const LaunchOptions& options, const ProcessPlace& place) {
  const Device cpu = {.gpus = nullptr,
                      .num_threads = ThreadsPerRank(options.num_threads, place.num_ranks_on_host)};
  const std::string& backend = options.backend;
  const bool several_threads = place.origin == Origin::kThreads && options.num_ranks > 1;
  if (options.device == "cpu" || backend == "loopback" || backend == "ucx" || several_threads) {
    return cpu;
  }
  absl::StatusOr<std::shared_ptr<Gpus>> gpus = absl::NotFoundError("this program uses no GPUs");
  if (options.find_gpus != nullptr) gpus = options.find_gpus();
  if (!gpus.ok()) {
    if (options.device == "cuda") {
      return Invalid("device = \"cuda\": must be auto or cpu, as ", gpus.status().message());
    }
    if (backend == "nccl") {
      return Invalid("backend = \"nccl\": must be auto, loopback or ucx, as ",
                     gpus.status().message());
    }
    return cpu;
  }
  if (place.num_ranks_on_host > (*gpus)->count()) {
    return Invalid("device = \"", options.device, "\": there are ", place.num_ranks_on_host,
                   " ranks on this host and ", (*gpus)->count(),
                   " GPUs; must be cpu, or ranks at most as many as GPUs");
  }
  return Device{.gpus = *std::move(gpus), .gpu = place.local_rank};
}

absl::Status AgreeOnDevice(const absl::Status& ready, absl::string_view kind,
                           comm::Bootstrap& bootstrap, const LaunchOptions& options) {
  constexpr absl::string_view kGaveUp = "!";
  const absl::StatusOr<std::vector<std::string>> all =
      bootstrap.AllGather(ready.ok() ? std::string(kind) : absl::StrCat(kGaveUp, ready.ToString()),
                          options.timeout, "choosing devices");
  if (!ready.ok()) return ready;
  if (!all.ok()) return all.status();
  for (size_t rank = 0; rank < all->size(); ++rank) {
    absl::string_view theirs = (*all)[rank];
    if (absl::ConsumePrefix(&theirs, kGaveUp)) {
      return absl::AbortedError(absl::StrCat("rank ", rank, " gave up: ", theirs));
    }
    if (theirs != kind) {
      return Invalid("device = \"", options.device, "\": ", kind, " for this rank, ", theirs,
                     " for rank ", rank, "; must be the same for all ranks");
    }
  }
  return absl::OkStatus();
}

}  // namespace nsa::tools
