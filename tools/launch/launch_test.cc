#include "tools/launch/launch.h"

#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "tools/launch/device.h"

namespace nsa::tools {
namespace {

const char* EmptyEnvironment(const char*) { return nullptr; }

std::string CpuThreads(int count) {
  return absl::StrCat(count, count == 1 ? " CPU thread" : " CPU threads");
}

// GPUs whose kernels compute on the CPU and whose communicators reach one rank only: those of a
// host, or as many of them, from `first`, as a launcher shows to a process.
class FakeGpus : public Gpus {
 public:
  explicit FakeGpus(int count, int first = 0) : count_(count), first_(first) {}
  int count() const override { return count_; }
  std::string NameOf(int gpu) const override { return absl::StrCat("fake GPU ", gpu); }
  absl::StatusOr<std::string> UuidOf(int gpu) const override {
    return absl::StrCat("GPU-", first_ + gpu);
  }
  absl::StatusOr<std::unique_ptr<kernels::Kernels>> CreateKernels(int gpu) override {
    if (gpu >= count_) return absl::OutOfRangeError("no such GPU");
    if (gpu == kBrokenGpu) return absl::ResourceExhaustedError("no memory");
    return kernels::CpuKernels::Create({.num_threads = 1});
  }
  absl::StatusOr<std::shared_ptr<comm::DeviceMemory>> CreateMemory(int) override {
    return absl::UnimplementedError("no memory of a GPU");
  }
  absl::StatusOr<std::unique_ptr<comm::Communicator>> CreateCommunicator(
      std::unique_ptr<comm::Bootstrap> bootstrap, int, absl::Duration, void*) override {
    if (bootstrap->size() > 1) return absl::UnimplementedError("GPUs agreed on");
    return std::move((*comm::LoopbackGroup::Create(1))[0]);
  }

  static constexpr int kBrokenGpu = 3;

