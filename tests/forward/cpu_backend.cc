#include "kernels/cpu/cpu_kernels.h"
#include "tests/forward/backend.h"

namespace nsa::test {

const Backend& TheBackend() {
  static const Backend backend = {
      .make_kernels = [] { return kernels::CpuKernels::Create({.num_threads = 1}); },
      .dtypes = {DType::kF32, DType::kBF16, DType::kF16}};
  return backend;
}

void BackendTest::SetUp() {}

}  // namespace nsa::test
