// What a caller hands to a pass: checked, and the branches that share keys and values found.
#ifndef NSA_PASSES_INPUTS_H_
#define NSA_PASSES_INPUTS_H_

#include <array>

#include "absl/status/status.h"
#include "nsa/engine.h"
#include "nsa/passes/agreement.h"

namespace nsa {

// Keys and values of one branch, and the set of branches (BranchBit) that were given the same.
struct BranchInputs {
  ConstTensor k;
  ConstTensor v;
  int branches;
};

// In the order cmp, slc, win.
std::array<BranchInputs, 3> BranchesOf(const ForwardInputs& inputs);

// F of an MLP compressor; 0 when there is none.
int64_t HiddenWidth(const CompressorParams& params);

// InvalidArgument naming field, value and rule, or OK.
absl::Status CheckForward(const EngineOptions& options, int64_t num_tokens, int64_t row_alignment,
                          const ForwardInputs& inputs, const ForwardOutputs& outputs);

// The same, for keys, values and compressors' parameters alone.
absl::Status CheckKeysAndValues(const EngineOptions& options, int64_t num_tokens,
                                int64_t row_alignment, const ForwardInputs& inputs);

// The same, for a backward of these inputs, but for `saved`.
absl::Status CheckBackward(const EngineOptions& options, int64_t num_tokens, int64_t row_alignment,
                           const ForwardInputs& inputs, const ConstTensor& d_o,
                           const Gradients& gradients);

// What of a call must be the same on all ranks.
FieldList FieldsOfCall(const ForwardInputs& inputs);
FieldList FieldsOfBackward(const ForwardInputs& inputs, const Gradients& gradients);

}  // namespace nsa

#endif  // NSA_PASSES_INPUTS_H_
