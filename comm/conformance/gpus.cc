#include "comm/conformance/gpus.h"

#include <cuda_runtime_api.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>

namespace nsa::comm::conformance {

namespace {

int asked_ranks = 0;

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
  return num_gpus == 0 ? 0 : std::max(num_gpus, asked_ranks);
}

void SetGpuRanks(int num_ranks) { asked_ranks = num_ranks; }

bool GpuRanksShareGpus() { return CountGpuRanks() > CountGpusElsewhere(); }

int GpuOfRank(int rank) { return rank % std::max(CountGpus(), 1); }

}  // namespace nsa::comm::conformance
