// Stages 4 and 5: attention over summaries, importance of select blocks, top-n.
//
// An item is a run of queries of one kv head. Its logits are kept until the maximum of each row
// over all summaries is known: probabilities are then computed once and for good, and blocks whose
// summaries are equal score exactly the same, wherever in the document they lie.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/cpu/rows.h"
#include "kernels/cpu/select_blocks.h"
#include "kernels/cpu/stages.h"
#include "kernels/cpu/tile_ops.h"

namespace nsa::kernels::cpu {
namespace {

// Rows of work in an item: enough to pay for the transposition of each tile of summaries.
constexpr int64_t kTargetRows = 128;
// Logits of an item, unless one query alone has more: G * N of 4 bytes.
constexpr int64_t kMaxLogitBytes = int64_t{16} << 20;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct Shape {
  int64_t rows;          // of an item
  int64_t logit_stride;  // summaries that an item may see, whole tiles
  int64_t strides;       // compression blocks that start inside the candidates of an item
  int64_t reach;         // l / d - 1, rounded up: how far a block reaches past its own stride
};

struct Scratch {
  Scratch(const AttentionDims& dims, const Shape& shape, char* memory)
      : Scratch(dims, shape, Carver(memory)) {}

  float* q;              // [rows,Dk]
  float* o;              // [rows,Dv]
  float* max;            // [rows]
  float* sums;           // [rows,kLanes]
  float* logits;         // [rows,logit_stride] then exp(logit - max)
  float* keys;           // [Dk,kTileKeys]
  float* values;         // [kTileKeys,Dv]
  const void** summary;  // [kTileKeys] addresses of a tile's summaries
  float* probability;    // [reach + strides] of each compression block, summed over the group
  float* stride_score;   // [strides] probability that falls on each stride
  float* block_score;    // [strides]
  int64_t num_bytes;

 private:
  Scratch(const AttentionDims& dims, const Shape& shape, Carver carver) {
    q = carver.Take<float>(shape.rows * dims.head_dim_qk);
    o = carver.Take<float>(shape.rows * dims.head_dim_v);
    max = carver.Take<float>(shape.rows);
    sums = carver.Take<float>(shape.rows * kLanes);
    logits = carver.Take<float>(shape.rows * shape.logit_stride);
    keys = carver.Take<float>(static_cast<int64_t>(dims.head_dim_qk) * kTileKeys);
    values = carver.Take<float>(static_cast<int64_t>(kTileKeys) * dims.head_dim_v);
    summary = carver.Take<const void*>(kTileKeys);
    probability = carver.Take<float>(shape.reach + shape.strides);
    stride_score = carver.Take<float>(shape.strides);
    block_score = carver.Take<float>(shape.strides);
    num_bytes = carver.num_bytes();
  }
};

class Item {
 public:
  Item(const ScoreAndSelectParams& params, FindSummaries find_kc, FindSummaries find_vc,
       const Shape& shape, const QueryRun& run, int32_t kv_head, char* scratch)
      : params_(params),
        find_kc_(find_kc),
        find_vc_(find_vc),
        dims_(params.dims),
        shape_(shape),
        run_(run),
        kv_head_(kv_head),
        group_size_(dims_.group_size()),
        num_rows_(run.num_queries * group_size_),
        num_visible_(NumVisibleSummaries(dims_, run.position + run.num_queries - 1)),
        s_(dims_, shape, scratch),
        rows_{.head_dim_qk = dims_.head_dim_qk,
              .head_dim_v = dims_.head_dim_v,
              .scale = dims_.softmax_scale,
              .q = s_.q,
              .o = s_.o,
              .max = s_.max,
              .sums = s_.sums} {}

  void Run(std::vector<ScoredBlock>& heap) {
    LoadQueries(dims_, params_.queries.q, dims_.head_dim_qk, run_, kv_head_, s_.q);
    ResetRows(rows_, num_rows_);
    for (int64_t tile = 0; tile < num_visible_; tile += kTileKeys) ComputeLogits(tile);
    for (int64_t tile = 0; tile < num_visible_; tile += kTileKeys) AddValues(tile);
    for (int64_t i = 0; i < run_.num_queries; ++i) FinishQuery(i, heap);
  }

 private:
  int64_t NumVisibleTo(int64_t query) const {
    return NumVisibleSummaries(dims_, run_.position + query);
  }

  // The first query of the run that sees summary `block`.
  int64_t FirstQueryOf(int64_t block) const {
    const int64_t last_token =
        block * dims_.compress_stride_tokens + dims_.compress_block_tokens - 1;
    return std::max<int64_t>(0, last_token - run_.position);
  }

