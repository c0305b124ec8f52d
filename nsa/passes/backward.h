#ifndef NSA_PASSES_BACKWARD_H_
#define NSA_PASSES_BACKWARD_H_

#include "absl/status/status.h"
#include "nsa/engine.h"
#include "nsa/passes/context.h"
#include "nsa/passes/saved_forward.h"

namespace nsa {

// The backward pass: the eight steps in reverse, on any kernels and any communicator. Collective;
// arguments have been checked and agreed on.
absl::Status RunBackward(PassContext& context, const ForwardInputs& inputs, const ConstTensor& d_o,
                         const SavedForwardImpl& saved, const Gradients& gradients, void* stream);

}  // namespace nsa

#endif  // NSA_PASSES_BACKWARD_H_
