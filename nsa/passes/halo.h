// Step 1: tokens next to this rank's chunks, from the ranks that hold them.
#ifndef NSA_PASSES_HALO_H_
#define NSA_PASSES_HALO_H_

#include <array>

#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "nsa/engine.h"
#include "nsa/passes/context.h"

namespace nsa {

// Keys and values of one branch: the caller's tokens and the halo.
struct BranchTokens {
  kernels::TokenRows k;  // [T + H, Hkv, Dk]
  kernels::TokenRows v;  // [T + H, Hkv, Dv]
};

// Collective. Exchanges the halo of each distinct (k, v) once; result in the order cmp, slc, win.
absl::StatusOr<std::array<BranchTokens, 3>> ExchangeHalo(PassContext& context,
                                                         const ForwardInputs& inputs, void* stream);

}  // namespace nsa

#endif  // NSA_PASSES_HALO_H_
