#include "tools/launch/device.h"

#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
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
  const bool enough = place.num_ranks_on_host <= (*gpus)->count();
  // A launcher may show each process a GPU of its own; that they differ AgreeOnDevice finds out.
  if (!enough && (*gpus)->count() != 1) {
    return Invalid("device = \"", options.device, "\": there are ", place.num_ranks_on_host,
                   " ranks on this host and ", (*gpus)->count(),
                   " GPUs; must be cpu, or ranks at most as many as GPUs");
  }
  const int gpu = enough ? place.local_rank : 0;
  absl::StatusOr<std::string> uuid = (*gpus)->UuidOf(gpu);
  if (!uuid.ok()) return uuid.status();
  return Device{.gpus = *std::move(gpus), .gpu = gpu, .gpu_uuid = *std::move(uuid)};
}

absl::Status AgreeOnDevice(const absl::Status& ready, const Device& device,
                           comm::Bootstrap& bootstrap, const LaunchOptions& options) {
  constexpr absl::string_view kGaveUp = "!";
  const absl::string_view kind = device.kind();
  const absl::StatusOr<std::vector<std::string>> all =
      bootstrap.AllGather(ready.ok() ? absl::StrCat(kind, " ", device.gpu_uuid)
                                     : absl::StrCat(kGaveUp, ready.ToString()),
                          options.timeout, "choosing devices");
  if (!ready.ok()) return ready;
  if (!all.ok()) return all.status();
  std::map<absl::string_view, size_t> rank_by_gpu;
  for (size_t rank = 0; rank < all->size(); ++rank) {
    absl::string_view theirs = (*all)[rank];
    if (absl::ConsumePrefix(&theirs, kGaveUp)) {
      return absl::AbortedError(absl::StrCat("rank ", rank, " gave up: ", theirs));
    }
    const std::pair<absl::string_view, absl::string_view> kind_and_gpu =
        absl::StrSplit(theirs, absl::MaxSplits(' ', 1));
    const auto& [their_kind, their_gpu] = kind_and_gpu;
    if (their_kind != kind) {
      return Invalid("device = \"", options.device, "\": ", kind, " for this rank, ", their_kind,
                     " for rank ", rank, "; must be the same for all ranks");
    }
    if (device.gpus == nullptr) continue;
    if (const auto [other, is_new] = rank_by_gpu.emplace(their_gpu, rank); !is_new) {
      return Invalid("device = \"", options.device, "\": ", their_gpu, " for rank ", other->second,
                     " and for rank ", rank, "; must be cpu, or a GPU of its own for each rank");
    }
  }
  return absl::OkStatus();
}

}  // namespace nsa::tools
