// The backward of the compressed branch, down to the gradients of the summaries.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/branch_backward.h"
#include "kernels/cpu/rows.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

// Consecutive summaries of a document.
struct SummaryRun {
  int32_t document;
  int64_t first_block;  // in the document
  int32_t num_blocks;
};

class Item {
 public:
  Item(const AttendSummariesBackwardParams& params, int32_t kv_head, const BranchScratch& scratch)
      : params_(params),
        dims_(params.dims),
        group_size_(dims_.group_size()),
        kv_head_(kv_head),
        s_(scratch),
        branch_(params.dims, params.queries, params.outputs, kv_head, scratch) {}

  void RunQueries(const QueryRun& run) {
    branch_.StartQueries(run);
    const int64_t num_visible = NumVisibleSummaries(dims_, run.position + run.num_queries - 1);
    for (int64_t tile = 0; tile < num_visible; tile += kTileKeys) {
      const SummaryRun keys{run.document, tile,
                            static_cast<int32_t>(std::min<int64_t>(kTileKeys, num_visible - tile))};
      LoadSummaries(keys);
      branch_.MakeKeyPanels();
      QueryRun seeing = run;
      seeing.position = std::max(run.position, FirstPositionOf(keys));
      seeing.num_queries = run.position + run.num_queries - seeing.position;
      SetVisible(seeing, keys);
      branch_.AddToQueries((run.num_queries - seeing.num_queries) * group_size_,
                           seeing.num_queries * group_size_);
    }
    branch_.StoreQueries(run, params_.queries_gradients);
  }

  void RunKeys(const SummaryRun& keys) {
    LoadSummaries(keys);
    branch_.StartKeys();
    const Document& document = params_.queries.documents[keys.document];
    ForEachRun(params_.queries, keys.document, FirstPositionOf(keys), document.num_tokens,
               QueriesPerSum(dims_), [&](const QueryRun& run) {
                 branch_.LoadQueries(run);
                 SetVisible(run, keys);
                 branch_.AddToKeys(run.num_queries * group_size_);
               });
    const int64_t dk = dims_.head_dim_qk, dv = dims_.head_dim_v, heads = dims_.num_kv_heads;
    for (int64_t i = 0; i < keys.num_blocks; ++i) {
      float* const row = params_.d_summaries +
                         (document.cmp_block_begin + keys.first_block + i) * heads * (dk + dv);
      std::copy_n(s_.dk + i * dk, dk, row + kv_head_ * dk);
      std::copy_n(s_.dv + i * dv, dv, row + heads * dk + kv_head_ * dv);
    }
  }

 private:
  // Of the first query that sees one of the summaries.
  int64_t FirstPositionOf(const SummaryRun& keys) const {
    return keys.first_block * dims_.compress_stride_tokens + dims_.compress_block_tokens - 1;
  }

  void SetVisible(const QueryRun& run, const SummaryRun& keys) {
    for (int64_t i = 0; i < run.num_queries; ++i) {
      const int64_t seen = NumVisibleSummaries(dims_, run.position + i) - keys.first_block;
      std::fill_n(
          s_.visible + i * group_size_, group_size_,
          VisibleKeys{.begin = 0,
                      .end = static_cast<int32_t>(std::min<int64_t>(keys.num_blocks, seen))});
    }
  }

  void LoadSummaries(const SummaryRun& keys) {
    const int64_t first =
        params_.queries.documents[keys.document].cmp_block_begin + keys.first_block;
    const auto find = [&](const ConstTensor3& summaries) {
      for (int32_t i = 0; i < keys.num_blocks; ++i) {
        s_.tokens[i] = RowOf(summaries, dims_.dtype, first + i, kv_head_);
      }
      return s_.tokens;
    };
    branch_.LoadKeys(find(params_.kc), keys.num_blocks);
    branch_.LoadValues(find(params_.vc), keys.num_blocks);
  }

  const AttendSummariesBackwardParams& params_;
  const AttentionDims& dims_;
  const int64_t group_size_;
  const int32_t kv_head_;
  const BranchScratch& s_;
  BranchItem branch_;
};

}  // namespace

absl::Status AttendSummariesBackward(const AttendSummariesBackwardParams& params,
                                     Workers& workers) {
  std::vector<SummaryRun> keys;
  for (int32_t document = 0; document < params.num_documents; ++document) {
    const int64_t num_blocks = params.queries.documents[document].num_cmp_blocks;
    for (int64_t block = 0; block < num_blocks; block += kTileKeys) {
      keys.push_back({document, block,
                      static_cast<int32_t>(std::min<int64_t>(kTileKeys, num_blocks - block))});
    }
  }
  return RunBranchItems<Item>(params, keys, workers);
}

}  // namespace nsa::kernels::cpu
