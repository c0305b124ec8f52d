#include "kernels/cpu/stages_testing.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

namespace nsa::kernels::cpu {
namespace {

using test::Bytes;

class Runner {
 public:
  Runner(const StageProblem& problem, const StageLayout& layout, Kernels& kernels)
      : problem_(problem), dims_(problem.dims), layout_(layout), kernels_(kernels) {
    for (size_t d = 0; d < problem.documents.size(); ++d) {
      const Document& document = problem.documents[d];
      for (int64_t begin = 0; begin < document.num_tokens; begin += layout.segment_tokens) {
        const bool is_halo = layout.use_halo_and_slots && token_segments_.size() % 2 == 1;
        token_segments_.push_back(
            {.row = problem.num_tokens() - document.token_begin -
                    std::min(begin + layout.segment_tokens, document.num_tokens),
             .num_tokens = std::min(layout.segment_tokens, document.num_tokens - begin),
             .position = begin,
             .document = static_cast<int32_t>(d),
             .is_halo = is_halo});
        query_segments_.push_back(token_segments_.back());
        query_segments_.back().is_halo = 0;
        if (!layout.one_query_a_call) continue;
        const Segment segment = query_segments_.back();
        query_segments_.pop_back();
        for (int64_t i = 0; i < segment.num_tokens; ++i) {
          query_segments_.push_back({.row = segment.row + i,
                                     .num_tokens = 1,
                                     .position = segment.position + i,
                                     .document = segment.document,
                                     .is_halo = 0});
        }
      }
      num_slc_blocks_ = document.slc_block_begin + document.num_slc_blocks;
      num_cmp_blocks_ = document.cmp_block_begin + document.num_cmp_blocks;
      slc_runs_.push_back({static_cast<int32_t>(d), 0, document.num_slc_blocks});
      cmp_runs_.push_back({static_cast<int32_t>(d), 0, document.num_cmp_blocks});
    }
  }

