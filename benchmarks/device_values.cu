#include <cuda_bf16.h>

#include "benchmarks/device_values.h"

namespace nsa::benchmarks {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 132 * 8;  // each thread strides over what is left

__device__ int64_t FirstOfThread() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ int64_t Stride() { return int64_t{gridDim.x} * kThreads; }

// The sum of four uniform numbers, of unit variance.
__device__ float NormalValue(uint64_t seed, uint64_t index) {
  uint64_t z = (index + 1) * 0x9e3779b97f4a7c15 + seed * 0xbf58476d1ce4e5b9;
  float sum = 0;
  for (int i = 0; i < 2; ++i) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    z ^= z >> 31;
    sum += static_cast<float>(z & 0xffff) + static_cast<float>(z >> 48);
  }
  return (sum / 65536.0f - 2.0f) * 1.7320508f;
}

// Grid: kBlocks; a CTA owns every kBlocks-th run of kThreads elements. So do the two below.
__global__ void FillNormalKernel(uint64_t seed, int64_t first, int64_t count,
                                 __nv_bfloat16* values) {
  for (int64_t i = FirstOfThread(); i < count; i += Stride()) {
    values[i] = __float2bfloat16_rn(NormalValue(seed, first + i));
  }
}

__global__ void FillConstantKernel(float value, int64_t count, float* values) {
  for (int64_t i = FirstOfThread(); i < count; i += Stride()) values[i] = value;
}

__global__ void FingerprintKernel(int64_t first, int64_t count, const uint16_t* values,
                                  unsigned long long* sum) {
  uint64_t mine = 0;
  for (int64_t i = FirstOfThread(); i < count; i += Stride()) {
    mine += (first + i + 1) * 0x9e3779b97f4a7c15 * (values[i] + 1u);
  }
  atomicAdd(sum, static_cast<unsigned long long>(mine));
}

}  // namespace

cudaError_t FillNormal(uint64_t seed, int64_t first, int64_t count, void* values,
                       cudaStream_t stream) {
  FillNormalKernel<<<kBlocks, kThreads, 0, stream>>>(seed, first, count,
                                                     static_cast<__nv_bfloat16*>(values));
  return cudaGetLastError();
}

cudaError_t FillConstant(float value, int64_t count, float* values, cudaStream_t stream) {
  FillConstantKernel<<<kBlocks, kThreads, 0, stream>>>(value, count, values);
  return cudaGetLastError();
}

cudaError_t AddFingerprint(int64_t first, int64_t count, const void* values, uint64_t* sum,
                           cudaStream_t stream) {
  FingerprintKernel<<<kBlocks, kThreads, 0, stream>>>(first, count,
                                                      static_cast<const uint16_t*>(values),
                                                      reinterpret_cast<unsigned long long*>(sum));
  return cudaGetLastError();
}

}  // namespace nsa::benchmarks
