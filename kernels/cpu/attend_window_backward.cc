// The backward of the window. Segments of k and of v cover the same tokens.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/branch_backward.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

class Item {
 public:
  Item(const AttendWindowBackwardParams& params, int32_t kv_head, const BranchScratch& scratch)
      : params_(params),
        dims_(params.dims),
        group_size_(dims_.group_size()),
        kv_head_(kv_head),
        s_(scratch),
        branch_(params.dims, params.queries, params.outputs, kv_head, scratch) {}

  // Tiles are counted from the document's first token, as in the forward.
  void RunQueries(const QueryRun& run) {
    branch_.StartQueries(run);
    const int64_t first_key = std::max<int64_t>(0, run.position - dims_.window_tokens + 1);
    const int64_t end = run.position + run.num_queries;
    for (int64_t tile = first_key / kTileKeys * kTileKeys; tile < end; tile += kTileKeys) {
      const QueryRun seeing = Seeing({run.document, tile, kTileKeys}, run);
      if (seeing.num_queries <= 0) continue;
      LoadTokens({run.document, tile, kTileKeys});
      branch_.MakeKeyPanels();
      SetVisible(seeing, tile, kTileKeys);
      branch_.AddToQueries((seeing.row - run.row) * group_size_, seeing.num_queries * group_size_);
    }
    branch_.StoreQueries(run, params_.queries_gradients);
  }

  void RunKeys(const TokenRun& keys) {
    LoadTokens(keys);
    branch_.StartKeys();
    const int64_t end = keys.position + keys.num_tokens + dims_.window_tokens - 1;
    ForEachRun(params_.queries, keys.document, keys.position, end, QueriesPerSum(dims_),
               [&](const QueryRun& run) {
                 branch_.LoadQueries(run);
                 SetVisible(run, keys.position, keys.num_tokens);
                 branch_.AddToKeys(run.num_queries * group_size_);
               });
    StoreTokenGradients(params_.k, params_.dk, dims_, dims_.head_dim_qk, keys, kv_head_, s_.dk,
                        s_.gradients);
    StoreTokenGradients(params_.v, params_.dv, dims_, dims_.head_dim_v, keys, kv_head_, s_.dv,
                        s_.gradients);
  }

 private:
  // The queries of the run that see a key: those at the first one and later, as long as their
  // window still reaches the last one.
  QueryRun Seeing(const TokenRun& keys, const QueryRun& run) const {
    const int64_t begin = std::max(run.position, keys.position);
    const int64_t end = std::min(run.position + run.num_queries,
                                 keys.position + keys.num_tokens - 1 + dims_.window_tokens);
    return {.document = run.document,
            .position = begin,
            .row = run.row + (begin - run.position),
            .num_queries = end - begin};
  }

  void SetVisible(const QueryRun& run, int64_t first_key, int32_t num_keys) {
    for (int64_t i = 0; i < run.num_queries; ++i) {
      std::fill_n(s_.visible + i * group_size_, group_size_,
                  WindowKeys(dims_, run.position + i, first_key, num_keys));
    }
  }

  // Tokens that are not here are zero: they are outside every window of this rank's queries.
  void LoadTokens(const TokenRun& keys) {
    FindTokens(params_.k, dims_.dtype, keys.document, keys.position, keys.num_tokens, kv_head_,
               s_.tokens);
    branch_.LoadKeys(s_.tokens, keys.num_tokens);
    FindTokens(params_.v, dims_.dtype, keys.document, keys.position, keys.num_tokens, kv_head_,
               s_.tokens);
    branch_.LoadValues(s_.tokens, keys.num_tokens);
  }

  const AttendWindowBackwardParams& params_;
  const AttentionDims& dims_;
  const int64_t group_size_;
  const int32_t kv_head_;
  const BranchScratch& s_;
  BranchItem branch_;
};

}  // namespace

absl::Status AttendWindowBackward(const AttendWindowBackwardParams& params, Workers& workers) {
  return RunBranchItems<Item>(params, SplitTokens(params.k, kTileKeys), workers);
}

}  // namespace nsa::kernels::cpu
