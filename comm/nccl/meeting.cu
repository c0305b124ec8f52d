// Meeting: every CTA copies its slices of what this rank provides to this rank's staging area. The
// last one to have done so tells all ranks: one fence of the system for all CTAs, as these take
// their time and wait for each other. Every CTA waits for all ranks, then copies its slices of what
// this rank wants from the peers' staging areas.
//
// There are two staging areas. A rank that writes to one in meeting n + 2 has met all others in
// n + 1, and they came there after they had read what was in it in meeting n.
#include <algorithm>
#include <cstdint>
#include <numeric>

#include "comm/nccl/device_waits.cuh"
#include "comm/nccl/meeting.h"

namespace nsa::comm::nccl {
namespace {

constexpr int kThreads = 512;
static_assert(kThreads >= kMaxRanks, "a thread for every peer");
// Enough to keep a link busy.
constexpr int kMaxCtas = 32;
// One load of every thread of a CTA.
constexpr int64_t kMinSliceBytes = 16 * kThreads;
// Loads that a thread has under way: with all CTAs 1 MiB, which covers the latency of a link.
constexpr int kUnroll = 4;

template <int kCapacity>
struct PieceList {
  int32_t num_in;
  int32_t num_out;
  StagedPiece pieces[kCapacity];  // in, then out
};
constexpr int kFewPieces = 100;

// Peers' memory must not come from this SM's cache.
template <typename T>
__device__ T Load(const T* from) {
  return *static_cast<const volatile T*>(from);
}
__device__ uint4 Load(const uint4* from) {
  uint4 value;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

template <typename T>
__device__ void CopyAs(const char* src, char* dst, int64_t num_bytes) {
  const T* const from = reinterpret_cast<const T*>(src);
  T* const to = reinterpret_cast<T*>(dst);
  const int64_t count = num_bytes / static_cast<int64_t>(sizeof(T));
  for (int64_t begin = threadIdx.x; begin < count; begin += kUnroll * kThreads) {
    T values[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (begin + u * kThreads < count) values[u] = Load(from + begin + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (begin + u * kThreads < count) to[begin + u * kThreads] = values[u];
    }
  }
}

// This CTA's slice of piece number `piece`. Small pieces go to the CTAs in turn.
__device__ void CopySlice(int piece, const char* src, char* dst, int64_t num_bytes) {
  const int64_t share = (num_bytes + gridDim.x - 1) / gridDim.x;
  const int64_t slice = max((share + 15) / 16 * 16, kMinSliceBytes);
  const int64_t begin = (blockIdx.x + piece) % gridDim.x * slice;
  if (begin >= num_bytes) return;
  const int64_t size = min(slice, num_bytes - begin);
  src += begin;
  dst += begin;
  const uintptr_t places =
      reinterpret_cast<uintptr_t>(src) | reinterpret_cast<uintptr_t>(dst) | size;
  if (places % 16 == 0) {
    CopyAs<uint4>(src, dst, size);
  } else if (places % 4 == 0) {
    CopyAs<uint32_t>(src, dst, size);
  } else {
    CopyAs<unsigned char>(src, dst, size);
  }
}

// Grid: up to kMaxCtas; thread r deals with the signals of rank r.
template <int kCapacity>
__global__ void __launch_bounds__(kThreads)
    Meet(PeerMemory memory, WaitingCall call, const __grid_constant__ PieceList<kCapacity> list) {
  MeetingSignals* const mine = SignalsOf<MeetingSignals>(memory, memory.rank);
  const int64_t count = mine->count + 1;
  const int64_t staging = memory.signals_offset + kStagingBegin + count % 2 * kStagingBytes;
  for (int i = 0; i < list.num_in; ++i) {
    const StagedPiece& piece = list.pieces[i];
    CopySlice(i, piece.data, memory.bases[memory.rank] + staging + piece.staging_offset,
              piece.num_bytes);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&mine->staged, 1) + 1 == gridDim.x) {
      // All CTAs have read the count.
      mine->count = count;
      mine->staged = 0;
      __threadfence_system();
      for (int peer = 0; peer < memory.size; ++peer) {
        StoreRelaxed(&SignalsOf<MeetingSignals>(memory, peer)->met[memory.rank], count);
      }
    }
  }
  const int peer = threadIdx.x;
  const bool met = peer >= memory.size || Await(memory, &mine->met[peer], count, call, peer);
  if (!__syncthreads_and(met)) return;
  for (int i = list.num_in; i < list.num_in + list.num_out; ++i) {
    const StagedPiece& piece = list.pieces[i];
    CopySlice(i, memory.bases[piece.peer] + staging + piece.staging_offset, piece.data,
              piece.num_bytes);
  }
}

template <int kCapacity>
cudaError_t Launch(const PeerMemory& memory, WaitingCall call, const StagedCopies& copies,
                   cudaStream_t stream) {
  PieceList<kCapacity> list;
  list.num_in = static_cast<int32_t>(copies.in.size());
  list.num_out = static_cast<int32_t>(copies.out.size());
  std::copy(copies.out.begin(), copies.out.end(),
            std::copy(copies.in.begin(), copies.in.end(), list.pieces));
  const auto add = [](int64_t sum, const StagedPiece& piece) { return sum + piece.num_bytes; };
  const int64_t num_bytes =
      std::max(std::accumulate(copies.in.begin(), copies.in.end(), int64_t{0}, add),
               std::accumulate(copies.out.begin(), copies.out.end(), int64_t{0}, add));
  const int64_t num_ctas =
      std::clamp<int64_t>((num_bytes + kMinSliceBytes - 1) / kMinSliceBytes, 1, kMaxCtas);
  Meet<kCapacity><<<num_ctas, kThreads, 0, stream>>>(memory, call, list);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LoadMeetingKernels() {
  cudaFuncAttributes attributes;
  for (const void* kernel : {reinterpret_cast<const void*>(Meet<kFewPieces>),
                             reinterpret_cast<const void*>(Meet<kMaxStagedPieces>)}) {
    if (cudaError_t e = cudaFuncGetAttributes(&attributes, kernel); e != cudaSuccess) return e;
  }
  return cudaSuccess;
}

cudaError_t LaunchMeeting(const PeerMemory& memory, WaitingCall call, const StagedCopies& copies,
                          cudaStream_t stream) {
  return copies.in.size() + copies.out.size() <= kFewPieces
             ? Launch<kFewPieces>(memory, call, copies, stream)
             : Launch<kMaxStagedPieces>(memory, call, copies, stream);
}

}  // namespace nsa::comm::nccl
