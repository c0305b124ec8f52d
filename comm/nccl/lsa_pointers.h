// NCCL's device API, as far as it is used: where the memory of a window lies for this rank.
#ifndef COMM_NCCL_LSA_POINTERS_H_
#define COMM_NCCL_LSA_POINTERS_H_

#include <cuda_runtime_api.h>
#include <nccl.h>

namespace nsa::comm::nccl {

// How many ranks, of those next to this one, load and store each other's windows.
int LsaTeamSize(ncclComm_t comm);

// bases[r], in device memory, becomes the address of rank r's memory, for r in [0, size). That of
// `rank` itself becomes `own`: NCCL maps it a second time, and two addresses of one memory ask for
// fences.
cudaError_t LaunchLsaPointers(ncclWindow_t window, int rank, int size, char* own, char** bases,
                              cudaStream_t stream);

}  // namespace nsa::comm::nccl

#endif  // COMM_NCCL_LSA_POINTERS_H_
