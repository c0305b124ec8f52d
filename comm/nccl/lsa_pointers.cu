#include <nccl_device.h>

#include "comm/nccl/lsa_pointers.h"

namespace nsa::comm::nccl {
namespace {

// Grid: 1 CTA; thread r finds the memory of rank r.
__global__ void LsaPointers(ncclWindow_t window, int rank, char* own, char** bases) {
  const int peer = threadIdx.x;
  bases[peer] = peer == rank ? own : static_cast<char*>(ncclGetPeerPointer(window, 0, peer));
}

}  // namespace

int LsaTeamSize(ncclComm_t comm) { return ncclTeamLsa(comm).nRanks; }

cudaError_t LaunchLsaPointers(ncclWindow_t window, int rank, int size, char* own, char** bases,
                              cudaStream_t stream) {
  LsaPointers<<<1, size, 0, stream>>>(window, rank, own, bases);
  return cudaGetLastError();
}

}  // namespace nsa::comm::nccl
