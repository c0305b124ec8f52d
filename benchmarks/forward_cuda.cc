// The whole forward on GPUs: time, and whether ranks and GPU agree with one rank and with the CPU.
//
//   forward_cuda --tokens 65536                      one GPU
//   mpirun -n 4 forward_cuda --tokens 65536          one GPU a rank
//   forward_cuda --tokens 4096 --check               against the CPU kernels, relative L2 of o
//
// Prints one line of JSON: median, min and max of the step in milliseconds over --reps, the slowest
// rank of each repetition counting; device events around the call, the L2 flushed before it.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "comm/bootstrap/mpi_bootstrap.h"
#include "comm/bootstrap/tcp_bootstrap.h"
#include "comm/loopback/loopback.h"
#include "comm/nccl/nccl_communicator.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/cuda_kernels.h"
#include "nsa/engine.h"

ABSL_FLAG(int64_t, tokens, 8192, "tokens of the global sequence");
ABSL_FLAG(int, q_heads, 64, "Hq");
ABSL_FLAG(int, kv_heads, 4, "Hkv");
ABSL_FLAG(int, dim_qk, 128, "Dk");
ABSL_FLAG(int, dim_v, 128, "Dv");
ABSL_FLAG(std::string, sharding, "zigzag", "see ShardPlan::Parse");
ABSL_FLAG(int, reps, 10, "timed calls, after 3 that are not timed");
ABSL_FLAG(bool, check, false, "compare o with the CPU kernels' on one rank");

namespace nsa {
namespace {

#define RETURN_IF_ERROR(expression)                                         \
  do {                                                                      \
    if (absl::Status _status = (expression); !_status.ok()) return _status; \
  } while (false)

absl::Status Cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(what, ": ", cudaGetErrorString(error)));
}

// About normal, the same for an element of the global tensor on every rank and device.
float Value(uint64_t seed, uint64_t index) {
  uint64_t z = (index + 1) * 0x9e3779b97f4a7c15 + seed * 0xbf58476d1ce4e5b9;
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    z ^= z >> 31;
    sum += static_cast<float>(z & 0xffff) + static_cast<float>(z >> 48);
  }
  return (sum / 65536.0f - 2.0f) * 1.7320508f;
}

