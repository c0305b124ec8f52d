// The shared memory of a CTA of attend_backward_fast.cu, through which its warps meet: K and V of
// the item; 2 stages of Q, dO and the rows' statistics; dS^T; dQ, twice where there is room.
// Matrices are panels of 64 columns with the 128-byte swizzle (wgmma.cuh).
#ifndef KERNELS_CUDA_ATTEND_BACKWARD_SHARED_CUH_
#define KERNELS_CUDA_ATTEND_BACKWARD_SHARED_CUH_

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/attend_backward_work.cuh"
#include "kernels/cuda/ptx.cuh"

namespace nsa::kernels::cuda::attend_backward {

constexpr int kConsumerWarps = 8;
constexpr int kConsumerThreads = kConsumerWarps * 32;
constexpr int kThreads = kConsumerThreads + 128;
constexpr int kConsumerRegisters = 240;
constexpr int kProducerRegisters = 24;
constexpr int kStages = 2;
constexpr int kRowPanelBytes = kTileRows * 128;
constexpr int kKeyPanelBytes = kTileKeys * 128;

template <int kDk, int kDv>
struct Shape {
  static constexpr int kDqBuffers = kDk <= 128 ? 2 : 1;
  static constexpr int kQBytes = kTileRows * kDk * 2;
  static constexpr int kStageBytes = kTileRows * (kDk + kDv) * 2;  // Q, dO
  static constexpr int kDqBytes = kTileRows * kDk * 4;
  static constexpr int kStatisticsBytes = 5 * kTileRows * 4;  // of a stage, see below
  static constexpr int kValues = kTileKeys * kDk * 2;
  static constexpr int kRows = kValues + kTileKeys * kDv * 2;
  static constexpr int kDs = kRows + kStages * kStageBytes;
  static constexpr int kDq = kDs + kTileKeys * kTileRows * 2;
  static constexpr int kStatistics = kDq + kDqBuffers * kDqBytes;
  static constexpr int kItem = kStatistics + kStages * kStatisticsBytes;
  static constexpr int kBarriers = kItem + 2 * 128;
  static constexpr int kBytes = kBarriers + (2 * kStages + 2 * kDqBuffers + 1) * 8;
};
static_assert(sizeof(Item) <= 128);  // two, this one and the next

// What is known of a stage's rows, of two neighbours side by side. [32][4]: lse_log2 of both, gate
// of both. [32][2]: mean_dp. [32][4]: the first key of the tile that each sees, the one behind the
// last.
constexpr int kMeans = kTileRows / 2 * 16;
constexpr int kBounds = kMeans + kTileRows / 2 * 8;

// Shared addresses.
template <class Shape>
struct Shared {
  uint32_t base;
  __device__ uint32_t Keys() const { return base; }
  __device__ uint32_t Values() const { return base + Shape::kValues; }
  __device__ uint32_t Q(int stage) const {
    return base + Shape::kRows + stage * Shape::kStageBytes;
  }
  __device__ uint32_t OutputGradient(int stage) const { return Q(stage) + Shape::kQBytes; }
  __device__ uint32_t Ds() const { return base + Shape::kDs; }
  __device__ uint32_t Dq(int buffer) const { return base + Shape::kDq + buffer * Shape::kDqBytes; }
  __device__ uint32_t Statistics(int stage) const {
    return base + Shape::kStatistics + stage * Shape::kStatisticsBytes;
  }
  // Barriers.
  __device__ uint32_t RowsFull(int stage) const { return base + Shape::kBarriers + stage * 8; }
  __device__ uint32_t RowsEmpty(int stage) const { return RowsFull(kStages + stage); }
  __device__ uint32_t DqFull(int buffer) const { return RowsFull(2 * kStages + buffer); }
  __device__ uint32_t DqEmpty(int buffer) const { return DqFull(Shape::kDqBuffers + buffer); }
  __device__ uint32_t DsRead() const { return DqFull(2 * Shape::kDqBuffers); }
};

// Place of the n-th use of a ring of kCount slots; parity of its round.
template <int kCount>
struct Turn {
  uint32_t n = 0;
  __device__ int slot() const { return n % kCount; }
  __device__ uint32_t parity() const { return n / kCount % 2; }
};

struct TensorMaps {
  CUtensorMap q, d_o, dq;
};

__device__ __forceinline__ uint32_t Uniform(uint32_t value) {
  return __shfl_sync(kFullWarp, value, 0);
}

__device__ __forceinline__ void StoreShared(uint32_t address, float2 value) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y)
               : "memory");
}

__device__ __forceinline__ float4 LoadShared4(uint32_t address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address));
  return value;
}

__device__ __forceinline__ float2 LoadShared2(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address));
  return value;
}

// Barriers of the block's sixteen; the roles meet at them in different places of the code.
constexpr int kConsumerBarrier = 1, kItemBarrier = 2;

// Among the consumers.
__device__ __forceinline__ void SyncConsumers() { SyncThreads(kConsumerBarrier, kConsumerThreads); }

}  // namespace nsa::kernels::cuda::attend_backward

#endif  // KERNELS_CUDA_ATTEND_BACKWARD_SHARED_CUH_
