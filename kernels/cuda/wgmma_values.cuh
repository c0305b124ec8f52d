// wgmma with an operand B that lies as values do: rows of one k (a token), columns of n (dims).
//
// B in shared memory: panels of 64 columns, rows of 128 bytes, the 16-byte chunk c of row r at
// place c ^ (r % 8), aligned to 1024 bytes; see wgmma.cuh for accumulators.
#ifndef KERNELS_CUDA_WGMMA_VALUES_CUH_
#define KERNELS_CUDA_WGMMA_VALUES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace nsa::kernels::cuda {

// Of a row that is a multiple of 8 in the first panel; panels are `panel_bytes` apart.
__device__ __forceinline__ uint64_t WgmmaValuesDescriptor(uint32_t shared_address,
                                                          uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kRowsStride = uint64_t{1024 >> 4} << 32;  // eight rows
  return kSwizzle128 | kRowsStride | (uint64_t{panel_bytes >> 4} << 16) |
         ((shared_address & 0x3ffff) >> 4);
}

#define NSA_ACCUMULATORS_8(d, i)                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define NSA_ACCUMULATORS_32(d, i)                                                        \
  NSA_ACCUMULATORS_8(d, i), NSA_ACCUMULATORS_8(d, i + 8), NSA_ACCUMULATORS_8(d, i + 16), \
      NSA_ACCUMULATORS_8(d, i + 24)
#define NSA_OPERANDS_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NSA_OPERANDS_64                                                           \
  NSA_OPERANDS_32                                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d [64,64] += a [64,16] * b [16,64], a in registers.
template <class T>
__device__ __forceinline__ void WgmmaValues(float (&d)[32], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NSA_OPERANDS_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : NSA_ACCUMULATORS_32(d, 0)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" NSA_OPERANDS_32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : NSA_ACCUMULATORS_32(d, 0)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
  }
}

// d [64,128] += a [64,16] * b [16,128], a in registers.
template <class T>
__device__ __forceinline__ void WgmmaValues(float (&d)[64], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" NSA_OPERANDS_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : NSA_ACCUMULATORS_32(d, 0), NSA_ACCUMULATORS_32(d, 32)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" NSA_OPERANDS_64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : NSA_ACCUMULATORS_32(d, 0), NSA_ACCUMULATORS_32(d, 32)
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));
  }
}

// d [64,64] = a [64,16] * b [16,64], or += when `accumulate` is not 0; both in shared memory, a as
// wgmma.cuh has it.
template <class T>
__device__ __forceinline__ void WgmmaSharedValues(float (&d)[32], uint64_t a, uint64_t b,
                                                  int32_t accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" NSA_OPERANDS_32
        "}, %32, %33, add, 1, 1, 0, 1;\n}\n"
        : NSA_ACCUMULATORS_32(d, 0)
        : "l"(a), "l"(b), "r"(accumulate));
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" NSA_OPERANDS_32
        "}, %32, %33, add, 1, 1, 0, 1;\n}\n"
        : NSA_ACCUMULATORS_32(d, 0)
        : "l"(a), "l"(b), "r"(accumulate));
  }
}

// d [64,32] = a [64,16] * b [16,32]: half a panel of b.
template <class T>
__device__ __forceinline__ void WgmmaSharedValues(float (&d)[16], uint64_t a, uint64_t b,
                                                  int32_t accumulate) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, add, 1, 1, 0, 1;\n}\n"
        : NSA_ACCUMULATORS_8(d, 0), NSA_ACCUMULATORS_8(d, 8)
        : "l"(a), "l"(b), "r"(accumulate));
  } else {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, add, 1, 1, 0, 1;\n}\n"
        : NSA_ACCUMULATORS_8(d, 0), NSA_ACCUMULATORS_8(d, 8)
        : "l"(a), "l"(b), "r"(accumulate));
  }
}

#undef NSA_ACCUMULATORS_8
#undef NSA_ACCUMULATORS_32
#undef NSA_OPERANDS_32
#undef NSA_OPERANDS_64

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_WGMMA_VALUES_CUH_
