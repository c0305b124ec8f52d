#include <climits>
#include <cstdint>

#include "comm/nccl/device_waits.cuh"
#include "comm/nccl/window_kernels.h"

namespace nsa::comm::nccl {
namespace {

// Grid: 1 CTA; thread r deals with rank r. So in all kernels but Gather.
__global__ void BeginWrite(PeerMemory memory) {
  WindowSignals* const mine = SignalsOf<WindowSignals>(memory, memory.rank);
  const int64_t epoch = mine->epoch;
  __syncthreads();
  const int peer = threadIdx.x;
  if (peer == 0) mine->epoch = epoch + 1;
  if (peer < memory.size) {
    Await(memory, &mine->released[peer], epoch, WaitingCall::kBeginWrite, peer);
  }
}

// The stream's earlier writes come before the flag, for whoever acquires it on another device.
__global__ void Publish(PeerMemory memory) {
  const int peer = threadIdx.x;
  if (peer >= memory.size) return;
  const int64_t epoch = SignalsOf<WindowSignals>(memory, memory.rank)->epoch;
  __threadfence_system();
  StoreRelease(&SignalsOf<WindowSignals>(memory, peer)->published[memory.rank], epoch);
}

__global__ void Release(PeerMemory memory, bool for_ever) {
  const int peer = threadIdx.x;
  if (peer >= memory.size) return;
  const int64_t epoch = for_ever ? LLONG_MAX : SignalsOf<WindowSignals>(memory, memory.rank)->epoch;
  __threadfence_system();
  StoreRelease(&SignalsOf<WindowSignals>(memory, peer)->released[memory.rank], epoch);
}

__device__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void InitBarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// One thread: global memory, of whichever device, to the slot; returns when it is there.
__device__ void CopyToSlot(const char* src, char* slot, uint32_t num_bytes, uint64_t* barrier,
                           uint32_t phase) {
  const uint32_t address = SharedAddress(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address),
               "r"(num_bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(slot)),
      "l"(src), "r"(num_bytes), "r"(address)
      : "memory");
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(address), "r"(phase)
        : "memory");
  }
}

__device__ void StartCopyFromSlot(const char* slot, char* dst, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst),
               "r"(SharedAddress(slot)), "r"(num_bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// A whole warp copies what the copy engine cannot: sizes and places not divisible by 16.
__device__ void CopyByWarp(const char* src, char* dst, int64_t num_bytes, int lane) {
  if (((reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst) | num_bytes) & 7) ==
      0) {
    for (int64_t i = 8 * lane; i < num_bytes; i += 8 * 32) {
      *reinterpret_cast<uint64_t*>(dst + i) = *reinterpret_cast<const volatile uint64_t*>(src + i);
    }
  } else {
    for (int64_t i = lane; i < num_bytes; i += 32) {
      dst[i] = *static_cast<const volatile char*>(src + i);
    }
  }
}

__device__ void ReportList(const GatherArguments& arguments, ListFaultKind kind, int64_t index,
                           int64_t value, int32_t peer) {
  if (atomicCAS(arguments.list_fault_taken, 0u, 1u) != 0) return;
  volatile ListFault* const fault = arguments.list_fault;
  fault->index = index;
  fault->value = value;
  fault->record_bytes = arguments.record_bytes;
  fault->peer = peer;
  __threadfence_system();
  fault->kind = static_cast<uint32_t>(kind);
}

