/* A forward and backward by the C++ engine, for comparison with the same by the C interface. */
#ifndef NSA_C_API_TESTLIB_H_
#define NSA_C_API_TESTLIB_H_

#include <stdint.h>

#include "nsa/c_api.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Inputs of a forward with the MLP compressor, and their gradients. */
enum {
  kQ,
  kKCmp,
  kVCmp,
  kKSlc,
  kVSlc,
  kKWin,
  kVWin,
  kGate,
  kNumActivations,
  /* compress_k */
  kKPe = kNumActivations,
  kKW1,
  kKB1,
  kKW2,
  kKB2,
  /* compress_v */
  kVPe,
  kVW1,
  kVB1,
  kVW2,
  kVB2,
  kNumInputs,
};

typedef struct ExpectedRun {
  nsa_tensor inputs[kNumInputs];
  nsa_tensor d_o;
  nsa_tensor o;
  nsa_tensor gradients[kNumInputs];
  float* lse[3]; /* cmp, slc, win */
  int32_t* block_indices;
} ExpectedRun;

/* Fills o, gradients, lse and block_indices, f32, on one rank of the CPU. 1 when all went well; the
 * error goes to stderr. */
int RunCppEngine(const nsa_config* config, const int64_t* cu_seqlens, int64_t num_cu_seqlens,
                 ExpectedRun* run);

#ifdef __cplusplus
}
#endif

#endif /* NSA_C_API_TESTLIB_H_ */
