#ifndef NSA_PASSES_FORWARD_H_
#define NSA_PASSES_FORWARD_H_

#include "absl/status/status.h"
#include "nsa/engine.h"
#include "nsa/passes/context.h"

namespace nsa {

// The forward pass (DESIGN.md, "The eight steps"), on any kernels and any communicator. Collective;
// inputs have been checked and agreed on.
absl::Status RunForward(PassContext& context, const ForwardInputs& inputs,
                        const ForwardOutputs& outputs, void* stream);

}  // namespace nsa

#endif  // NSA_PASSES_FORWARD_H_