// Grid: any number of CTAs of any number of warps up to kMaxGatherWarps. A warp owns one slot of
// shared memory and every (CTAs x warps)-th piece of the records, pieces being up to
// kGatherSlotBytes of one record. So a CTA has as many reads under way as it has warps, which is
// what hides the latency of the link.
__global__ void __launch_bounds__(32 * kMaxGatherWarps)
    Gather(PeerMemory memory, GatherArguments arguments) {
  extern __shared__ __align__(128) char slots[];
  __shared__ uint64_t barriers[kMaxGatherWarps];

  const int count = *arguments.count;
  if (count < 0 || count > arguments.max_count) {
    if (threadIdx.x == 0) ReportList(arguments, ListFaultKind::kCount, 0, count, 0);
    return;
  }
  if (count == 0) return;
  if (arguments.peers == nullptr || arguments.offsets == nullptr || arguments.dst == nullptr) {
    if (threadIdx.x == 0) ReportList(arguments, ListFaultKind::kNull, 0, count, 0);
    return;
  }

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  char* const slot = slots + warp * kGatherSlotBytes;
  uint64_t* const barrier = &barriers[warp];
  if (lane == 0) InitBarrier(barrier);
  __syncwarp();

  const WindowSignals* const signals = arguments.signals;
  const int64_t epoch = signals == nullptr ? 0 : signals->epoch;
  const int64_t record_bytes = arguments.record_bytes;
  const int64_t pieces = (record_bytes + kGatherSlotBytes - 1) / kGatherSlotBytes;
  const int64_t total = count * pieces;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
  uint64_t published[kMaxRanks / 64] = {};  // bit per rank whose Publish this warp has seen
  uint32_t phase = 0;

  int64_t item = static_cast<int64_t>(warp) * gridDim.x + blockIdx.x;
  int64_t record = item / pieces;
  int32_t next_peer = item < total ? arguments.peers[record] : 0;
  int64_t next_offset = item < total ? arguments.offsets[record] : 0;
  while (item < total) {
    const int32_t peer = next_peer;
    const int64_t offset = next_offset;
    const int64_t begin = (item - record * pieces) * kGatherSlotBytes;
    char* const dst = arguments.dst + record * record_bytes + begin;
    const int64_t this_record = record;
    item += stride;
    if (item < total) {
      record = item / pieces;
      next_peer = arguments.peers[record];
      next_offset = arguments.offsets[record];
    }

    if (peer < 0 || peer >= memory.size) {
      if (lane == 0) ReportList(arguments, ListFaultKind::kPeer, this_record, peer, peer);
      continue;
    }
    if (offset < 0 || offset > arguments.window_bytes[peer] - record_bytes) {
      if (lane == 0) ReportList(arguments, ListFaultKind::kOffset, this_record, offset, peer);
      continue;
    }
    if (signals != nullptr && peer != memory.rank) {
      bool seen = false;
#pragma unroll
      for (int i = 0; i < kMaxRanks / 64; ++i) {
        if (peer / 64 == i) seen = (published[i] >> (peer % 64)) & 1;
      }
      if (!seen) {
        int ok = 0;
        if (lane == 0) {
          ok = Await(memory, &signals->published[peer], epoch, WaitingCall::kGather, peer);
          // What was acquired by a load is now also there for the copy engine.
          asm volatile("fence.proxy.async;" ::: "memory");
        }
        if (__shfl_sync(~0u, ok, 0) == 0) break;
        __syncwarp();  // for CopyByWarp: a shuffle alone orders no memory
        __threadfence_system();
#pragma unroll
        for (int i = 0; i < kMaxRanks / 64; ++i) {
          if (peer / 64 == i) published[i] |= uint64_t{1} << (peer % 64);
        }
      }
    }

    const char* const src = memory.bases[peer] + offset + begin;
    const int64_t num_bytes = min(static_cast<int64_t>(kGatherSlotBytes), record_bytes - begin);
    const uintptr_t places = reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst);
    if (((places | static_cast<uintptr_t>(num_bytes)) & 15) != 0) {
      CopyByWarp(src, dst, num_bytes, lane);
    } else if (lane == 0) {
      // The slot is free again when what it held has been read out of it.
      asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
      CopyToSlot(src, slot, static_cast<uint32_t>(num_bytes), barrier, phase);
      phase ^= 1;
      StartCopyFromSlot(slot, dst, static_cast<uint32_t>(num_bytes));
    }
    __syncwarp();
  }
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

int Threads(const PeerMemory& memory) { return (memory.size + 31) / 32 * 32; }

}  // namespace

cudaError_t LoadWindowKernels() {
  cudaFuncAttributes attributes;
  for (const void* kernel :
       {reinterpret_cast<const void*>(BeginWrite), reinterpret_cast<const void*>(Publish),
        reinterpret_cast<const void*>(Release), reinterpret_cast<const void*>(Gather)}) {
    if (cudaError_t e = cudaFuncGetAttributes(&attributes, kernel); e != cudaSuccess) return e;
  }
  return cudaFuncSetAttribute(Gather, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kMaxGatherWarps * kGatherSlotBytes);
}

cudaError_t LaunchBeginWrite(const PeerMemory& memory, cudaStream_t stream) {
  BeginWrite<<<1, Threads(memory), 0, stream>>>(memory);
  return cudaGetLastError();
}

cudaError_t LaunchPublish(const PeerMemory& memory, cudaStream_t stream) {
  Publish<<<1, Threads(memory), 0, stream>>>(memory);
  return cudaGetLastError();
}

cudaError_t LaunchRelease(const PeerMemory& memory, cudaStream_t stream) {
  Release<<<1, Threads(memory), 0, stream>>>(memory, false);
  return cudaGetLastError();
}

cudaError_t LaunchRetire(const PeerMemory& memory, cudaStream_t stream) {
  Release<<<1, Threads(memory), 0, stream>>>(memory, true);
  return cudaGetLastError();
}

cudaError_t LaunchGather(const PeerMemory& memory, const GatherArguments& arguments, int num_ctas,
                         int num_warps, cudaStream_t stream) {
  Gather<<<num_ctas, 32 * num_warps, num_warps * kGatherSlotBytes, stream>>>(memory, arguments);
  return cudaGetLastError();
}

}  // namespace nsa::comm::nccl
