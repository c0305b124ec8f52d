/* What C tests of nsa/c_api.h share. Every function of it ends the program when a check fails. */
#ifndef NSA_C_API_TESTING_H_
#define NSA_C_API_TESTING_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nsa/c_api.h"

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      fprintf(stderr, "%s:%d: %s: does not hold; last error: %s\n", __FILE__, __LINE__, \
              #condition, nsa_last_error());                                            \
      exit(1);                                                                          \
    }                                                                                   \
  } while (0)

#define CHECK_OK(call) CHECK((call) == NSA_OK)

/* The call fails with `code`, and the text names `part`. */
#define CHECK_ERROR(call, code, part)                                                        \
  do {                                                                                       \
    const nsa_status got = (call);                                                           \
    if (got != (code) || strstr(nsa_last_error(), part) == NULL) {                           \
      fprintf(stderr, "%s:%d: %s: status %d, \"%s\"; expected %d, \"...%s...\"\n", __FILE__, \
              __LINE__, #call, (int)got, nsa_last_error(), (int)(code), part);               \
      exit(1);                                                                               \
    }                                                                                        \
  } while (0)

/* A struct of the interface, zero but for its size. */
#define NSA_NEW(type, name)       \
  type name;                      \
  memset(&name, 0, sizeof(name)); \
  name.struct_size = sizeof(name)

/* Zeros, kept to the end, and known to leak checkers: what these find is the library's. */
static inline void* Allocate(int64_t num_bytes) {
  enum { kHeader = 64 };
  static void* last = NULL;
  const size_t size = ((size_t)num_bytes + 2 * kHeader) / kHeader * kHeader;
  char* memory = (char*)aligned_alloc(kHeader, size);
  CHECK(memory != NULL);
  memset(memory, 0, size);
  *(void**)memory = last;
  last = memory;
  return memory + kHeader;
}

static inline nsa_tensor DenseTensor(void* data, int32_t dtype, int32_t ndim, int64_t d0,
                                     int64_t d1, int64_t d2) {
  nsa_tensor tensor = {data, dtype, ndim, {d0, d1, d2, 0}, {0, 0, 0, 0}};
  int64_t stride = 1;
  for (int32_t i = ndim - 1; i >= 0; --i) {
    tensor.strides[i] = stride;
    stride *= tensor.shape[i];
  }
  return tensor;
}

static inline int64_t NumElements(const nsa_tensor* tensor) {
  int64_t count = 1;
  for (int32_t i = 0; i < tensor->ndim; ++i) count *= tensor->shape[i];
  return count;
}

/* In [low, high), the same for the same seeds. */
static inline float Random(uint64_t* seed, float low, float high) {
  *seed = *seed * 6364136223846793005u + 1442695040888963407u;
  return low + (high - low) * (float)(*seed >> 40) / (float)(1 << 24);
}

#endif /* NSA_C_API_TESTING_H_ */
