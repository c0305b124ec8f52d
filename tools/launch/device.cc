#include "tools/launch/device.h"

#include <algorithm>
#include <map>
#include <thread>
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
  if (gpus != nullptr && !over_ucx) {
    return gpus->CreateCommunicator(std::move(bootstrap), gpu, timeout, adopted_nccl);
  }
  comm::UcxOptions options;
  options.timeout = timeout;
  options.connect_timeout = timeout;
  if (gpus != nullptr) {
    auto memory = gpus->CreateMemory(gpu);
    if (!memory.ok()) return memory.status();
    options.device_memory = *std::move(memory);
  }
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

absl::Status AgreeOnDevice(const absl::Status& ready, const Device& device,
                           comm::Bootstrap& bootstrap, absl::string_view requested,
                           absl::Duration timeout) {
  constexpr absl::string_view kGaveUp = "!";
  const std::string kind = absl::StrCat(device.kind(), device.over_ucx ? "-over-ucx" : "");
  const absl::StatusOr<std::vector<std::string>> all =
      bootstrap.AllGather(ready.ok() ? absl::StrCat(kind, " ", device.gpu_uuid)
                                     : absl::StrCat(kGaveUp, ready.ToString()),
                          timeout, "choosing devices");
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
      return Invalid("device = \"", requested, "\": ", kind, " for this rank, ", their_kind,
                     " for rank ", rank, "; must be the same for all ranks");
    }
    if (device.gpus == nullptr) continue;
    if (const auto [other, is_new] = rank_by_gpu.emplace(their_gpu, rank); !is_new) {
      return Invalid("device = \"", requested, "\": ", their_gpu, " for rank ", other->second,
                     " and for rank ", rank, "; must be cpu, or a GPU of its own for each rank");
    }
  }
  return absl::OkStatus();
}

int ThreadsPerRank(int requested, int num_ranks_on_host) {
  if (requested > 0) return requested;
  const int cores = static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, cores / std::max(1, num_ranks_on_host));
}

}  // namespace nsa::tools
