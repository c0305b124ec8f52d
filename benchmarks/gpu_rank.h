// Starting a rank of a benchmark: one GPU a process, alone or under mpirun.
#ifndef BENCHMARKS_GPU_RANK_H_
#define BENCHMARKS_GPU_RANK_H_

#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "comm/communicator.h"
#include "comm/nccl/nccl_communicator.h"

namespace nsa::benchmarks {

struct GpuRank {
  int device;  // the current one
  std::shared_ptr<comm::Communicator> communicator;
};

// Collective. Rank r of the processes that mpirun started, or the only rank, gets GPU r modulo the
// GPUs of its host; `run` is called with it.
absl::Status RunOnGpu(bool under_mpirun, comm::NcclOptions options,
                      const std::function<absl::Status(GpuRank rank)>& run);

}  // namespace nsa::benchmarks

#endif  // BENCHMARKS_GPU_RANK_H_