  absl::StatusOr<StageOutputs> Run() {
    const auto& in = problem_.encoded;
    const int64_t hq = dims_.num_q_heads, hkv = dims_.num_kv_heads;
    const int64_t dk = dims_.head_dim_qk, dv = dims_.head_dim_v, tokens = problem_.num_tokens();

    // Summaries, of k and of v.
    Rows kc(dims_.dtype, num_cmp_blocks_, hkv, dk, layout_.row_padding);
    Rows vc(dims_.dtype, num_cmp_blocks_, hkv, dv, layout_.row_padding);
    absl::Status status = Compress(in.k_cmp, dk, in.compress_k, kc);
    if (!status.ok()) return status;
    status = Compress(in.v_cmp, dv, in.compress_v, vc);
    if (!status.ok()) return status;

    // Records, each in the own window or in a slot.
    auto k_slc = Place(in.k_slc, dk), v_slc = Place(in.v_slc, dv);
    const int64_t record_bytes = kernels_.RecordBytes(dims_);
    Bytes records(num_slc_blocks_ * hkv * record_bytes, kPoison);
    status = kernels_.PackBlocks({.dims = dims_,
                                  .k = TokensOf(k_slc),
                                  .v = TokensOf(v_slc),
                                  .documents = problem_.documents.data(),
                                  .runs = slc_runs_.data(),
                                  .num_runs = static_cast<int32_t>(slc_runs_.size()),
                                  .num_blocks = num_slc_blocks_,
                                  .records = records.data()},
                                 nullptr);
    if (!status.ok()) return status;
    SplitRecords(records, record_bytes);

    auto q = Place(in.q, hq * dk, hq).first;
    auto k_win = Place(in.k_win, dk), v_win = Place(in.v_win, dv);
    Rows o_cmp(dims_.dtype, tokens, hq, dv, layout_.row_padding);
    Rows o_slc = o_cmp, o_win = o_cmp, o = o_cmp;
    Rows gate(problem_.options.gate_dtype, tokens, hq, 3, layout_.row_padding);
    Scatter(in.gate, gate);
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> lse_cmp(tokens * hq, nan), lse_slc = lse_cmp, lse_win = lse_cmp;
    std::vector<int32_t> indices(tokens * hkv * dims_.num_selected_blocks, -7);

    Bytes scratch(kernels_.ScoreScratchBytes(
                      dims_, {.num_tokens = tokens,
                              .num_segments = static_cast<int32_t>(query_segments_.size()),
                              .num_cmp_blocks = num_cmp_blocks_,
                              .num_documents = static_cast<int32_t>(problem_.documents.size())}) +
                      1,  // so that it is somewhere
                  kPoison);

    const size_t segments_a_call = layout_.one_query_a_call ? 1 : query_segments_.size();
    const int32_t heads_a_call = layout_.one_kv_head_a_call ? 1 : dims_.num_kv_heads;
    for (size_t s = 0; s < query_segments_.size(); s += segments_a_call) {
      for (int32_t head = 0; head < dims_.num_kv_heads; head += heads_a_call) {
        const Queries queries{.q = q.view(),
                              .segments = &query_segments_[s],
                              .num_segments = static_cast<int32_t>(segments_a_call),
                              .documents = problem_.documents.data(),
                              .num_tokens = tokens,
                              .kv_heads = {head, head + heads_a_call}};
        status = kernels_.ScoreAndSelect(
            {.dims = dims_,
             .queries = queries,
             .kc = kc.view(),
             .vc = vc.view(),
             .num_cmp_blocks = num_cmp_blocks_,
             .num_documents = static_cast<int32_t>(problem_.documents.size()),
             .o_cmp = o_cmp.mutable_view(),
             .lse_cmp = lse_cmp.data(),
             .block_indices = indices.data(),
             .scratch = scratch.data()},
            nullptr);
        if (!status.ok()) return status;
        status = kernels_.AttendWindow({.dims = dims_,
                                        .queries = queries,
                                        .k = TokensOf(k_win),
                                        .v = TokensOf(v_win),
                                        .o_win = o_win.mutable_view(),
                                        .lse_win = lse_win.data()},
                                       nullptr);
        if (!status.ok()) return status;
        status = kernels_.AttendSelected(
            {.dims = dims_,
             .queries = queries,
             .query_begin = 0,
             .query_end = tokens,
             .block_indices = indices.data(),
             .locations = locations_.data(),
             .num_blocks = num_slc_blocks_,
             .own_records = own_records_.data(),
             .num_own_records = num_own_records_,
             .slots = slots_.data(),
             .o_slc = o_slc.mutable_view(),
             .lse_slc = lse_slc.data(),
             .gate = {.gate = gate.bytes.data(),
                      .gate_dtype = problem_.options.gate_dtype,
                      .row_stride = gate.row_stride,
                      .head_stride = gate.head_stride,
                      .o_cmp = o_cmp.view(),
                      .o_win = o_win.view(),
                      .o = (layout_.gate_in_place ? o_cmp : o).mutable_view()}},
            nullptr);
        if (!status.ok()) return status;
      }
    }

    StageOutputs out;
    out.kc = Dense(kc, num_cmp_blocks_);
    out.vc = Dense(vc, num_cmp_blocks_);
    out.o_cmp = Gather(o_cmp);
    out.o_slc = Gather(o_slc);
    out.o_win = Gather(o_win);
    out.o = Gather(layout_.gate_in_place ? o_cmp : o);
    out.lse_cmp = Gather(lse_cmp, hq);
    out.lse_slc = Gather(lse_slc, hq);
    out.lse_win = Gather(lse_win, hq);
    out.block_indices = Gather(indices, hkv * dims_.num_selected_blocks);
    return out;
  }

