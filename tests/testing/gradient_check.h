// Whether gradients of the sharded backward are those of the fp64 reference.
#ifndef TESTS_TESTING_GRADIENT_CHECK_H_
#define TESTS_TESTING_GRADIENT_CHECK_H_

#include <cstdint>
#include <vector>

#include "kernels/types.h"
#include "tests/reference/reference.h"
#include "tests/testing/sharded_backward.h"

namespace nsa::test {

// Expects every gradient to have a relative L2 error of at most 1e-5 for f32 and 6e-3 for the
// 16-bit types, and to be zero where the reference's is (masked, unselected, other documents).
// `outputs`: of the forward; its blocks are those that the gradients are of. Where branches share k
// and v their gradients are summed.
void ExpectGradientsEqualReference(const reference::ReferenceConfig& config,
                                   const reference::ReferenceInputs& inputs, DType dtype,
                                   const std::vector<double>& d_o, bool share_kv,
                                   const GlobalOutputs& outputs, const GlobalGradients& gradients,
                                   double factor = 1.0);

// [S,Hq,Dv] random normal, as the activations' dtype keeps them.
std::vector<double> RandomOutputGradients(const Problem& problem, Random* random);

}  // namespace nsa::test

#endif  // TESTS_TESTING_GRADIENT_CHECK_H_
