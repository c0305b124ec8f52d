// For tests: which instruction set the vector code runs with.
#ifndef KERNELS_CPU_INSTRUCTION_SET_H_
#define KERNELS_CPU_INSTRUCTION_SET_H_

#include <cstdint>
#include <string>
#include <vector>

namespace nsa::kernels::cpu {

// Those that the vector code is compiled for and that this host has, the best one first.
std::vector<int64_t> InstructionSets();
std::string NameOfInstructionSet(int64_t instruction_set);
// Whether multiplication and addition are fused: all that do give the same bits.
bool HasFma(int64_t instruction_set);

// The vector code runs with the given one while the object lives. Not while another thread
// computes.
class ScopedInstructionSet {
 public:
  explicit ScopedInstructionSet(int64_t instruction_set);
  ~ScopedInstructionSet();
  ScopedInstructionSet(const ScopedInstructionSet&) = delete;
  ScopedInstructionSet& operator=(const ScopedInstructionSet&) = delete;
};

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_INSTRUCTION_SET_H_