 private:
  // visit(row, global token, is_halo) for each token.
  template <class Visit>
  void ForEachToken(const Visit& visit) const {
    for (const Segment& segment : token_segments_) {
      const int64_t begin = problem_.documents[segment.document].token_begin + segment.position;
      for (int64_t i = 0; i < segment.num_tokens; ++i) {
        visit(segment.row + i, begin + i, segment.is_halo != 0);
      }
    }
  }

  void Scatter(const Bytes& dense, Rows& rows) const {
    ForEachToken([&](int64_t row, int64_t token, bool) {
      std::memcpy(rows.row(row), dense.data() + token * rows.row_bytes, rows.row_bytes);
    });
  }

  Bytes Gather(Rows& rows) const {
    Bytes dense(problem_.num_tokens() * rows.row_bytes);
    ForEachToken([&](int64_t row, int64_t token, bool) {
      std::memcpy(dense.data() + token * rows.row_bytes, rows.row(row), rows.row_bytes);
    });
    return dense;
  }

  template <class T>
  std::vector<T> Gather(const std::vector<T>& rows, int64_t row_size) const {
    std::vector<T> dense(rows.size());
    ForEachToken([&](int64_t row, int64_t token, bool) {
      std::copy_n(rows.begin() + row * row_size, row_size, dense.begin() + token * row_size);
    });
    return dense;
  }

  static Bytes Dense(Rows& rows, int64_t num_rows) {
    Bytes dense(num_rows * rows.row_bytes);
    for (int64_t i = 0; i < num_rows; ++i) {
      std::memcpy(dense.data() + i * rows.row_bytes, rows.row(i), rows.row_bytes);
    }
    return dense;
  }

  // The own and the halo tensor; each token is in one of them, and NaN in the other.
  std::pair<Rows, Rows> Place(const Bytes& dense, int64_t head_dim) const {
    Rows own(dims_.dtype, problem_.num_tokens(), dims_.num_kv_heads, head_dim, layout_.row_padding);
    Rows halo = own;
    ForEachToken([&](int64_t row, int64_t token, bool is_halo) {
      std::memcpy((is_halo ? halo : own).row(row), dense.data() + token * own.row_bytes,
                  own.row_bytes);
    });
    return {std::move(own), std::move(halo)};
  }

  // Of the queries, all own.
  std::pair<Rows, Rows> Place(const Bytes& dense, int64_t row_size, int64_t heads) const {
    Rows own(dims_.dtype, problem_.num_tokens(), heads, row_size / heads, layout_.row_padding);
    Scatter(dense, own);
    return {own, own};
  }

  TokenRows TokensOf(const std::pair<Rows, Rows>& rows) const {
    return {.own = rows.first.view(),
            .halo = rows.second.view(),
            .segments = token_segments_.data(),
            .num_segments = static_cast<int32_t>(token_segments_.size())};
  }

  absl::Status Compress(const Bytes& dense, int64_t head_dim,
                        const test::EncodedParameters& parameters, Rows& summaries) const {
    const auto rows = Place(dense, head_dim);
    return kernels_.Compress({.dims = dims_,
                              .head_dim = static_cast<int32_t>(head_dim),
                              .compressor = test::MakeCompressor(problem_.config.compressor),
                              .weights = parameters.view(),
                              .tokens = TokensOf(rows),
                              .documents = problem_.documents.data(),
                              .runs = cmp_runs_.data(),
                              .num_runs = static_cast<int32_t>(cmp_runs_.size()),
                              .summaries = summaries.mutable_view()},
                             nullptr);
  }

  void SplitRecords(const Bytes& records, int64_t record_bytes) {
    const int64_t count = num_slc_blocks_ * dims_.num_kv_heads;
    locations_.assign(count, -1);
    num_own_records_ = layout_.use_halo_and_slots ? (count + 1) / 2 : count;
    int64_t num_slots = 0, num_own = 0;
    for (int64_t i = 0; i < count; ++i) {
      const bool is_slot = layout_.use_halo_and_slots && i % 2 == 1;
      Bytes& to = is_slot ? slots_ : own_records_;
      to.insert(to.end(), records.begin() + i * record_bytes,
                records.begin() + (i + 1) * record_bytes);
      locations_[i] = static_cast<int32_t>(is_slot ? num_own_records_ + num_slots++ : num_own++);
    }
  }

