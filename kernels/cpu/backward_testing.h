// The backward of the branches as one would call it, on a problem that is cut in any way; all that
// kernels have not written is NaN.
#ifndef KERNELS_CPU_BACKWARD_TESTING_H_
#define KERNELS_CPU_BACKWARD_TESTING_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/stages_testing.h"
#include "tests/reference/gradients.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cpu {

// How the problem is cut; only dq has to be the same bit for bit.
struct BackwardCut {
  int num_threads = 2;
  int64_t segment_tokens = int64_t{1} << 40;  // last segment first in memory
  bool use_halo = false;                      // for every second segment of k and v
  int32_t heads_a_call = 64;
  int64_t queries_a_call = int64_t{1} << 40;  // of the selected branch
  bool adds = false;                          // to gradients of kBefore
  static constexpr float kBefore = 0.5f;
};

// In global token order.
struct BranchGradients {
  std::vector<float> dq, dgate, dkc, dvc, dk_slc, dv_slc, dk_win, dv_win;
};

struct ExpectedBackward {
  std::vector<double> d_o;
  reference::ReferenceOutputs forward;
  reference::ReferenceGradients backward;
};

inline ExpectedBackward MakeExpectedBackward(const StageProblem& problem, uint64_t seed) {
  ExpectedBackward expected;
  test::Random random(seed);
  expected.d_o.resize(problem.num_tokens() * problem.config.num_q_heads *
                      problem.config.head_dim_v);
  for (double& x : expected.d_o) x = random.Normal();
  expected.d_o = test::Rounded(problem.options.dtype, expected.d_o);
  expected.forward = *reference::Forward(problem.config, problem.inputs);
  expected.backward = *reference::Backward(problem.config, problem.inputs,
                                           expected.forward.block_indices, expected.d_o);
  return expected;
}

class BackwardRunner {
 public:
  BackwardRunner(const StageProblem& problem, const ExpectedBackward& expected,
                 const BackwardCut& cut)
      : problem_(problem),
        dims_(problem.dims),
        expected_(expected),
        cut_(cut),
        kernels_(*CpuKernels::Create({.num_threads = cut.num_threads})),
        tokens_(problem.num_tokens()) {
    for (size_t d = 0; d < problem.documents.size(); ++d) {
      const Document& document = problem.documents[d];
      for (int64_t begin = 0; begin < document.num_tokens; begin += cut.segment_tokens) {
        const int64_t count = std::min(cut.segment_tokens, document.num_tokens - begin);
        queries_.push_back({.row = tokens_ - document.token_begin - begin - count,
                            .num_tokens = count,
                            .position = begin,
                            .document = static_cast<int32_t>(d),
                            .is_halo = 0});
        keys_.push_back(queries_.back());
        keys_.back().is_halo = cut.use_halo && keys_.size() % 2 == 0;
      }
    }
  }

  BranchGradients Run() {
    const int64_t hq = dims_.num_q_heads, dk = dims_.head_dim_qk, dv = dims_.head_dim_v;
    const int32_t hkv = dims_.num_kv_heads;
    q_ = Scatter(problem_.encoded.q, hq * dk * SizeOf(dims_.dtype));
    d_o_ = Scatter(Encoded(expected_.d_o), hq * dv * SizeOf(dims_.dtype));
    BranchGradients out;
    out.dgate = Gather(RunGate(), hq * 3);
    const float before = cut_.adds ? BackwardCut::kBefore : kNan;
    for (auto* halves : {&dk_win_, &dk_slc_}) {
      for (auto& half : *halves) half.assign(tokens_ * hkv * dk, before);
    }
    for (auto* halves : {&dv_win_, &dv_slc_}) {
      for (auto& half : *halves) half.assign(tokens_ * hkv * dv, before);
    }
    d_summaries_.assign(NumSummaries() * hkv * (dk + dv), kNan);
    out.dq.resize(tokens_ * hq * dk);
    PackRecords();
    for (int32_t head = 0; head < hkv; head += cut_.heads_a_call) {
      heads_ = {head, std::min(hkv, head + cut_.heads_a_call)};
      const int64_t width = heads_.size() * dims_.group_size() * dk;
      dq_.assign(tokens_ * width, before);
      RunWindow();
      RunSelected();
      RunSummaries();
      const std::vector<float> dq = Gather(dq_, width);
      for (int64_t token = 0; token < tokens_; ++token) {
        std::copy_n(dq.begin() + token * width, width,
                    out.dq.begin() + (token * hq + head * dims_.group_size()) * dk);
      }
    }
    UnpackRecords();
    for (int64_t row = 0; row < NumSummaries(); ++row) {
      const auto begin = d_summaries_.begin() + row * hkv * (dk + dv);
      out.dkc.insert(out.dkc.end(), begin, begin + hkv * dk);
      out.dvc.insert(out.dvc.end(), begin + hkv * dk, begin + hkv * (dk + dv));
    }
    out.dk_win = GatherKeys(dk_win_, hkv * dk);
    out.dv_win = GatherKeys(dv_win_, hkv * dv);
    out.dk_slc = GatherKeys(dk_slc_, hkv * dk);
    out.dv_slc = GatherKeys(dv_slc_, hkv * dv);
    return out;
  }

