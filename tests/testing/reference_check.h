// Whether results of the sharded forward are those of the fp64 reference.
#ifndef TESTS_TESTING_REFERENCE_CHECK_H_
#define TESTS_TESTING_REFERENCE_CHECK_H_

#include <cstdint>
#include <vector>

#include "kernels/types.h"
#include "tests/reference/reference.h"
#include "tests/testing/sharded.h"

namespace nsa::test {

struct ReferenceCheck {
  // Tokens to compare, in the packed sequence; null: all.
  const std::vector<int64_t>* query_tokens = nullptr;
  // No row may select other blocks than the reference, near-ties or not.
  bool same_selection = false;
};

// Expects each branch, the whole and the LSEs to be the reference's up to the rounding of `dtype`
// (relative L2 of 4e-3 for the 16-bit types, and 8 times that of each row), and the selection to be
// one that rounding explains; the selected branch is compared on the blocks that were selected.
void ExpectEqualsReference(const reference::ReferenceConfig& config,
                           const reference::ReferenceInputs& inputs, DType dtype,
                           const GlobalOutputs& outputs, const ReferenceCheck& check = {});

}  // namespace nsa::test

#endif  // TESTS_TESTING_REFERENCE_CHECK_H_
