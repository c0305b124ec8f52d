// The GPUs of this host.
#ifndef COMM_CONFORMANCE_GPUS_H_
#define COMM_CONFORMANCE_GPUS_H_

namespace nsa::comm::conformance {

// Ranks that tests start on this host: one for each GPU, or as many as gpu_main.cc's --gpu_ranks
// says; none without GPUs. Asks CUDA in a process of its own: it does not survive a fork.
int CountGpuRanks();
void SetGpuRanks(int num_ranks);

// Whether these are more than GPUs: then they do not reach each other's windows.
bool GpuRanksShareGpus();

// That of a rank: its number modulo that of the GPUs. In the rank's own process.
int GpuOfRank(int rank);

}  // namespace nsa::comm::conformance

#endif  // COMM_CONFORMANCE_GPUS_H_