 private:
  static constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

  using Halves = std::vector<float>[2];  // own, halo

  test::Bytes Encoded(const std::vector<double>& values) const {
    return test::Encode(dims_.dtype, values);
  }
  int64_t NumSummaries() const {
    return problem_.documents.back().cmp_block_begin + problem_.documents.back().num_cmp_blocks;
  }
  int64_t NumBlocks() const {
    return problem_.documents.back().slc_block_begin + problem_.documents.back().num_slc_blocks;
  }

  template <class Visit>
  void ForEachToken(const std::vector<Segment>& segments, const Visit& visit) const {
    for (const Segment& segment : segments) {
      const int64_t begin = problem_.documents[segment.document].token_begin + segment.position;
      for (int64_t i = 0; i < segment.num_tokens; ++i) {
        visit(segment.row + i, begin + i, segment.is_halo);
      }
    }
  }
  test::Bytes Scatter(const test::Bytes& dense, int64_t row_bytes) const {
    test::Bytes rows(dense.size());
    ForEachToken(queries_, [&](int64_t row, int64_t token, int32_t) {
      std::memcpy(&rows[row * row_bytes], &dense[token * row_bytes], row_bytes);
    });
    return rows;
  }
  template <class T>
  std::vector<T> Scatter(const std::vector<T>& dense, int64_t row_size) const {
    std::vector<T> rows(dense.size());
    ForEachToken(queries_, [&](int64_t row, int64_t token, int32_t) {
      std::copy_n(dense.begin() + token * row_size, row_size, rows.begin() + row * row_size);
    });
    return rows;
  }
  std::vector<float> Gather(const std::vector<float>& rows, int64_t row_size) const {
    std::vector<float> dense(rows.size());
    ForEachToken(queries_, [&](int64_t row, int64_t token, int32_t) {
      std::copy_n(rows.begin() + row * row_size, row_size, dense.begin() + token * row_size);
    });
    return dense;
  }
  // Rows that are not in a segment must be as they were.
  std::vector<float> GatherKeys(const Halves& halves, int64_t row_size) const {
    std::vector<float> dense(halves[0].size());
    std::vector<float> rest[2] = {halves[0], halves[1]};
    ForEachToken(keys_, [&](int64_t row, int64_t token, int32_t is_halo) {
      const auto begin = rest[is_halo].begin() + row * row_size;
      std::copy_n(begin, row_size, dense.begin() + token * row_size);
      std::fill_n(begin, row_size, cut_.adds ? BackwardCut::kBefore : kNan);
    });
    for (const auto& half : rest) {
      for (float x : half) EXPECT_TRUE(cut_.adds ? x == BackwardCut::kBefore : x != x);
    }
    return dense;
  }

