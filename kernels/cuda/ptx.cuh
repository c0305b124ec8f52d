// The instructions that C++ has no name for, one function each.
#ifndef KERNELS_CUDA_PTX_CUH_
#define KERNELS_CUDA_PTX_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace nsa::kernels::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The lane, in a way that keeps what is computed from it where it stands: not done ahead of a loop,
// to take registers all through it.
__device__ __forceinline__ int LaneNow() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// 2^x, to about two units in the last place; 2^-inf = 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float Log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values of a 16-bit type in one register, the first one low.
template <class T>
__device__ __forceinline__ uint32_t Pack2(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <class T>
__device__ __forceinline__ float2 Unpack2(uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&bits));
  }
}

// Barriers in shared memory that count arrivals and bytes.

__device__ __forceinline__ void BarrierInit(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ __forceinline__ void BarrierInitFence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void BarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// For `count` arrivals at once.
__device__ __forceinline__ void BarrierArrive(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(count)
               : "memory");
}

__device__ __forceinline__ void BarrierArriveExpectBytes(uint32_t barrier, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
               "r"(num_bytes)
               : "memory");
}

// Returns when the phase of `parity` is complete.
__device__ __forceinline__ void BarrierWait(uint32_t barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
#define NSA_BARRIER_WAIT "mbarrier.try_wait"
#else
#define NSA_BARRIER_WAIT "mbarrier.test_wait"
#endif
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait_more:\n" NSA_BARRIER_WAIT
      ".parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait_more;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
#undef NSA_BARRIER_WAIT
}

// Global to shared memory by the copy engine; 16-byte aligned. Completes on the barrier.
__device__ __forceinline__ void BulkCopy(uint32_t shared_dst, const void* global_src,
                                         uint32_t num_bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_dst),
      "l"(global_src), "r"(num_bytes), "r"(barrier)
      : "memory");
}

// A box of a three-dimensional tensor, from the coordinates of its first element on, to shared
// memory by the copy engine. `map` is the address of a CUtensorMap in a kernel's parameters.
__device__ __forceinline__ void TensorCopy(uint32_t shared_dst, const void* map, int32_t x,
                                           int32_t y, int32_t z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%2, %3, %4}], [%5];" ::"r"(shared_dst),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}

// A box of f32 in shared memory to a three-dimensional tensor; part of the open bulk group.
__device__ __forceinline__ void TensorStore(const void* map, int32_t x, int32_t y, int32_t z,
                                            uint32_t shared_src) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
          map),
      "r"(x), "r"(y), "r"(z), "r"(shared_src)
      : "memory");
}

// Likewise, but adds it.
__device__ __forceinline__ void TensorAdd(const void* map, int32_t x, int32_t y, int32_t z,
                                          uint32_t shared_src) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%1, %2, %3}], "
      "[%4];" ::"l"(map),
      "r"(x), "r"(y), "r"(z), "r"(shared_src)
      : "memory");
}

__device__ __forceinline__ void BulkCommit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Returns when this thread's bulk groups have read shared memory.
__device__ __forceinline__ void BulkWaitRead() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Returns when this thread's bulk groups are complete.
__device__ __forceinline__ void BulkWait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Flags in global memory by which CTAs hand over data.

__device__ __forceinline__ int32_t LoadAcquire(const int32_t* flag) {
  int32_t value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

__device__ __forceinline__ void StoreRelease(int32_t* flag, int32_t value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Brings bytes at a 16-byte aligned address to the L2; a multiple of 16 of them.
__device__ __forceinline__ void PrefetchL2(const void* global, uint32_t num_bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(num_bytes)
               : "memory");
}

// Brings the cache line of an address to the L2.
__device__ __forceinline__ void PrefetchLine(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// 16 bytes from global to shared memory, asynchronously; zeros when `copy` is false.
__device__ __forceinline__ void CopyAsync16(uint32_t shared_dst, const void* global_src,
                                            bool copy) {
  const uint32_t num_bytes = copy ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_dst), "l"(global_src),
               "r"(num_bytes)
               : "memory");
}

// 4 or 8 bytes, likewise.
template <int kBytes>
__device__ __forceinline__ void CopyAsyncSmall(uint32_t shared_dst, const void* global_src,
                                               bool copy) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_dst), "l"(global_src),
               "n"(kBytes), "r"(copy ? kBytes : 0)
               : "memory");
}

// One of the barrier's arrivals, once what this thread has begun to copy is there.
__device__ __forceinline__ void BarrierArriveAfterCopies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Waits for `count` threads of the block, by barrier `id` of its sixteen.
__device__ __forceinline__ void SyncThreads(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Returns when all but the last kPending groups of this thread are complete; with 0 all of its
// copies, whether CopyAsyncCommit has made a group of them or not.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  if constexpr (kPending == 0) {
    asm volatile("cp.async.wait_all;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }
}

// Orders this thread's ordinary writes to shared memory before later reads by wgmma and the copy
// engine.
__device__ __forceinline__ void FenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same between all memory, also global, and the copy engine.
__device__ __forceinline__ void FenceProxyAsyncAll() {
  asm volatile("fence.proxy.async;" ::: "memory");
}

// Four 8x8 matrices of 16-bit values; lane 8*i + r gives the address of row r of matrix i.
__device__ __forceinline__ void LoadMatrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void LoadMatricesTransposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit values: lane 4g + c holds values 2c and 2c + 1 of row g,
// before and after.
__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t matrix) {
  uint32_t transposed;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(matrix));
  return transposed;
}

// The reverse: matrix i, of which lane 4g + c has values 2c and 2c + 1 of row g, is stored with its
// columns as rows.
__device__ __forceinline__ void StoreMatricesTransposed(uint32_t address, uint32_t m0, uint32_t m1,
                                                        uint32_t m2, uint32_t m3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(m0), "r"(m1), "r"(m2), "r"(m3)
      : "memory");
}

// c [16,8] += a [16,16] * b [16,8]
template <class T>
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// c [16,8] += a [16,8] * b [8,8] on tf32, f32 with a mantissa of 10 bits.
__device__ __forceinline__ void MultiplyAddTf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t RoundToTf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Moves registers between the warpgroups of a block.
template <int kCount>
__device__ __forceinline__ void RaiseRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

template <int kCount>
__device__ __forceinline__ void LowerRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_PTX_CUH_