uint16_t Bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float FromBf16(uint16_t x) {
  const uint32_t bits = uint32_t{x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

NsaConfig MakeConfig() {
  NsaConfig config;
  config.num_q_heads = absl::GetFlag(FLAGS_q_heads);
  config.num_kv_heads = absl::GetFlag(FLAGS_kv_heads);
  config.head_dim_qk = absl::GetFlag(FLAGS_dim_qk);
  config.head_dim_v = absl::GetFlag(FLAGS_dim_v);
  return config;
}

// This rank's tensors in the memory of `kernels`.
class RankTensors {
 public:
  absl::Status Make(kernels::Kernels& kernels, const NsaConfig& config, const ShardPlan& plan,
                    int rank) {
    tokens_ = plan.TokensOfRank(rank);
    auto make = [&](int64_t heads, int64_t dim, uint64_t seed, ConstTensor* view) {
      const int64_t row = heads * dim;
      std::vector<uint16_t> host(tokens_ * row);
      for (int64_t t = 0; t < tokens_; ++t) {
        const uint64_t first = plan.GlobalToken(rank, t) * row;
        for (int64_t i = 0; i < row; ++i) host[t * row + i] = Bf16(Value(seed, first + i));
      }
      return Load(kernels, host.data(), tokens_ * row * 2, DType::kBF16, {tokens_, heads, dim},
                  view);
    };
    ConstTensor k, v;
    RETURN_IF_ERROR(make(config.num_q_heads, config.head_dim_qk, 1, &inputs_.q));
    RETURN_IF_ERROR(make(config.num_kv_heads, config.head_dim_qk, 2, &k));
    RETURN_IF_ERROR(make(config.num_kv_heads, config.head_dim_v, 3, &v));
    inputs_.SetSharedKv(k, v);
    const std::vector<float> gate(tokens_ * config.num_q_heads * 3, 0.5f);
    RETURN_IF_ERROR(Load(kernels, gate.data(), static_cast<int64_t>(gate.size()) * 4, DType::kF32,
                         {tokens_, config.num_q_heads, 3}, &inputs_.gate));
    o_bytes_ = tokens_ * config.num_q_heads * config.head_dim_v * 2;
    auto memory = kernels.Allocate(std::max<int64_t>(1, o_bytes_));
    if (!memory.ok()) return memory.status();
    outputs_.o =
        Tensor((*memory)->data(), DType::kBF16, {tokens_, config.num_q_heads, config.head_dim_v});
    memory_.push_back(*std::move(memory));
    return absl::OkStatus();
  }

  const ForwardInputs& inputs() const { return inputs_; }
  const ForwardOutputs& outputs() const { return outputs_; }

  absl::StatusOr<std::vector<uint16_t>> Output(kernels::Kernels& kernels) const {
    std::vector<uint16_t> host(o_bytes_ / 2);
    RETURN_IF_ERROR(kernels.CopyToHost(host.data(), outputs_.o.data, o_bytes_, nullptr));
    RETURN_IF_ERROR(kernels.Synchronize(nullptr));
    return host;
  }

 private:
  absl::Status Load(kernels::Kernels& kernels, const void* host, int64_t num_bytes, DType dtype,
                    Dims shape, ConstTensor* view) {
    auto memory = kernels.Allocate(std::max<int64_t>(1, num_bytes));
    if (!memory.ok()) return memory.status();
    RETURN_IF_ERROR(kernels.CopyFromHost((*memory)->data(), host, num_bytes, nullptr));
    RETURN_IF_ERROR(kernels.Synchronize(nullptr));
    *view = ConstTensor((*memory)->data(), dtype, std::move(shape));
    memory_.push_back(*std::move(memory));
    return absl::OkStatus();
  }

  int64_t tokens_ = 0;
  int64_t o_bytes_ = 0;
  ForwardInputs inputs_;
  ForwardOutputs outputs_;
  std::vector<std::unique_ptr<kernels::Memory>> memory_;
};

// o of the whole sequence by the CPU kernels.
absl::StatusOr<std::vector<uint16_t>> OnCpu(const NsaConfig& config, int64_t tokens) {
  auto group = comm::LoopbackGroup::Create(1);
  if (!group.ok()) return group.status();
  auto kernels = kernels::CpuKernels::Create({});
  if (!kernels.ok()) return kernels.status();
  const ShardPlan plan = *ShardPlan::Parse("contiguous", tokens, 1);
  RankTensors tensors;
  RETURN_IF_ERROR(tensors.Make(**kernels, config, plan, 0));
  kernels::Kernels& cpu = **kernels;
  auto engine =
      Engine::Create({.config = config}, plan, std::move((*group)[0]), *std::move(kernels));
  if (!engine.ok()) return engine.status();
  RETURN_IF_ERROR((*engine)->Forward(tensors.inputs(), tensors.outputs()));
  return tensors.Output(cpu);
}

double RelativeL2OfRows(const std::vector<uint16_t>& whole, const std::vector<uint16_t>& mine,
                        const ShardPlan& plan, int rank, int64_t row) {
  double difference = 0, norm = 0;
  for (int64_t t = 0; t < plan.TokensOfRank(rank); ++t) {
    const int64_t first = plan.GlobalToken(rank, t) * row;
    for (int64_t i = 0; i < row; ++i) {
      const double expected = FromBf16(whole[first + i]);
      const double d = FromBf16(mine[t * row + i]) - expected;
      difference += d * d;
      norm += expected * expected;
    }
  }
  return std::sqrt(difference / norm);
}

// Sum of the bits of o with each element's global place: equal for equal o, however it is sharded.
uint64_t Fingerprint(const std::vector<uint16_t>& o, const ShardPlan& plan, int rank, int64_t row) {
  uint64_t sum = 0;
  for (int64_t t = 0; t < plan.TokensOfRank(rank); ++t) {
    uint64_t place = plan.GlobalToken(rank, t) * row;
    for (int64_t i = 0; i < row; ++i) sum += (++place * 0x9e3779b97f4a7c15) * (o[t * row + i] + 1);
  }
  return sum;
}

absl::Status Run(std::unique_ptr<comm::Bootstrap> bootstrap) {
  const int rank = bootstrap->rank();
  int num_gpus = 0;
  RETURN_IF_ERROR(Cuda(cudaGetDeviceCount(&num_gpus), "cudaGetDeviceCount"));
  const int device = rank % num_gpus;
  RETURN_IF_ERROR(Cuda(cudaSetDevice(device), "cudaSetDevice"));
  auto created = comm::NcclCommunicator::Create(std::move(bootstrap), {.device = device});
  if (!created.ok()) return created.status();
  std::shared_ptr<comm::Communicator> communicator = *std::move(created);
  auto made = kernels::CudaKernels::Create({.device = device});
  if (!made.ok()) return made.status();
  std::shared_ptr<kernels::Kernels> kernels = *std::move(made);
  const NsaConfig config = MakeConfig();
  const int64_t tokens = absl::GetFlag(FLAGS_tokens);
  auto plan = ShardPlan::Parse(absl::GetFlag(FLAGS_sharding), tokens, communicator->size());
  if (!plan.ok()) return plan.status();
  auto engine = Engine::Create({.config = config}, *plan, communicator, kernels);
  if (!engine.ok()) return engine.status();
  RankTensors tensors;
  RETURN_IF_ERROR(tensors.Make(*kernels, config, *plan, rank));

  cudaStream_t stream;
  RETURN_IF_ERROR(Cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream"));
  cudaEvent_t begin, end;
  RETURN_IF_ERROR(Cuda(cudaEventCreate(&begin), "event"));
  RETURN_IF_ERROR(Cuda(cudaEventCreate(&end), "event"));
  auto flush = kernels->Allocate(int64_t{256} << 20);
  if (!flush.ok()) return flush.status();
  std::vector<double> times;
  for (int i = -3; i < absl::GetFlag(FLAGS_reps); ++i) {
    RETURN_IF_ERROR(Cuda(cudaMemsetAsync((*flush)->data(), i, size_t{256} << 20, stream), "flush"));
    RETURN_IF_ERROR(Cuda(cudaStreamSynchronize(stream), "flush"));
    RETURN_IF_ERROR(communicator->Barrier());
    RETURN_IF_ERROR(Cuda(cudaEventRecord(begin, stream), "event"));
    RETURN_IF_ERROR((*engine)->Forward(tensors.inputs(), tensors.outputs(), stream));
    RETURN_IF_ERROR(Cuda(cudaEventRecord(end, stream), "event"));
    RETURN_IF_ERROR(Cuda(cudaStreamSynchronize(stream), "forward"));
    float milliseconds = 0;
    RETURN_IF_ERROR(Cuda(cudaEventElapsedTime(&milliseconds, begin, end), "event"));
    auto all = communicator->HostAllGather(absl::StrCat(milliseconds));
    if (!all.ok()) return all.status();
    double slowest = 0;
    for (const std::string& one : *all) slowest = std::max(slowest, std::atof(one.c_str()));
    if (i >= 0) times.push_back(slowest);
  }
  std::sort(times.begin(), times.end());

  auto o = tensors.Output(*kernels);
  if (!o.ok()) return o.status();
  const int64_t row = int64_t{config.num_q_heads} * config.head_dim_v;
  std::string mine = absl::StrCat(Fingerprint(*o, *plan, rank, row));
  if (absl::GetFlag(FLAGS_check)) {
    auto whole = OnCpu(config, tokens);
    if (!whole.ok()) return whole.status();
    std::fprintf(stderr, "rank %d: relative L2 of o against the CPU kernels %.2e\n", rank,
                 RelativeL2OfRows(*whole, *o, *plan, rank, row));
  }
  auto fingerprints = communicator->HostAllGather(mine);
  if (!fingerprints.ok()) return fingerprints.status();
  uint64_t fingerprint = 0;
  for (const std::string& one : *fingerprints)
    fingerprint += std::strtoull(one.c_str(), nullptr, 10);
  size_t free_bytes = 0, total_bytes = 0;
  RETURN_IF_ERROR(Cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo"));
  cudaDeviceProp properties;
  RETURN_IF_ERROR(Cuda(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties"));
  if (rank == 0) {
    std::printf(
        "{\"gpu\": \"%s\", \"gpus\": %d, \"tokens\": %ld, \"q_heads\": %d, \"kv_heads\": %d, "
        "\"dim_qk\": %d, \"dim_v\": %d, \"sharding\": \"%s\", \"median_ms\": %.3f, \"min_ms\": "
        "%.3f, \"max_ms\": %.3f, \"reps\": %zu, \"device_memory_used_mib\": %zu, \"fingerprint\": "
        "\"%016lx\"}\n",
        properties.name, communicator->size(), static_cast<long>(tokens), config.num_q_heads,
        config.num_kv_heads, config.head_dim_qk, config.head_dim_v,
        absl::GetFlag(FLAGS_sharding).c_str(), times[times.size() / 2], times.front(), times.back(),
        times.size(), (total_bytes - free_bytes) >> 20, static_cast<unsigned long>(fingerprint));
  }
  return communicator->Barrier();
}

absl::Status RunUnderMpiOrAlone() {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) {
    comm::TcpBootstrapOptions options;
    options.master_addr = "127.0.0.1";
    options.master_port = 29400;
    auto bootstrap = comm::CreateTcpBootstrap(options);
    return bootstrap.ok() ? Run(*std::move(bootstrap)) : bootstrap.status();
  }
  auto session = comm::MpiSession::Start();
  if (!session.ok()) return session.status();
  auto bootstrap = comm::CreateMpiBootstrap();
  if (!bootstrap.ok()) return bootstrap.status();
  RETURN_IF_ERROR(Run(*std::move(bootstrap)));
  return (*session)->Finish(absl::Seconds(60));
}

}  // namespace
}  // namespace nsa

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = nsa::RunUnderMpiOrAlone();
  if (status.ok()) return 0;
  std::fprintf(stderr, "forward_cuda: %s\n", status.ToString().c_str());
  return 1;
}