  static ConstTensor3 View(const test::Bytes& bytes, int64_t heads, int64_t dim) {
    return {bytes.data(), heads * dim, dim};
  }
  // The halo has the rows that the own tensor lacks; both hold NaN elsewhere.
  struct Keys {
    test::Bytes own, halo;
    TokenRows rows;
  };
  Keys MakeKeys(const test::Bytes& dense, int64_t dim) const {
    const int64_t row_bytes = dims_.num_kv_heads * dim * SizeOf(dims_.dtype);
    Keys keys;
    keys.own.assign(dense.size(), std::byte{0xff});
    keys.halo = keys.own;
    ForEachToken(keys_, [&](int64_t row, int64_t token, int32_t is_halo) {
      std::memcpy(&(is_halo != 0 ? keys.halo : keys.own)[row * row_bytes],
                  &dense[token * row_bytes], row_bytes);
    });
    keys.rows = {.own = View(keys.own, dims_.num_kv_heads, dim),
                 .halo = View(keys.halo, dims_.num_kv_heads, dim),
                 .segments = keys_.data(),
                 .num_segments = static_cast<int32_t>(keys_.size())};
    return keys;
  }
  TokenGradients Into(Halves& halves) const {
    return {halves[0].data(), halves[1].data(), cut_.adds};
  }

  std::vector<float> RunGate() {
    const int64_t hq = dims_.num_q_heads, dv = dims_.head_dim_v;
    const int64_t row_bytes = hq * dv * SizeOf(dims_.dtype);
    const test::Bytes o_cmp = Scatter(Encoded(expected_.forward.o_cmp), row_bytes);
    const test::Bytes o_slc = Scatter(Encoded(expected_.forward.o_slc), row_bytes);
    const test::Bytes o_win = Scatter(Encoded(expected_.forward.o_win), row_bytes);
    const test::Bytes gate =
        Scatter(problem_.encoded.gate, hq * 3 * SizeOf(problem_.options.gate_dtype));
    std::vector<float> d_gate(tokens_ * hq * 3, kNan);
    gates_.assign(3 * tokens_ * hq, kNan);
    deltas_ = gates_;
    EXPECT_TRUE(kernels_
                    ->GateBackward({.dims = dims_,
                                    .num_tokens = tokens_,
                                    .gate = gate.data(),
                                    .gate_dtype = problem_.options.gate_dtype,
                                    .row_stride = hq * 3,
                                    .head_stride = 3,
                                    .d_o = View(d_o_, hq, dv),
                                    .o_cmp = View(o_cmp, hq, dv),
                                    .o_slc = View(o_slc, hq, dv),
                                    .o_win = View(o_win, hq, dv),
                                    .d_gate = d_gate.data(),
                                    .gates = gates_.data(),
                                    .deltas = deltas_.data()},
                                   nullptr)
                    .ok());
    return d_gate;
  }

  Queries MakeQueries() const {
    return {.q = View(q_, dims_.num_q_heads, dims_.head_dim_qk),
            .segments = queries_.data(),
            .num_segments = static_cast<int32_t>(queries_.size()),
            .documents = problem_.documents.data(),
            .num_tokens = tokens_,
            .kv_heads = heads_};
  }
  OutputGradients MakeOutputs(const std::vector<double>& lse, int64_t branch) {
    lse_ = Scatter(std::vector<float>(lse.begin(), lse.end()), dims_.num_q_heads);
    const int64_t offset = branch * tokens_ * dims_.num_q_heads;
    return {.d_o = View(d_o_, dims_.num_q_heads, dims_.head_dim_v),
            .lse = lse_.data(),
            .gate = gates_.data() + offset,
            .delta = deltas_.data() + offset};
  }

  void RunWindow() {
    const Keys k = MakeKeys(problem_.encoded.k_win, dims_.head_dim_qk);
    const Keys v = MakeKeys(problem_.encoded.v_win, dims_.head_dim_v);
    EXPECT_TRUE(kernels_
                    ->AttendWindowBackward({.dims = dims_,
                                            .queries = MakeQueries(),
                                            .k = k.rows,
                                            .v = v.rows,
                                            .outputs = MakeOutputs(expected_.forward.lse_win, 2),
                                            .queries_gradients = {dq_.data(), cut_.adds},
                                            .dk = Into(dk_win_),
                                            .dv = Into(dv_win_)},
                                           nullptr)
                    .ok());
  }

