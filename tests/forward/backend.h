// The kernels that a test binary of this folder runs: the tests are the same for all, and which
// ones they get is decided when the binary is linked.
#ifndef TESTS_FORWARD_BACKEND_H_
#define TESTS_FORWARD_BACKEND_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "gtest/gtest.h"
#include "kernels/types.h"
#include "tests/testing/sharded.h"

namespace nsa::test {

struct Backend {
  MakeKernels make_kernels;
  std::vector<DType> dtypes;  // of activations
  int64_t alignment = 1;      // of rows and heads, in elements
};

const Backend& TheBackend();

// The ranks as threads over a loopback group.
inline absl::Status RunRanks(const Problem& problem, const ShardPlan& plan,
                             const RunOptions& options, GlobalOutputs* outputs,
                             ForwardStats* stats = nullptr) {
  return RunLoopback(problem, plan, options, outputs, stats, TheBackend().make_kernels);
}

// Skips where this host cannot run the backend.
class BackendTest : public ::testing::Test {
 protected:
  void SetUp() override;
};

}  // namespace nsa::test

#endif  // TESTS_FORWARD_BACKEND_H_
