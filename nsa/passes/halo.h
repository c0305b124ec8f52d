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

// Gradients of the keys and values of one set of branches (BranchBit), in the workspace.
struct BranchGradients {
  kernels::TokenGradients dk;  // [T + H, Hkv, Dk] f32
  kernels::TokenGradients dv;  // [T + H, Hkv, Dv] f32
};
BranchGradients BranchGradientsOf(const PassContext& context, int branches);
absl::Status ZeroBranchGradients(PassContext& context, int branches, void* stream);

// Step 1 backwards. Collective: sends the gradients of the halo to the tokens' owners, and adds
// those of own tokens that others used, rank by rank.
absl::Status ReturnHaloGradients(PassContext& context, int branches, void* stream);

}  // namespace nsa

#endif  // NSA_PASSES_HALO_H_