  int64_t RecordValues() const {
    return dims_.select_block_tokens * static_cast<int64_t>(dims_.head_dim_qk + dims_.head_dim_v);
  }

  // Blocks of even global index are own, the others may be fetched.
  void PackRecords() {
    for (size_t d = 0; d < problem_.documents.size(); ++d) {
      for (int64_t b = 0; b < problem_.documents[d].num_slc_blocks; ++b) {
        runs_[(problem_.documents[d].slc_block_begin + b) % 2].push_back(
            {static_cast<int32_t>(d), b, 1});
      }
    }
    const Keys k = MakeKeys(problem_.encoded.k_slc, dims_.head_dim_qk);
    const Keys v = MakeKeys(problem_.encoded.v_slc, dims_.head_dim_v);
    for (int32_t i = 0; i < 2; ++i) {
      const int64_t count = static_cast<int64_t>(runs_[i].size());
      records_[i].resize(dims_.num_kv_heads * count * kernels_->RecordBytes(dims_) + 1);
      d_records_[i].assign(dims_.num_kv_heads * count * RecordValues(), i == 0 ? kNan : 0.0f);
      EXPECT_TRUE(kernels_
                      ->PackBlocks({.dims = dims_,
                                    .k = k.rows,
                                    .v = v.rows,
                                    .documents = problem_.documents.data(),
                                    .runs = runs_[i].data(),
                                    .num_runs = static_cast<int32_t>(count),
                                    .num_blocks = count,
                                    .records = records_[i].data()},
                                   nullptr)
                      .ok());
    }
    if (cut_.adds) std::fill(d_records_[0].begin(), d_records_[0].end(), 0.0f);
  }

  void RunSelected() {
    const int64_t n = dims_.num_selected_blocks, num_blocks = NumBlocks();
    const int64_t num_own = dims_.num_kv_heads * static_cast<int64_t>(runs_[0].size());
    const std::vector<int32_t> indices =
        Scatter(expected_.forward.block_indices, dims_.num_kv_heads * n);
    test::Bytes scratch(kernels_->SelectedBackwardScratchBytes(
        dims_, {.num_tokens = tokens_,
                .num_segments = static_cast<int32_t>(queries_.size()),
                .num_kv_heads = heads_.size(),
                .num_cmp_blocks = NumSummaries(),
                .num_slc_blocks = num_blocks,
                .num_records = dims_.num_kv_heads * num_blocks,
                .num_documents = static_cast<int32_t>(problem_.documents.size())}));
    for (int64_t begin = 0; begin < tokens_; begin += cut_.queries_a_call) {
      const int64_t end = std::min(tokens_, begin + cut_.queries_a_call);
      std::vector<int32_t> locations(dims_.num_kv_heads * num_blocks, -1);
      ForEachToken(queries_, [&](int64_t row, int64_t token, int32_t) {
        if (row < begin || row >= end) return;
        const int64_t document = std::upper_bound(problem_.inputs.cu_seqlens.begin(),
                                                  problem_.inputs.cu_seqlens.end(), token) -
                                 problem_.inputs.cu_seqlens.begin() - 1;
        for (int32_t head = heads_.begin; head < heads_.end; ++head) {
          for (int64_t j = 0; j < n; ++j) {
            const int32_t index = indices[(row * dims_.num_kv_heads + head) * n + j];
            if (index < 0) continue;
            const int64_t block = problem_.documents[document].slc_block_begin + index;
            const int64_t record = head * static_cast<int64_t>(runs_[block % 2].size()) + block / 2;
            locations[head * num_blocks + block] =
                static_cast<int32_t>(block % 2 * num_own + record);
          }
        }
      });
      std::vector<float> slots(d_records_[1].size(), kNan);
      EXPECT_TRUE(kernels_
                      ->AttendSelectedBackward(
                          {.dims = dims_,
                           .queries = MakeQueries(),
                           .query_begin = begin,
                           .query_end = end,
                           .block_indices = indices.data(),
                           .locations = locations.data(),
                           .num_blocks = num_blocks,
                           .num_documents = static_cast<int32_t>(problem_.documents.size()),
                           .own_records = records_[0].data(),
                           .num_own_records = num_own,
                           .slots = records_[1].data(),
                           .outputs = MakeOutputs(expected_.forward.lse_slc, 1),
                           .queries_gradients = {dq_.data(), true},
                           .own_gradients = d_records_[0].data(),
                           .adds_to_own = cut_.adds || begin > 0,
                           .slot_gradients = slots.data(),
                           .scratch = scratch.data()},
                          nullptr)
                      .ok());
      std::vector<bool> is_named(num_own + slots.size() / RecordValues());
      for (int32_t location : locations) {
        if (location >= 0) is_named[location] = true;
      }
      for (size_t i = 0; i < slots.size(); ++i) {
        if (is_named[num_own + i / RecordValues()]) {
          d_records_[1][i] += slots[i];
        } else {
          EXPECT_NE(slots[i], slots[i]);
        }
      }
    }
  }

