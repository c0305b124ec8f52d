// Which slots of a peer hold gradients of this rank's records.
#include "kernels/cuda/cta_scan.cuh"
#include "kernels/cuda/launch.h"

namespace nsa::kernels::cuda {
namespace {

constexpr int kThreads = 1024;

// Grid: one CTA owns the list: a scan over (kv head, block), the order of the records.
__global__ void __launch_bounds__(kThreads) PlanReturnKernel(PlanReturnParams params) {
  __shared__ int32_t warp_sums[kThreads / 32];
  const BlockOwners& owners = params.owners;
  const int64_t num_places = params.kv_heads.size() * owners.num_blocks;
  const int64_t own_blocks = owners.blocks_of_rank[owners.this_rank];
  int32_t count = 0;
  for (int64_t base = 0; base < num_places; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    bool mine = false;
    int64_t slot = 0, record = 0;
    if (i < num_places) {
      const int64_t head = params.kv_heads.begin + i / owners.num_blocks;
      const int64_t block = i % owners.num_blocks;
      slot = params.peer_locations[head * owners.num_blocks + block] - params.peer_own_records;
      record = head * own_blocks + owners.ordinal[block];
      mine = slot >= 0 && owners.rank[block] == owners.this_rank;
    }
    int32_t num_new = 0;
    const int32_t place = count + ScanBefore<kThreads>(mine, warp_sums, num_new);
    if (mine) {
      params.peers[place] = params.peer;
      params.offsets[place] = slot * params.record_gradient_bytes;
      params.own_records[place] = static_cast<int32_t>(record);
    }
    count += num_new;
  }
  if (threadIdx.x == 0) *params.count = count;
}

}  // namespace

cudaError_t LaunchPlanReturn(const PlanReturnParams& params, const Device&, cudaStream_t stream) {
  PlanReturnKernel<<<1, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace nsa::kernels::cuda
