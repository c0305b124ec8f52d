// Steps 2 and 3: summaries of own compression blocks, and those of all ranks in global block order.
#ifndef NSA_PASSES_SUMMARIES_H_
#define NSA_PASSES_SUMMARIES_H_

#include <vector>

#include "absl/status/status.h"
#include "kernels/kernels.h"
#include "nsa/engine.h"
#include "nsa/passes/context.h"
#include "nsa/passes/halo.h"

namespace nsa {

// Summaries of all N compression blocks, row by row: kc [N,Hkv,Dk] beside vc [N,Hkv,Dv].
struct Summaries {
  kernels::Tensor3 kc;
  kernels::Tensor3 vc;
};

Summaries SummariesOf(const PassContext& context);

kernels::CompressorWeights WeightsOf(const CompressorParams& params);

// The ranges of the summaries buffer that each rank provides, in global block order.
std::vector<comm::GatherRun> SummaryRuns(const NsaConfig& config,
                                         const kernels::AttentionDims& dims, const ShardPlan& plan,
                                         const BlockMap& blocks);

// Step 2. Writes the rows of own blocks (NSA equation 7).
absl::Status Compress(PassContext& context, const ForwardInputs& inputs, const BranchTokens& tokens,
                      const Summaries& summaries, void* stream);

// Step 3. Collective: fills in the rows of the other ranks. `stream`: beside the call's.
absl::Status AllGatherSummaries(PassContext& context, void* stream);

// Step 3 backwards. Collective: the gradients of own blocks' summaries, of all ranks' queries,
// added rank by rank.
absl::Status ReduceSummaryGradients(PassContext& context, void* stream);

// Step 2 backwards, from the gradients of own blocks' summaries: adds to those of the tokens, and
// computes those of the compressors' parameters.
absl::Status CompressBackward(PassContext& context, const ForwardInputs& inputs,
                              const BranchTokens& tokens, const BranchGradients& token_gradients,
                              const Gradients& gradients, void* stream);
// Collective if they are summed over ranks.
absl::Status StoreCompressorGradients(PassContext& context, const ForwardInputs& inputs,
                                      const Gradients& gradients, void* stream);

}  // namespace nsa

#endif  // NSA_PASSES_SUMMARIES_H_
