// Input files for tests.
#ifndef TOOLS_NSA_RUN_INPUT_TESTLIB_H_
#define TOOLS_NSA_RUN_INPUT_TESTLIB_H_

#include <map>
#include <string>

#include "absl/status/status.h"
#include "kernels/types.h"
#include "tests/reference/reference.h"
#include "tests/testing/numeric.h"
#include "tests/testing/sharded.h"
#include "tools/safetensors.h"

namespace nsa::tools {

// A tensor and its bytes.
struct Entry {
  TensorSpec spec;
  test::Bytes bytes;
};
using Entries = std::map<std::string, Entry>;

TensorType TypeOf(DType dtype);

// Small, yet with more blocks than are selected, and documents that begin inside blocks.
test::Problem SmallProblem(reference::CompressorKind compressor, DType dtype);

// The problem's tensors as they stand in a file; with `shared_kv` those of the compressed branch
// are k and v.
Entries InputEntries(const test::Problem& problem, bool shared_kv);

absl::Status WriteEntries(const Entries& entries, const std::string& path);

}  // namespace nsa::tools

#endif  // TOOLS_NSA_RUN_INPUT_TESTLIB_H_
