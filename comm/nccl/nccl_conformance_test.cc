// The conformance suite over NCCL, each rank a process with a GPU.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "comm/conformance/check.h"
#include "comm/conformance/conformance.h"
#include "comm/conformance/gpus.h"
#include "comm/conformance/launch.h"
#include "comm/cuda_status.h"
#include "comm/nccl/test_group.h"
#include "gtest/gtest.h"

namespace nsa::comm {
namespace {

using conformance::Test;

struct Case {
  std::string name;
  std::function<std::vector<Test>()> tests;
  bool use_windows;
  int size;  // 0: all GPUs
};

class NcclConformance : public testing::TestWithParam<Case> {};

TEST_P(NcclConformance, Passes) {
  const int num_ranks = conformance::CountGpuRanks();
  const int size = GetParam().size == 0 ? num_ranks : GetParam().size;
  if (num_ranks < std::max(size, GetParam().size == 0 ? 2 : 1)) {
    GTEST_SKIP() << "needs more than " << num_ranks << " ranks with GPUs";
  }
  NcclOptions options;
  options.use_windows = GetParam().use_windows;
  options.check_exchange = true;
  const int port = conformance::FreePort();
  const auto create = [&](const std::string& group, int rank,
                          absl::Duration timeout) -> absl::StatusOr<std::unique_ptr<Communicator>> {
    NcclOptions with_timeout = options;
    with_timeout.timeout = timeout;
    auto comm = nccl::CreateOnThisHost(group, rank, size, port, with_timeout);
    if (!comm.ok()) return comm.status();
    return nccl::HostView(*std::move(comm));
  };
  EXPECT_EQ(conformance::RunTestsOnProcesses(GetParam().tests(), size, create), absl::OkStatus());
}

// Epochs and all-gathers in one graph, replayed with other data each time, at full speed: nothing
// holds the ranks' streams together but the window and the collective.
class Replay {
 public:
  static constexpr int64_t kRecord = 4096;
  static constexpr int kRecords = 64;

  explicit Replay(Communicator& comm) : comm_(comm) {
    for (int r = 0; r < comm.size(); ++r) runs_.push_back({r, r * kRecord, kRecord});
    for (int i = kRecords - 1; i >= 0; --i) {
      peers_.push_back((comm.rank() + i) % comm.size());
      offsets_.push_back(i * kRecord);
    }
  }

