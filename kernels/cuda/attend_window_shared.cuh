// The shared memory of a CTA of attend_window_fast.cu, through which its warps meet.
#ifndef KERNELS_CUDA_ATTEND_WINDOW_SHARED_CUH_
#define KERNELS_CUDA_ATTEND_WINDOW_SHARED_CUH_

#include <cuda.h>

#include <cstdint>

namespace nsa::kernels::cuda::attend_window {

constexpr int kTileKeys = 64;
constexpr int kConsumers = 3;   // warpgroups
constexpr int kGroupRows = 64;  // of a consumer
constexpr int kTileRows = kConsumers * kGroupRows;
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kThreads = kConsumerWarps * 32 + 128;
constexpr int kConsumerRegisters = 160;
constexpr int kProducerRegisters = 32;
constexpr int kPanelBytes = 64 * 128;  // 64 rows of 64 values

template <int kDk, int kDv>
struct Shape {
  static constexpr int kKeyBytes = kTileKeys * kDk * 2;
  static constexpr int kSlotBytes = kTileKeys * (kDk + kDv) * 2;
  static constexpr int kGroupQBytes = kGroupRows * kDk * 2;
  static constexpr int kQBytes = kConsumers * kGroupQBytes;
  static constexpr int kQBuffers = kDk <= 128 ? 2 : 1;
  static constexpr int kSlots = kDk == 64 ? 8 : kDk == 128 ? 4 : 3;
  // Slots first, then q, then barriers.
  static constexpr int kQ = kSlots * kSlotBytes;
  static constexpr int kBarriers = kQ + kQBuffers * kQBytes;
  static constexpr int kBytes = kBarriers + 2 * (kSlots + kQBuffers * kConsumers) * 8;
};

// Shared addresses.
template <class Shape>
struct Shared {
  uint32_t base;
  __device__ uint32_t Keys(int slot) const { return base + slot * Shape::kSlotBytes; }
  __device__ uint32_t Values(int slot) const { return Keys(slot) + Shape::kKeyBytes; }
  __device__ uint32_t Q(int buffer, int consumer) const {
    return base + Shape::kQ + buffer * Shape::kQBytes + consumer * Shape::kGroupQBytes;
  }
  // Barriers.
  __device__ uint32_t Full(int slot) const { return base + Shape::kBarriers + slot * 8; }
  __device__ uint32_t Empty(int slot) const { return Full(Shape::kSlots + slot); }
  __device__ uint32_t QFull(int buffer, int consumer) const {
    return Full(2 * Shape::kSlots + buffer * kConsumers + consumer);
  }
  __device__ uint32_t QEmpty(int buffer, int consumer) const {
    return QFull(Shape::kQBuffers + buffer, consumer);
  }
};

// K and V as the copy engine sees them: [rows][heads][dim], boxes of 64 rows of 64 values.
struct TensorMaps {
  CUtensorMap keys[2];  // own, halo
  CUtensorMap values[2];
  int32_t are_set;  // 0: the tensors are not such that they can be
};

}  // namespace nsa::kernels::cuda::attend_window

#endif  // KERNELS_CUDA_ATTEND_WINDOW_SHARED_CUH_
