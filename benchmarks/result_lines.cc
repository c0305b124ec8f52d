#include "benchmarks/result_lines.h"

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>

#include "absl/flags/flag.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "benchmarks/gpu_timer.h"

ABSL_FLAG(int, q_heads, 64, "Hq");
ABSL_FLAG(int, kv_heads, 4, "Hkv");
ABSL_FLAG(int, dim_qk, 128, "Dk");
ABSL_FLAG(int, dim_v, 128, "Dv");

namespace nsa::benchmarks {

NsaConfig ConfigOfFlags() {
  NsaConfig config;
  config.num_q_heads = absl::GetFlag(FLAGS_q_heads);
  config.num_kv_heads = absl::GetFlag(FLAGS_kv_heads);
  config.head_dim_qk = absl::GetFlag(FLAGS_dim_qk);
  config.head_dim_v = absl::GetFlag(FLAGS_dim_v);
  return config;
}

absl::StatusOr<Json> Heading(absl::string_view pass, const GpuRank& gpu, const NsaConfig& config) {
  cudaDeviceProp properties;
  int runtime = 0;
  NSA_BENCHMARK_OK(
      CudaStatus(cudaGetDeviceProperties(&properties, gpu.device), "cudaGetDeviceProperties"));
  NSA_BENCHMARK_OK(CudaStatus(cudaRuntimeGetVersion(&runtime), "cudaRuntimeGetVersion"));
  return Json{{"implementation", "nsa"},
              {"pass", std::string(pass)},
              {"gpu", properties.name},
              {"cuda", absl::StrCat(runtime / 1000, ".", runtime % 1000 / 10)},
              {"gpus", gpu.communicator->size()},
              {"q_heads", config.num_q_heads},
              {"kv_heads", config.num_kv_heads},
              {"dim_qk", config.head_dim_qk},
              {"dim_v", config.head_dim_v}};
}

double Rounded(double value) { return std::round(value * 1e4) / 1e4; }

void Print(const GpuRank& gpu, const Json& line) {
  if (gpu.communicator->rank() > 0) return;
  std::printf("%s\n", line.dump().c_str());
  std::fflush(stdout);
}

absl::StatusOr<std::vector<int64_t>> NumbersOf(absl::string_view flag,
                                               const std::vector<std::string>& values) {
  std::vector<int64_t> numbers;
  for (const std::string& value : values) {
    int64_t number = 0;
    if (!absl::SimpleAtoi(value, &number) || number < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("--", flag, " has \"", value, "\": must be whole numbers, at least 1"));
    }
    numbers.push_back(number);
  }
  return numbers;
}

}  // namespace nsa::benchmarks
