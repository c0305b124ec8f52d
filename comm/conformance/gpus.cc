#include "comm/conformance/gpus.h"

#include <cuda_runtime_api.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>

#include "absl/strings/numbers.h"

namespace nsa::comm::conformance {

namespace {

int CountGpus() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int CountGpusElsewhere() {
  const pid_t child = fork();
  if (child == 0) _exit(std::min(CountGpus(), 100));
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child || !WIFEXITED(status)) return 0;
  return WEXITSTATUS(status);
}

}  // namespace

int CountGpuRanks() {
  const int num_gpus = CountGpusElsewhere();
  int num_ranks = 0;
  const char* asked = getenv("NSA_GPU_TEST_RANKS");
  if (num_gpus == 0 || asked == nullptr || !absl::SimpleAtoi(asked, &num_ranks)) return num_gpus;
  return std::max(num_gpus, num_ranks);
}

int GpuOfRank(int rank) { return rank % std::max(CountGpus(), 1); }

}  // namespace nsa::comm::conformance