  absl::Status Run() {
    auto window = comm_.CreateWindow(kRecords * kRecord);
    NSA_COMM_OK(window.status());
    auto peers = nccl::ToDevice(peers_);
    NSA_COMM_OK(peers.status());
    auto offsets = nccl::ToDevice(offsets_);
    NSA_COMM_OK(offsets.status());
    auto count = nccl::ToDevice(std::vector<int32_t>{kRecords});
    NSA_COMM_OK(count.status());
    auto source = AllocateDevice<unsigned char>(kRecords * kRecord);
    NSA_COMM_OK(source.status());
    auto dst = AllocateDevice<unsigned char>(kRecords * kRecord);
    NSA_COMM_OK(dst.status());
    auto gathered = AllocateDevice<unsigned char>(comm_.size() * kRecord);
    NSA_COMM_OK(gathered.status());
    cudaStream_t stream = nullptr;
    NSA_COMM_CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    const Stream owned_stream(stream);
    // The first one connects, which cannot be captured.
    NSA_COMM_OK(comm_.AllGather(gathered->get(), runs_, stream));
    NSA_COMM_CUDA_OK(cudaStreamSynchronize(stream));

    NSA_COMM_CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    NSA_COMM_OK((*window)->BeginWrite(stream));
    NSA_COMM_CUDA_OK(cudaMemcpyAsync((*window)->data(), source->get(), kRecords * kRecord,
                                     cudaMemcpyDeviceToDevice, stream));
    NSA_COMM_OK((*window)->Publish(stream));
    NSA_COMM_OK((*window)->Gather({peers->get(), offsets->get(), count->get(), kRecords}, kRecord,
                                  dst->get(), stream));
    NSA_COMM_OK((*window)->Release(stream));
    NSA_COMM_CUDA_OK(cudaMemcpyAsync(gathered->get() + comm_.rank() * kRecord, source->get(),
                                     kRecord, cudaMemcpyDeviceToDevice, stream));
    NSA_COMM_OK(comm_.AllGather(gathered->get(), runs_, stream));
    cudaGraph_t graph = nullptr;
    NSA_COMM_CUDA_OK(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t executable = nullptr;
    NSA_COMM_CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
    for (int round = 1; round <= 200; ++round) {
      NSA_COMM_CUDA_OK(
          cudaMemsetAsync(source->get(), Value(round, comm_.rank()), kRecords * kRecord, stream));
      NSA_COMM_CUDA_OK(cudaGraphLaunch(executable, stream));
      if (round % 5 != 0) continue;
      NSA_COMM_CUDA_OK(cudaStreamSynchronize(stream));
      NSA_COMM_OK(comm_.HealthCheck());
      NSA_COMM_OK(Check(round, dst->get(), gathered->get()));
    }
    NSA_COMM_CUDA_OK(cudaGraphExecDestroy(executable));
    NSA_COMM_CUDA_OK(cudaGraphDestroy(graph));
    return comm_.Barrier();
  }

 private:
  static unsigned char Value(int round, int rank) {
    return static_cast<unsigned char>(round * 7 + rank * 50);
  }

  absl::Status Check(int round, const unsigned char* dst, const unsigned char* gathered) {
    std::vector<unsigned char> got(kRecords * kRecord);
    std::vector<unsigned char> all(comm_.size() * kRecord);
    NSA_COMM_CUDA_OK(cudaMemcpy(got.data(), dst, got.size(), cudaMemcpyDeviceToHost));
    NSA_COMM_CUDA_OK(cudaMemcpy(all.data(), gathered, all.size(), cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < got.size(); ++i) {
      NSA_COMM_CHECK(got[i] == Value(round, peers_[i / kRecord]),
                     absl::StrCat("round ", round, " byte ", i));
    }
    for (size_t i = 0; i < all.size(); ++i) {
      NSA_COMM_CHECK(all[i] == Value(round, static_cast<int>(i / kRecord)),
                     absl::StrCat("round ", round, " gathered byte ", i));
    }
    return absl::OkStatus();
  }

  Communicator& comm_;
  std::vector<GatherRun> runs_;
  std::vector<int32_t> peers_;
  std::vector<int64_t> offsets_;
};

TEST(NcclGraph, EpochsAndCollectivesReplay) {
  const int num_ranks = conformance::CountGpuRanks();
  if (num_ranks < 1) GTEST_SKIP() << "needs a GPU";
  if (conformance::GpuRanksShareGpus()) GTEST_SKIP() << "needs a GPU for each rank";
  const int size = num_ranks;
  const int port = conformance::FreePort();
  const auto run = [&](int rank) -> absl::Status {
    auto comm = nccl::CreateOnThisHost("graph", rank, size, port, {});
    NSA_COMM_OK(comm.status());
    return Replay(**comm).Run();
  };
  EXPECT_EQ(conformance::RunOnProcesses(size, run), absl::OkStatus());
}

// Device memory of peers, which the suite does not see from the host.
TEST(NcclWindow, ReachesAllPeers) {
  const int size = conformance::CountGpuRanks();
  if (size < 1) GTEST_SKIP() << "needs a GPU";
  if (conformance::GpuRanksShareGpus()) GTEST_SKIP() << "needs a GPU for each rank";
  constexpr int64_t kBytes = 1 << 20;
  const int port = conformance::FreePort();
  const auto run = [&](int rank) -> absl::Status {
    auto comm = nccl::CreateOnThisHost("peers", rank, size, port, {});
    NSA_COMM_OK(comm.status());
    auto window = (*comm)->CreateWindow(size * kBytes);
    NSA_COMM_OK(window.status());
    NSA_COMM_CHECK((*window)->PeerData(rank) == (*window)->data(), "of the own rank");
    // Each rank stores a part of every window, and loads what others have stored in every window.
    const auto part = [&](int peer, int of) {
      return static_cast<char*>((*window)->PeerData(peer)) + of * kBytes;
    };
    for (int peer = 0; peer < size; ++peer) {
      NSA_COMM_CHECK((*window)->PeerData(peer) != nullptr, peer);
      NSA_COMM_CUDA_OK(cudaMemset(part(peer, rank), 16 * peer + rank, kBytes));
    }
    NSA_COMM_CUDA_OK(cudaDeviceSynchronize());
    NSA_COMM_OK((*comm)->Barrier());
    std::vector<char> got(kBytes);
    for (int peer = 0; peer < size; ++peer) {
      for (int of = 0; of < size; ++of) {
        NSA_COMM_CUDA_OK(cudaMemcpy(got.data(), part(peer, of), kBytes, cudaMemcpyDeviceToHost));
        NSA_COMM_CHECK(std::all_of(got.begin(), got.end(),
                                   [&](char c) { return c == static_cast<char>(16 * peer + of); }),
                       absl::StrCat("part of rank ", of, " in the window of rank ", peer));
      }
    }
    return (*comm)->Barrier();
  };
  EXPECT_EQ(conformance::RunOnProcesses(size, run), absl::OkStatus());
}

std::vector<Test> Without(std::vector<Test> tests, absl::string_view part) {
  tests.erase(std::remove_if(tests.begin(), tests.end(),
                             [&](const Test& test) { return absl::StrContains(test.name, part); }),
              tests.end());
  return tests;
}

// Reads in packs are served when their owners come to a Gather or Release.
std::vector<Test> PackedWindowTests() {
  return Without(conformance::WindowTests(), "ReadsNeedNoCallAtTheOwner");
}

// And then it is Release that waits, not BeginWrite.
std::vector<Test> PackedErrorTests() { return Without(conformance::ErrorTests(), "BeginWrite"); }

std::vector<Case> Cases() {
  return {{"Alone", conformance::AllTests, true, 1},
          {"Collectives", conformance::CollectiveTests, true, 0},
          {"Windows", conformance::WindowTests, true, 0},
          {"Errors", conformance::ErrorTests, true, 0},
          {"PackedCollectives", conformance::CollectiveTests, false, 0},
          {"PackedWindows", PackedWindowTests, false, 0},
          {"PackedErrors", PackedErrorTests, false, 0}};
}

INSTANTIATE_TEST_SUITE_P(All, NcclConformance, testing::ValuesIn(Cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace nsa::comm