  // Addresses of the tile's summaries that the run sees; returns how many.
  int32_t FindTile(FindSummaries find, int64_t tile) {
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(kTileKeys, num_visible_ - tile));
    find(run_.document, tile, count, kv_head_, s_.summary);
    return count;
  }

  void ComputeLogits(int64_t tile) {
    const int32_t count = FindTile(find_kc_, tile);
    TransposeToFloat(dims_.dtype, s_.summary, count, dims_.head_dim_qk, s_.keys);
    const int64_t first_query = FirstQueryOf(tile);
    const int64_t first_row = first_query * group_size_;
    MatMul(MatMulArgs{.a = s_.q + first_row * dims_.head_dim_qk,
                      .a_stride = dims_.head_dim_qk,
                      .b = s_.keys,
                      .b_stride = kTileKeys,
                      .c = LogitsOf(first_row, tile),
                      .c_stride = shape_.logit_stride,
                      .rows = num_rows_ - first_row,
                      .depth = dims_.head_dim_qk,
                      .cols = RoundUp(count, kLanes)},
           dims_.softmax_scale);
    for (int64_t i = first_query; i < run_.num_queries; ++i) {
      const int64_t visible = std::min<int64_t>(kTileKeys, NumVisibleTo(i) - tile);
      for (int64_t row = i * group_size_; row < (i + 1) * group_size_; ++row) {
        s_.max[row] = std::max(s_.max[row], MaxOf(LogitsOf(row, tile), visible));
      }
    }
  }

  void AddValues(int64_t tile) {
    const int32_t count = FindTile(find_vc_, tile);
    const int32_t width = static_cast<int32_t>(RoundUp(count, kLanes));
    for (int32_t i = 0; i < count; ++i) {
      ToFloat(dims_.dtype, s_.summary[i], dims_.head_dim_v, s_.values + i * dims_.head_dim_v);
    }
    std::fill(s_.values + count * dims_.head_dim_v, s_.values + width * dims_.head_dim_v, 0.0f);
    const int64_t first_query = FirstQueryOf(tile);
    const int64_t first_row = first_query * group_size_;
    for (int64_t i = first_query; i < run_.num_queries; ++i) {
      const int32_t visible =
          static_cast<int32_t>(std::min<int64_t>(width, NumVisibleTo(i) - tile));
      for (int64_t row = i * group_size_; row < (i + 1) * group_size_; ++row) {
        ExpAndSum(LogitsOf(row, tile), width, visible, s_.max[row], s_.sums + row * kLanes);
      }
    }
    MatMulAdd(MatMulArgs{.a = LogitsOf(first_row, tile),
                         .a_stride = shape_.logit_stride,
                         .b = s_.values,
                         .b_stride = dims_.head_dim_v,
                         .c = s_.o + first_row * dims_.head_dim_v,
                         .c_stride = dims_.head_dim_v,
                         .rows = num_rows_ - first_row,
                         .depth = width,
                         .cols = dims_.head_dim_v});
  }

  void FinishQuery(int64_t query, std::vector<ScoredBlock>& heap) {
    const int64_t num_candidates = (run_.position + query) / dims_.select_block_tokens + 1;
    // Where all candidates are taken nobody asks for their scores.
    if (num_candidates > dims_.num_selected_blocks) ScoreBlocks(query, num_candidates);
    const int64_t token = run_.row + query;
    SelectBlocks(dims_, s_.block_score, num_candidates, heap,
                 params_.block_indices +
                     (token * dims_.num_kv_heads + kv_head_) * dims_.num_selected_blocks);
    for (int32_t g = 0; g < group_size_; ++g) {
      const int64_t row = query * group_size_ + g;
      const int64_t head = kv_head_ * group_size_ + g;
      const float lse = FinishRow(rows_, row);
      FromFloat(dims_.dtype, s_.o + row * dims_.head_dim_v, dims_.head_dim_v,
                RowOf(params_.o_cmp, dims_.dtype, token, head));
      if (params_.lse_cmp != nullptr) params_.lse_cmp[token * dims_.num_q_heads + head] = lse;
    }
  }