  const StageProblem& problem_;
  const AttentionDims& dims_;
  const StageLayout& layout_;
  Kernels& kernels_;
  std::vector<Segment> token_segments_, query_segments_;
  std::vector<BlockRun> slc_runs_, cmp_runs_;
  int64_t num_slc_blocks_ = 0, num_cmp_blocks_ = 0, num_own_records_ = 0;
  std::vector<int32_t> locations_;
  Bytes own_records_, slots_;
};

}  // namespace

reference::ReferenceConfig SmallConfig() {
  reference::ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = 64;
  config.head_dim_v = 64;
  config.num_selected_blocks = 5;
  config.window_tokens = 70;
  return config;
}

std::vector<reference::ReferenceConfig> ConfigsOfBlockSizes() {
  struct Blocks {
    int64_t l, d, slc;
  };
  std::vector<reference::ReferenceConfig> configs;
  for (const Blocks& blocks :
       {Blocks{16, 16, 16}, Blocks{32, 16, 48}, Blocks{64, 16, 80}, Blocks{64, 64, 64},
        Blocks{128, 32, 160}, Blocks{48, 48, 240}, Blocks{96, 16, 256}, Blocks{320, 16, 32}}) {
    configs.push_back(SmallConfig());
    configs.back().compress_block_tokens = blocks.l;
    configs.back().compress_stride_tokens = blocks.d;
    configs.back().select_block_tokens = blocks.slc;
    configs.back().num_selected_blocks = 3;
  }
  return configs;
}

std::vector<reference::ReferenceConfig> ConfigsOfWindows() {
  std::vector<reference::ReferenceConfig> configs;
  for (int64_t window : {1, 2, 63, 64, 65, 129, 5000}) {
    configs.push_back(SmallConfig());
    configs.back().window_tokens = window;
  }
  return configs;
}

std::vector<reference::ReferenceConfig> ConfigsOfBlockNumbers() {
  struct Numbers {
    int64_t n, initial, local;
  };
  std::vector<reference::ReferenceConfig> configs;
  for (const Numbers& numbers : {Numbers{1, 0, 1}, Numbers{3, 1, 2}, Numbers{4, 0, 1},
                                 Numbers{6, 3, 2}, Numbers{17, 1, 2}, Numbers{64, 2, 3}}) {
    configs.push_back(SmallConfig());
    configs.back().num_selected_blocks = numbers.n;
    configs.back().num_initial_blocks = numbers.initial;
    configs.back().num_local_blocks = numbers.local;
  }
  return configs;
}

StageProblem MakeStageProblem(const reference::ReferenceConfig& config,
                              const test::InputOptions& options,
                              const reference::ReferenceInputs& inputs) {
  StageProblem problem;
  problem.config = config;
  problem.options = options;
  problem.inputs = inputs;
  problem.encoded = test::Encode(inputs, options);
  problem.dims = test::MakeDims(config, options.dtype);
  problem.documents = test::MakeDocuments(config, inputs.cu_seqlens);
  return problem;
}

StageProblem MakeStageProblem(const reference::ReferenceConfig& config,
                              const std::vector<int64_t>& cu_seqlens,
                              const test::InputOptions& options, uint64_t seed) {
  test::Random random(seed);
  return MakeStageProblem(config, options,
                          test::RandomInputs(config, cu_seqlens, options, &random));
}

absl::StatusOr<StageOutputs> RunStages(const StageProblem& problem, const StageLayout& layout,
                                       Kernels& kernels) {
  return Runner(problem, layout, kernels).Run();
}

}  // namespace nsa::kernels::cpu
