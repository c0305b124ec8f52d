#include "kernels/cpu/instruction_set.h"

#include "hwy/detect_targets.h"
#include "hwy/targets.h"

namespace nsa::kernels::cpu {

std::vector<int64_t> InstructionSets() {
  std::vector<int64_t> sets;
  for (int64_t set : hwy::SupportedAndGeneratedTargets()) {
    if ((set & (HWY_SSSE3 | HWY_SSE4)) == 0) sets.push_back(set);  // tile_ops.cc leaves these out
  }
  if (sets.empty() || sets.back() != HWY_STATIC_TARGET) sets.push_back(HWY_STATIC_TARGET);
  return sets;
}

std::string NameOfInstructionSet(int64_t instruction_set) {
  return hwy::TargetName(instruction_set);
}

bool HasFma(int64_t instruction_set) {
  return instruction_set == HWY_AVX3 || instruction_set == HWY_AVX2;
}

ScopedInstructionSet::ScopedInstructionSet(int64_t instruction_set) {
  hwy::SetSupportedTargetsForTest(instruction_set);
  hwy::GetChosenTarget().Update(instruction_set);
}

ScopedInstructionSet::~ScopedInstructionSet() {
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().DeInit();
}

}  // namespace nsa::kernels::cpu
