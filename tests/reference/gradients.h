// The gradients of Native Sparse Attention in fp64, as plainly as they can be written: the chain
// rule applied to the forward of reference.h, query by query, nothing tiled, sharded or rounded.
// Selection is not differentiated: the blocks that were selected are given. Symbols as there.
#ifndef TESTS_REFERENCE_GRADIENTS_H_
#define TESTS_REFERENCE_GRADIENTS_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/reference/reference.h"

namespace nsa::reference {

// Exactly zero wherever nothing of o depends on the value. Where branches share k or v, the
// gradient of the shared tensor is the sum of theirs.
struct ReferenceGradients {
  std::vector<double> dq;      // [S,Hq,Dk]
  std::vector<double> dk_cmp;  // [S,Hkv,Dk]
  std::vector<double> dv_cmp;  // [S,Hkv,Dv]
  std::vector<double> dk_slc;  // [S,Hkv,Dk]
  std::vector<double> dv_slc;  // [S,Hkv,Dv]
  std::vector<double> dk_win;  // [S,Hkv,Dk]
  std::vector<double> dv_win;  // [S,Hkv,Dv]
  std::vector<double> dgate;   // [S,Hq,3] order (cmp, slc, win)
  std::vector<double> dkc;     // [N,Hkv,Dk] of the summaries, on the way to dk_cmp
  std::vector<double> dvc;     // [N,Hkv,Dv]
  // Each parameter's gradient in its place, in its shape; zeros for what the compressor leaves
  // unread. A softmax does not notice what shifts all keys alike, so of compress_k the gradients of
  // b2, and of pe unless an mlp reads it, are rounding errors about zero: a relative error says
  // nothing of them.
  CompressorParameters dcompress_k;
  CompressorParameters dcompress_v;
};

// Gradients of a compressor's parameters and, in *dx [S,Hkv,head_dim], of what Compress takes, from
// those of its summaries, `dy` [N,Hkv,head_dim].
CompressorParameters CompressBackward(const ReferenceConfig& config,
                                      const CompressorParameters& parameters,
                                      const std::vector<int64_t>& cu_seqlens,
                                      const std::vector<double>& x, int64_t head_dim,
                                      const std::vector<double>& dy, std::vector<double>* dx);

// Gradients of the sum of o * d_o. block_indices [S,Hkv,n], -1 padded, are the blocks that the
// selected branch attends to; d_o [S,Hq,Dv]. Summaries and the branches' outputs are rounded as the
// activations' dtype keeps them; the rounding itself has derivative one. At most one thread per
// key/value head is used, and their number changes no bit. InvalidArgument, naming the field, when
// a size does not fit the configuration or the gate is absent.
absl::StatusOr<ReferenceGradients> Backward(const ReferenceConfig& config,
                                            const ReferenceInputs& inputs,
                                            const std::vector<int32_t>& block_indices,
                                            const std::vector<double>& d_o, int num_threads = 2,
                                            Rounding rounding = Rounding::kNone);

}  // namespace nsa::reference

#endif  // TESTS_REFERENCE_GRADIENTS_H_
