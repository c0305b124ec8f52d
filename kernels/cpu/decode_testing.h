// Decodes the documents of a problem as sequences, for tests that compare with the forward.
#ifndef KERNELS_CPU_DECODE_TESTING_H_
#define KERNELS_CPU_DECODE_TESTING_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/stages_testing.h"
#include "kernels/kernels.h"

namespace nsa::kernels::cpu {

// In what steps a problem's documents are decoded. None of it may show in results.
struct DecodeSchedule {
  // Tokens of each document that are appended at once, without attending; none where it is empty.
  std::vector<int64_t> prefixes = {};
  // New tokens of a step: of one sequence, and together. Sequences come in random order, with rows
  // without a token between them.
  int64_t max_new_tokens = 1;
  int64_t max_rows = 64;
  // The branches share tables; the problem's have to share keys and values.
  bool shares_tables = false;
  // Whether the branches' own outputs are asked for.
  bool looks_at_branches = true;
  uint64_t seed = 0;
};

struct DecodeRun {
  // What was not asked for, and rows of tokens that were not decoded, is NaN, and -7 of indices.
  StageOutputs outputs;
  std::vector<int64_t> tokens;  // that were decoded, in the packed sequence
};

// Pages are new ones, full of NaN, wherever a token is the first one in its page; entries of tables
// that a step does not need are null, and what is not needed any more is freed. Internal when what
// belongs to a row without a token was written to. `kernels` are of host memory.
absl::StatusOr<DecodeRun> RunDecode(const StageProblem& problem, const DecodeSchedule& schedule,
                                    Kernels& kernels);

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_DECODE_TESTING_H_