  // NSA equations 9 and 10. A compression block reaches into l / d strides; a select block's score
  // is what falls on its l' / d strides.
  void ScoreBlocks(int64_t query, int64_t num_candidates) {
    const int64_t strides_per_block = dims_.select_block_tokens / dims_.compress_stride_tokens;
    const int64_t num_strides = RoundUp(num_candidates * strides_per_block, kLanes);
    const int64_t num_visible = RoundUp(NumVisibleTo(query), kLanes);
    std::fill_n(s_.probability, shape_.reach + shape_.strides, 0.0f);
    float* const probability = s_.probability + shape_.reach;
    for (int32_t g = 0; g < group_size_ && num_visible > 0; ++g) {
      const int64_t row = query * group_size_ + g;
      AddScaled(LogitsOf(row, 0), num_visible, 1.0f / SumOfLanes(s_.sums + row * kLanes),
                probability);
    }
    std::fill_n(s_.stride_score, num_strides, 0.0f);
    const int64_t strides_reached = dims_.compress_block_tokens / dims_.compress_stride_tokens;
    for (int64_t b = 0; b < strides_reached; ++b) {
      AddScaled(probability - b, num_strides, 1.0f, s_.stride_score);
    }
    const float* stride_score = s_.stride_score;
    for (int64_t j = 0; j < num_candidates; ++j) {
      float score = 0.0f;
      for (int64_t a = 0; a < strides_per_block; ++a) score += *stride_score++;
      s_.block_score[j] = score;
    }
  }

  float* LogitsOf(int64_t row, int64_t tile) {
    return s_.logits + row * shape_.logit_stride + tile;
  }

  const ScoreAndSelectParams& params_;
  const FindSummaries find_kc_;
  const FindSummaries find_vc_;
  const AttentionDims& dims_;
  const Shape& shape_;
  const QueryRun& run_;
  const int32_t kv_head_;
  const int64_t group_size_;
  const int64_t num_rows_;
  const int64_t num_visible_;  // summaries that the last query sees
  const Scratch s_;
  const SoftmaxRows rows_;
};

}  // namespace

absl::Status ScoreAndSelect(const ScoreAndSelectParams& params, Workers& workers) {
  const auto find_in = [&](const ConstTensor3& summaries) {
    return [&](int32_t document, int64_t first, int32_t count, int32_t kv_head, const void** rows) {
      const int64_t row = params.queries.documents[document].cmp_block_begin + first;
      for (int32_t i = 0; i < count; ++i) {
        rows[i] = RowOf(summaries, params.dims.dtype, row + i, kv_head);
      }
    };
  };
  return ScoreAndSelect(params, find_in(params.kc), find_in(params.vc), workers);
}

absl::Status ScoreAndSelect(const ScoreAndSelectParams& params, FindSummaries find_kc,
                            FindSummaries find_vc, Workers& workers) {
  const AttentionDims& dims = params.dims;
  int64_t last_position = 0;
  for (int32_t i = 0; i < params.queries.num_segments; ++i) {
    const Segment& segment = params.queries.segments[i];
    last_position = std::max(last_position, segment.position + segment.num_tokens - 1);
  }
  const int64_t strides_per_block = dims.select_block_tokens / dims.compress_stride_tokens;
  const int64_t max_candidates = last_position / dims.select_block_tokens + 1;
  Shape shape;
  shape.logit_stride = RoundUp(NumVisibleSummaries(dims, last_position), kTileKeys);
  shape.strides = std::max(shape.logit_stride, RoundUp(max_candidates * strides_per_block, kLanes));
  shape.reach = RoundUp(dims.compress_block_tokens / dims.compress_stride_tokens - 1, kLanes);

  const int64_t rows_in_budget = kMaxLogitBytes / (static_cast<int64_t>(sizeof(float)) *
                                                   std::max<int64_t>(1, shape.logit_stride));
  const int64_t queries_per_run =
      QueriesPerRun(params.queries, dims, params.queries.num_tokens,
                    std::min(kTargetRows, rows_in_budget), workers.num_threads());
  shape.rows = queries_per_run * dims.group_size();
  const std::vector<QueryRun> runs =
      SplitQueries(params.queries, 0, params.queries.num_tokens, queries_per_run);
  const int64_t scratch_bytes = Scratch(dims, shape, nullptr).num_bytes;
  const HeadRange& heads = params.queries.kv_heads;
  return workers.Run(static_cast<int64_t>(runs.size()) * heads.size(), scratch_bytes,
                     [&](int64_t item, char* scratch) {
                       std::vector<ScoredBlock> heap;
                       Item(params, find_kc, find_vc, shape, runs[item / heads.size()],
                            heads.begin + static_cast<int32_t>(item % heads.size()), scratch)
                           .Run(heap);
                     });
}

}  // namespace nsa::kernels::cpu