  void UnpackRecords() {
    if (!cut_.adds) {
      ForEachToken(keys_, [&](int64_t row, int64_t, int32_t is_halo) {
        const int64_t hkv = dims_.num_kv_heads;
        const int64_t dk = dims_.head_dim_qk, dv = dims_.head_dim_v;
        EXPECT_TRUE(kernels_->Zero(&dk_slc_[is_halo][row * hkv * dk], hkv * dk * 4, nullptr).ok());
        EXPECT_TRUE(kernels_->Zero(&dv_slc_[is_halo][row * hkv * dv], hkv * dv * 4, nullptr).ok());
      });
    }
    for (int32_t i = 0; i < 2; ++i) {
      EXPECT_TRUE(kernels_
                      ->UnpackGradients({.dims = dims_,
                                         .record_gradients = d_records_[i].data(),
                                         .segments = keys_.data(),
                                         .num_segments = static_cast<int32_t>(keys_.size()),
                                         .documents = problem_.documents.data(),
                                         .runs = runs_[i].data(),
                                         .num_runs = static_cast<int32_t>(runs_[i].size()),
                                         .num_blocks = static_cast<int64_t>(runs_[i].size()),
                                         .dk = Into(dk_slc_),
                                         .dv = Into(dv_slc_)},
                                        nullptr)
                      .ok());
    }
  }

  void RunSummaries() {
    const test::Bytes kc = Encoded(expected_.forward.kc), vc = Encoded(expected_.forward.vc);
    EXPECT_TRUE(kernels_
                    ->AttendSummariesBackward(
                        {.dims = dims_,
                         .queries = MakeQueries(),
                         .kc = View(kc, dims_.num_kv_heads, dims_.head_dim_qk),
                         .vc = View(vc, dims_.num_kv_heads, dims_.head_dim_v),
                         .num_cmp_blocks = NumSummaries(),
                         .num_documents = static_cast<int32_t>(problem_.documents.size()),
                         .outputs = MakeOutputs(expected_.forward.lse_cmp, 0),
                         .queries_gradients = {dq_.data(), true},
                         .d_summaries = d_summaries_.data(),
                         .scratch = nullptr},
                        nullptr)
                    .ok());
  }

  const StageProblem& problem_;
  const AttentionDims& dims_;
  const ExpectedBackward& expected_;
  const BackwardCut& cut_;
  const std::unique_ptr<Kernels> kernels_;
  const int64_t tokens_;
  std::vector<Segment> queries_, keys_;
  HeadRange heads_;
  test::Bytes q_, d_o_;
  std::vector<float> gates_, deltas_, lse_, dq_, d_summaries_;
  Halves dk_win_, dv_win_, dk_slc_, dv_slc_;
  // Own records and slots.
  std::vector<BlockRun> runs_[2];
  test::Bytes records_[2];
  std::vector<float> d_records_[2];
};

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_BACKWARD_TESTING_H_