 private:
  const int count_;
  const int first_;
};

LaunchOptions WithGpus(int count, LaunchOptions options = {}) {
  options.find_gpus = [count] { return std::make_shared<FakeGpus>(count); };
  return options;
}

LaunchOptions ShownGpu(int gpu) {
  return {.find_gpus = [gpu] { return std::make_shared<FakeGpus>(1, gpu); }};
}

LaunchOptions WithoutGpus(LaunchOptions options) {
  options.find_gpus = [] { return absl::NotFoundError("this host shows no GPU"); };
  return options;
}

// The device that the only rank of this process is given, or an error.
std::string DeviceOf(const LaunchOptions& options) {
  std::string device;
  const absl::Status status =
      RunRanks(options, EmptyEnvironment, [&device](const RankContext& context) {
        device = absl::StrCat(context.device, ", ", context.device_name);
        return context.Wait();
      });
  return status.ok() ? device : std::string(status.message());
}

// What a call for each of `ranks` returns, each in the environment of a process that torchrun
// started on one host.
std::vector<absl::Status> RunProcesses(const std::vector<LaunchOptions>& ranks) {
  std::vector<absl::Status> statuses(ranks.size());
  std::vector<std::thread> threads;
  const std::string port = absl::StrCat(20000 + getpid() % 20000);
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    threads.emplace_back([&, rank] {
      const std::map<std::string, std::string> variables = {
          {"RANK", absl::StrCat(rank)},
          {"WORLD_SIZE", absl::StrCat(ranks.size())},
          {"MASTER_ADDR", "127.0.0.1"},
          {"MASTER_PORT", port}};
      statuses[rank] = RunRanks(
          ranks[rank],
          [&variables](const char* name) {
            const auto it = variables.find(name);
            return it == variables.end() ? nullptr : it->second.c_str();
          },
          [](const RankContext&) { return absl::OkStatus(); });
    });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

TEST(RunRanksTest, ThreadsAreRanks) {
  std::atomic<int> seen = 0;
  const absl::Status status =
      RunRanks({.backend = "loopback", .num_ranks = 3}, EmptyEnvironment,
               [&seen](const RankContext& context) {
                 EXPECT_EQ(context.communicator->size(), 3);
                 EXPECT_EQ(context.device, "cpu");
                 EXPECT_EQ(context.device_name, CpuThreads(ThreadsPerRank(0, 3)));
                 EXPECT_NE(context.kernels, nullptr);
                 seen += 1 << (4 * context.communicator->rank());
                 return context.communicator->Barrier();
               });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(seen, 0x111);
}

TEST(RunRanksTest, ARankCanBeAlone) {
  for (const LaunchOptions& options : {LaunchOptions{.num_ranks = 3}, WithGpus(2)}) {
    const absl::Status status = RunRanks(options, EmptyEnvironment, [](const RankContext& context) {
      const auto alone = context.alone();
      if (!alone.ok()) return alone.status();
      EXPECT_EQ(alone->communicator->size(), 1);
      EXPECT_EQ(alone->device, context.device);
      return alone->communicator->Barrier();
    });
    EXPECT_TRUE(status.ok()) << status;
  }
}

TEST(RunRanksTest, GpusAreUsedWhereThereAreSomeUnlessCpusAreAskedFor) {
  const std::string cpu = absl::StrCat("cpu, ", CpuThreads(ThreadsPerRank(0, 1)));
  EXPECT_EQ(DeviceOf({}), cpu);
  EXPECT_EQ(DeviceOf(WithoutGpus({})), cpu);
  EXPECT_EQ(DeviceOf(WithGpus(1)), "cuda, fake GPU 0");
  EXPECT_EQ(DeviceOf(WithGpus(1, {.backend = "nccl"})), "cuda, fake GPU 0");
  EXPECT_EQ(DeviceOf(WithGpus(1, {.device = "cuda"})), "cuda, fake GPU 0");
  EXPECT_EQ(DeviceOf(WithGpus(1, {.device = "cpu"})), cpu);
  EXPECT_EQ(DeviceOf(WithGpus(1, {.backend = "loopback"})), cpu);
  EXPECT_EQ(DeviceOf(WithGpus(1, {.device = "cpu", .num_threads = 5})), "cpu, 5 CPU threads");
  const absl::Status status =
      RunRanks(WithGpus(4, {.num_ranks = 2}), EmptyEnvironment, [](const RankContext& context) {
        EXPECT_EQ(context.device, "cpu");
        return absl::OkStatus();
      });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(RunRanksTest, NamesWhatIsWrongWithDevices) {
  EXPECT_EQ(DeviceOf({.device = "gpu"}), "device = \"gpu\": must be auto, cpu or cuda");
  EXPECT_EQ(DeviceOf({.device = "cuda"}),
            "device = \"cuda\": must be auto or cpu, as this program uses no GPUs");
  EXPECT_EQ(DeviceOf(WithoutGpus({.device = "cuda"})),
            "device = \"cuda\": must be auto or cpu, as this host shows no GPU");
  EXPECT_EQ(DeviceOf(WithoutGpus({.backend = "nccl"})),
            "backend = \"nccl\": must be auto, loopback or ucx, as this host shows no GPU");
  EXPECT_EQ(DeviceOf(WithGpus(4, {.backend = "nccl", .device = "cpu"})),
            "backend = \"nccl\": moves GPUs' memory; with device = \"cpu\" it must be auto, "
            "loopback or ucx");
  for (const std::string backend : {"loopback", "ucx"}) {
    EXPECT_EQ(DeviceOf(WithGpus(4, {.backend = backend, .device = "cuda", .num_ranks = 2})),
              absl::StrCat("backend = \"", backend,
                           "\": moves the host's memory; with device = \"cuda\" it must be auto "
                           "or nccl"));
  }
  for (const LaunchOptions& options : {LaunchOptions{.device = "cuda", .num_ranks = 2},
                                       LaunchOptions{.backend = "nccl", .num_ranks = 2}}) {
    EXPECT_EQ(DeviceOf(WithGpus(4, options)),
              "ranks = 2: must be 0 or 1 on GPUs, where each rank is a process; mpirun or torchrun "
              "start several");
  }
  EXPECT_EQ(DeviceOf({.num_threads = 4097}), "threads = 4097: must lie in [0, 4096]");
}

TEST(RunRanksTest, ProcessesTakeAGpuEach) {
  // That the fake communicator refuses shows that the ranks got as far as making one.
  for (const absl::Status& status : RunProcesses({WithGpus(2), WithGpus(2)})) {
    EXPECT_EQ(status, absl::UnimplementedError("GPUs agreed on"));
  }
  for (const absl::Status& status : RunProcesses({WithGpus(2), WithGpus(2), WithGpus(2)})) {
    EXPECT_EQ(status, absl::InvalidArgumentError(
                          "device = \"auto\": there are 3 ranks on this host and 2 GPUs; must be "
                          "cpu, or ranks at most as many as GPUs"));
  }
}

TEST(RunRanksTest, ProcessesTakeTheGpuThatEachIsShown) {
  for (const absl::Status& status : RunProcesses({ShownGpu(2), ShownGpu(0), ShownGpu(1)})) {
    EXPECT_EQ(status, absl::UnimplementedError("GPUs agreed on"));
  }
  for (const absl::Status& status : RunProcesses({ShownGpu(2), ShownGpu(0), ShownGpu(2)})) {
    EXPECT_EQ(status, absl::InvalidArgumentError(
                          "device = \"auto\": GPU-2 for rank 0 and for rank 2; must be cpu, or a "
                          "GPU of its own for each rank"));
  }
}

TEST(RunRanksTest, ProcessesUseDevicesOfOneKindOrNone) {
  const absl::Time start = absl::Now();
  std::vector<absl::Status> statuses = RunProcesses({WithGpus(2), WithoutGpus({})});
  EXPECT_EQ(statuses[0], absl::InvalidArgumentError(
                             "device = \"auto\": cuda for this rank, cpu for rank 1; must be the "
                             "same for all ranks"));
  EXPECT_EQ(statuses[1], absl::InvalidArgumentError(
                             "device = \"auto\": cpu for this rank, cuda for rank 0; must be the "
                             "same for all ranks"));
  statuses = RunProcesses(std::vector<LaunchOptions>(4, WithGpus(4)));
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(statuses[rank],
              rank == FakeGpus::kBrokenGpu
                  ? absl::ResourceExhaustedError("no memory")
                  : absl::AbortedError("rank 3 gave up: RESOURCE_EXHAUSTED: no memory"));
  }
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
}

TEST(RunRanksTest, OneRankIsTheDefault) {
  const absl::Status status = RunRanks({}, EmptyEnvironment, [](const RankContext& context) {
    EXPECT_EQ(context.communicator->size(), 1);
    return absl::OkStatus();
  });
  EXPECT_TRUE(status.ok()) << status;
}

TEST(RunRanksTest, AFailureEndsTheOthersWaits) {
  const absl::Time start = absl::Now();
  const absl::Status status =
      RunRanks({.num_ranks = 3}, EmptyEnvironment, [](const RankContext& context) {
        if (context.communicator->rank() == 1) return absl::DataLossError("bad input");
        return context.communicator->Barrier();
      });
  EXPECT_EQ(status, absl::DataLossError("bad input"));
  EXPECT_LT(absl::Now() - start, absl::Seconds(20));
}

TEST(RunRanksTest, NamesWhatIsWrong) {
  const auto never = [](const RankContext&) { return absl::InternalError("must not run"); };
  EXPECT_EQ(RunRanks({.num_ranks = -1}, EmptyEnvironment, never),
            absl::InvalidArgumentError("ranks = -1: must be 0 or more"));
  EXPECT_EQ(RunRanks({.num_ranks = 1 << 30}, EmptyEnvironment, never),
            absl::InvalidArgumentError("ranks = 1073741824: must lie in [0, 4096] where they are "
                                       "threads of one process"));
  EXPECT_EQ(
      RunRanks({.backend = "telepathy"}, EmptyEnvironment, never),
      absl::InvalidArgumentError("backend = \"telepathy\": must be auto, loopback, ucx or nccl"));
  EXPECT_EQ(RunRanks({.backend = "ucx"}, EmptyEnvironment, never).code(),
            absl::StatusCode::kInvalidArgument);
  const auto mpirun = [](const char* name) {
    return absl::string_view(name) == "OMPI_COMM_WORLD_SIZE"   ? "4"
           : absl::string_view(name) == "OMPI_COMM_WORLD_RANK" ? "0"
                                                               : nullptr;
  };
  EXPECT_EQ(RunRanks({.num_ranks = 3}, mpirun, never),
            absl::InvalidArgumentError("ranks = 3: must be 0 or the number of processes, 4"));
  EXPECT_EQ(RunRanks({.backend = "loopback"}, mpirun, never),
            absl::InvalidArgumentError("backend = \"loopback\": makes all ranks in one process, "
                                       "but this is one of 4 processes"));
  const auto torchrun = [](const char* name) {
    return absl::string_view(name) == "WORLD_SIZE" ? "2" : nullptr;
  };
  EXPECT_EQ(RunRanks({}, torchrun, never).code(), absl::StatusCode::kInvalidArgument);
}

TEST(ThreadsPerRankTest, SharesTheCores) {
  EXPECT_EQ(ThreadsPerRank(7, 3), 7);
  EXPECT_GE(ThreadsPerRank(0, 1), 1);
  EXPECT_EQ(ThreadsPerRank(0, 1 << 20), 1);
}

}  // namespace
}  // namespace nsa::tools
