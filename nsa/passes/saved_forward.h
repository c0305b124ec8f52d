// What a forward leaves for its backward, in one piece of memory: its own or the caller's.
#ifndef NSA_PASSES_SAVED_FORWARD_H_
#define NSA_PASSES_SAVED_FORWARD_H_

#include <array>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "nsa/engine.h"
#include "nsa/passes/context.h"

namespace nsa {

class SavedForwardImpl final : public SavedForward {
 public:
  static absl::StatusOr<std::unique_ptr<SavedForwardImpl>> Create(const PassContext& context,
                                                                  const SaveOptions& options);

  static int64_t NumBytes(const PassContext& context, const SaveOptions& options);

  int64_t num_bytes() const override { return num_bytes_; }
  // The engine that made it.
  const PassContext* owner() const { return owner_; }

  // All but o.
  ForwardOutputs outputs(const Tensor& o) const;
  // Branches in the order cmp, slc, win.
  kernels::ConstTensor3 branch_output(int branch) const {
    return ReadOnly(View(branch_outputs_[branch]));
  }
  const float* lse(int branch) const { return lse_[branch]; }  // [T,Hq]
  const int32_t* block_indices() const { return block_indices_; }
  // Null when they are not kept.
  char* summaries() const { return summaries_; }
  int32_t* locations() const { return locations_; }  // [P,Hkv,B]
  char* slots() const { return slots_; }             // [Hkv,remote blocks] records

  bool is_filled = false;

 private:
  SavedForwardImpl() = default;

  const PassContext* owner_ = nullptr;
  std::unique_ptr<kernels::Memory> memory_;  // null: the caller's
  int64_t num_bytes_ = 0;
  std::array<Tensor, 3> branch_outputs_;
  std::array<float*, 3> lse_ = {};
  int32_t* block_indices_ = nullptr;
  char* summaries_ = nullptr;
  int32_t* locations_ = nullptr;
  char* slots_ = nullptr;
};

}  // namespace nsa

#endif  // NSA_PASSES_SAVED_FORWARD_H_
