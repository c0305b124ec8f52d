// The GPUs of this host.
#ifndef COMM_CONFORMANCE_GPUS_H_
#define COMM_CONFORMANCE_GPUS_H_

namespace nsa::comm::conformance {

// Ranks that tests start on this host: one for each GPU, or NSA_GPU_TEST_RANKS of them where there
// are fewer GPUs (which NCCL allows since 2.30, with NCCL_MULTI_RANK_GPU_ENABLE=1); none without
// GPUs. Asks CUDA in a process of its own: it does not survive a fork.
int CountGpuRanks();

// That of a rank: its number modulo that of the GPUs. In the rank's own process.
int GpuOfRank(int rank);

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_GPUS_H_
