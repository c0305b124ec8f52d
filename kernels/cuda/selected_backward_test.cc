// The backward of the selected branch on the GPU: against the fp64 reference, and against itself
// under other layouts of the same work.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cuda/backward_stages_testing.h"
#include "kernels/cuda/mirrored_testing.h"
#include "tests/reference/gradients.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cuda {
namespace {

using cpu::MakeStageProblem;
using cpu::SmallConfig;
using reference::ReferenceConfig;

using SelectedBackwardTest = MirroredTest;

INSTANTIATE_TEST_SUITE_P(Paths, SelectedBackwardTest,
                         ::testing::Values(CudaPath::kAuto, CudaPath::kPortable), NameOfPath);

// A problem whose output is that of the selected branch alone.
struct SelectedProblem {
  SelectedProblem(const ReferenceConfig& config, const std::vector<int64_t>& cu_seqlens,
                  test::InputOptions options, uint64_t seed) {
    Random random(seed);
    auto inputs = test::RandomInputs(config, cu_seqlens, options, &random);
    for (size_t i = 0; i < inputs.gate.size(); ++i) {
      if (i % 3 != 1) inputs.gate[i] = 0.0;
    }
    stage = MakeStageProblem(config, options, inputs);
    std::vector<double> values(inputs.cu_seqlens.back() * config.num_q_heads * config.head_dim_v);
    for (double& value : values) value = random.Normal();
    d_o = test::Encode(options.dtype, values);
    const std::vector<double> rounded = test::Decode(options.dtype, d_o);

    const auto forward = reference::Forward(config, inputs);
    EXPECT_TRUE(forward.ok()) << forward.status();
    block_indices = forward->block_indices;
    for (int64_t row = 0; row < static_cast<int64_t>(forward->lse_slc.size()); ++row) {
      double dot = 0.0;
      for (int64_t i = 0; i < config.head_dim_v; ++i) {
        dot += rounded[row * config.head_dim_v + i] * forward->o_slc[row * config.head_dim_v + i];
      }
      lse.push_back(static_cast<float>(forward->lse_slc[row]));
      gate.push_back(static_cast<float>(inputs.gate[row * 3 + 1]));
      delta.push_back(static_cast<float>(inputs.gate[row * 3 + 1] * dot));
    }
    auto gradients = reference::Backward(config, inputs, block_indices, rounded);
    EXPECT_TRUE(gradients.ok()) << gradients.status();
    expected = *std::move(gradients);
  }

  StageProblem stage;
  Bytes d_o;
  std::vector<int32_t> block_indices;
  std::vector<float> lse, gate, delta;
  reference::ReferenceGradients expected;
};

struct SelectedLayout {
  int64_t segment_tokens = int64_t{1} << 40;
  bool use_slots = false;
  int64_t queries_a_call = int64_t{1} << 40;
  bool one_kv_head_a_call = false;
  bool adds = false;  // dq to what is there, ones
};

// In global token order.
struct SelectedGradients {
  std::vector<float> dq, dk, dv;
};

SelectedGradients RunSelected(const SelectedProblem& problem, const SelectedLayout& layout,
                              Kernels& kernels) {
  const StageProblem& stage = problem.stage;
  const AttentionDims& dims = stage.dims;
  const int64_t tokens = stage.num_tokens(), hq = dims.num_q_heads, hkv = dims.num_kv_heads;
  const int64_t dk = dims.head_dim_qk, dv = dims.head_dim_v, n = dims.num_selected_blocks;
  const int64_t slc = dims.select_block_tokens, group = dims.group_size();
  const std::vector<Segment> segments = Layout{layout.segment_tokens}.Segments(stage);
  const PlacedRows k(stage, segments, stage.encoded.k_slc, hkv, dk);
  const PlacedRows v(stage, segments, stage.encoded.v_slc, hkv, dv);
  const PlacedRows q(stage, segments, stage.encoded.q, hq, dk);
  const PlacedRows d_o(stage, segments, problem.d_o, hq, dv);

  std::vector<BlockRun> runs;
  int64_t num_blocks = 0;
  for (size_t d = 0; d < stage.documents.size(); ++d) {
    runs.push_back({static_cast<int32_t>(d), 0, stage.documents[d].num_slc_blocks});
    num_blocks += runs.back().num_blocks;
  }
  const int64_t record_bytes = kernels.RecordBytes(dims);
  Bytes records(hkv * num_blocks * record_bytes);
  EXPECT_EQ(kernels.PackBlocks({.dims = dims,
                                .k = k.view,
                                .v = v.view,
                                .documents = stage.documents.data(),
                                .runs = runs.data(),
                                .num_runs = static_cast<int32_t>(runs.size()),
                                .num_blocks = num_blocks,
                                .records = records.data()},
                               nullptr),
            absl::OkStatus());

  // By row.
  std::vector<float> lse(tokens * hq), gate(tokens * hq), delta(tokens * hq);
  std::vector<int32_t> indices(tokens * hkv * n);
  std::vector<int64_t> token_of_row(tokens), document_of_row(tokens);
  for (const Segment& segment : segments) {
    for (int64_t i = 0; i < segment.num_tokens; ++i) {
      document_of_row[segment.row + i] = segment.document;
    }
  }
  ForEachToken(stage, segments, [&](int64_t row, int64_t token, bool) {
    token_of_row[row] = token;
    std::copy_n(&problem.lse[token * hq], hq, &lse[row * hq]);
    std::copy_n(&problem.gate[token * hq], hq, &gate[row * hq]);
    std::copy_n(&problem.delta[token * hq], hq, &delta[row * hq]);
    std::copy_n(&problem.block_indices[token * hkv * n], hkv * n, &indices[row * hkv * n]);
  });

  // Every second block is this rank's; of the others, those that a call's queries picked have
  // slots.
  const auto is_own = [&](int64_t block) { return !layout.use_slots || block % 2 == 0; };
  const int64_t own_blocks = layout.use_slots ? (num_blocks + 1) / 2 : num_blocks;
  const auto ordinal = [&](int64_t block) { return layout.use_slots ? block / 2 : block; };
  const int64_t values = (dk + dv) * slc;
  Bytes own_records(hkv * own_blocks * record_bytes);
  for (int64_t h = 0; h < hkv; ++h) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      if (!is_own(b)) continue;
      std::memcpy(&own_records[(h * own_blocks + ordinal(b)) * record_bytes],
                  &records[(h * num_blocks + b) * record_bytes], record_bytes);
    }
  }
  std::vector<float> own_gradients(hkv * own_blocks * values, kNaN);
  std::vector<float> gradients(hkv * num_blocks * values, 0.0f);  // of all records

  SelectedGradients out{std::vector<float>(tokens * hq * dk, kNaN),
                        std::vector<float>(tokens * hkv * dk, 0.0f),
                        std::vector<float>(tokens * hkv * dv, 0.0f)};
  std::vector<std::byte> scratch(kernels.SelectedBackwardScratchBytes(
                                     dims, {.num_tokens = tokens,
                                            .num_segments = static_cast<int32_t>(segments.size()),
                                            .num_kv_heads = static_cast<int32_t>(hkv),
                                            .num_cmp_blocks = 0,
                                            .num_slc_blocks = num_blocks,
                                            .num_records = hkv * num_blocks,
                                            .num_documents = 1}),
                                 std::byte{0xff});

  const int32_t heads_a_call = layout.one_kv_head_a_call ? 1 : static_cast<int32_t>(hkv);
  for (int32_t head = 0; head < hkv; head += heads_a_call) {
    const HeadRange heads{head, head + heads_a_call};
    const int64_t call_heads = heads.size() * group;
    std::vector<float> dq(tokens * call_heads * dk, layout.adds ? 1.0f : kNaN);
    for (int64_t begin = 0; begin < tokens; begin += layout.queries_a_call) {
      const int64_t end = std::min(begin + layout.queries_a_call, tokens);
      std::vector<int32_t> locations(hkv * num_blocks, -1);
      std::vector<int64_t> slot_records;
      for (int64_t h = heads.begin; h < heads.end; ++h) {
        std::set<int64_t> picked;
        for (int64_t row = begin; row < end; ++row) {
          const int64_t first = stage.documents[document_of_row[row]].slc_block_begin;
          for (int64_t i = 0; i < n; ++i) {
            const int32_t pick = indices[(row * hkv + h) * n + i];
            if (pick >= 0) picked.insert(first + pick);
          }
        }
        for (int64_t b : picked) {
          int32_t& location = locations[h * num_blocks + b];
          if (is_own(b)) {
            location = static_cast<int32_t>(h * own_blocks + ordinal(b));
          } else {
            location = static_cast<int32_t>(hkv * own_blocks + slot_records.size());
            slot_records.push_back(h * num_blocks + b);
          }
        }
      }
      Bytes slots(slot_records.size() * record_bytes + 1);
      for (size_t i = 0; i < slot_records.size(); ++i) {
        std::memcpy(&slots[i * record_bytes], &records[slot_records[i] * record_bytes],
                    record_bytes);
      }
      std::vector<float> slot_gradients(slot_records.size() * values + 1, kNaN);
      EXPECT_EQ(kernels.AttendSelectedBackward(
                    {.dims = dims,
                     .queries = {.q = q.view.own,
                                 .segments = segments.data(),
                                 .num_segments = static_cast<int32_t>(segments.size()),
                                 .documents = stage.documents.data(),
                                 .num_tokens = tokens,
                                 .kv_heads = heads},
                     .query_begin = begin,
                     .query_end = end,
                     .block_indices = indices.data(),
                     .locations = locations.data(),
                     .num_blocks = num_blocks,
                     .num_documents = static_cast<int32_t>(stage.documents.size()),
                     .own_records = own_records.data(),
                     .num_own_records = hkv * own_blocks,
                     .slots = slots.data(),
                     .outputs = {.d_o = d_o.view.own,
                                 .lse = lse.data(),
                                 .gate = gate.data(),
                                 .delta = delta.data()},
                     .queries_gradients = {.dq = dq.data(), .adds = layout.adds},
                     .own_gradients = own_gradients.data(),
                     .adds_to_own = begin > 0,
                     .slot_gradients = slot_gradients.data(),
                     .scratch = scratch.data()},
                    nullptr),
                absl::OkStatus());
      for (size_t i = 0; i < slot_records.size(); ++i) {
        for (int64_t j = 0; j < values; ++j) {
          gradients[slot_records[i] * values + j] += slot_gradients[i * values + j];
        }
      }
    }
    for (int64_t row = 0; row < tokens; ++row) {
      for (int64_t i = 0; i < call_heads * dk; ++i) {
        out.dq[(token_of_row[row] * hq + head * group) * dk + i] =
            dq[row * call_heads * dk + i] - (layout.adds ? 1.0f : 0.0f);
      }
    }
  }
  for (int64_t h = 0; h < hkv; ++h) {
    for (int64_t b = 0; b < num_blocks; ++b) {
      if (!is_own(b)) continue;
      std::copy_n(&own_gradients[(h * own_blocks + ordinal(b)) * values], values,
                  &gradients[(h * num_blocks + b) * values]);
    }
  }
  for (const Document& document : stage.documents) {
    for (int64_t t = 0; t < document.num_tokens; ++t) {
      for (int64_t h = 0; h < hkv; ++h) {
        const float* const record =
            &gradients[(h * num_blocks + document.slc_block_begin + t / slc) * values];
        const int64_t row = (document.token_begin + t) * hkv + h;
        std::copy_n(record + t % slc * dk, dk, &out.dk[row * dk]);
        std::copy_n(record + slc * dk + t % slc * dv, dv, &out.dv[row * dv]);
      }
    }
  }
  return out;
}

void ExpectAgreement(const SelectedProblem& problem, const SelectedLayout& layout,
                     Kernels& kernels) {
  SCOPED_TRACE(test::Describe(problem.stage.config));
  const SelectedGradients out = RunSelected(problem, layout, kernels);
  const int64_t dk = problem.stage.dims.head_dim_qk, dv = problem.stage.dims.head_dim_v;
  const double tolerance = test::DefaultTolerance(problem.stage.dims.dtype);
  EXPECT_TRUE(test::Close("dq", problem.expected.dq, test::ToDoubles(out.dq), dk, tolerance));
  EXPECT_TRUE(test::Close("dk", problem.expected.dk_slc, test::ToDoubles(out.dk), dk, tolerance));
  EXPECT_TRUE(test::Close("dv", problem.expected.dv_slc, test::ToDoubles(out.dv), dv, tolerance));
}

TEST_P(SelectedBackwardTest, GroupSizes) {
  for (int64_t group_size : {1, 3, 16, 24, 64}) {
    ReferenceConfig config = SmallConfig();
    config.num_kv_heads = group_size > 16 ? 1 : 2;
    config.num_q_heads = config.num_kv_heads * group_size;
    ExpectAgreement(SelectedProblem(config, {0, 400}, {.dtype = DType::kBF16}, 2), {}, *kernels_);
  }
}

TEST_P(SelectedBackwardTest, HeadDims) {
  for (auto [dk, dv] :
       {std::pair<int64_t, int64_t>{64, 64}, {128, 128}, {192, 128}, {256, 64}, {64, 256}}) {
    ReferenceConfig config = SmallConfig();
    config.head_dim_qk = dk;
    config.head_dim_v = dv;
    for (DType dtype : {DType::kBF16, DType::kF16}) {
      ExpectAgreement(SelectedProblem(config, {0, 333}, {.dtype = dtype}, 3), {}, *kernels_);
    }
  }
}

TEST_P(SelectedBackwardTest, BlocksDocumentsAndSlots) {
  for (int64_t block_tokens : {16, 48, 64, 128}) {
    ReferenceConfig config = SmallConfig();
    config.compress_stride_tokens = config.compress_block_tokens = 16;
    config.select_block_tokens = block_tokens;
    ExpectAgreement(SelectedProblem(config, {0, 1, 40, 311, 650}, {.dtype = DType::kBF16}, 4),
                    {.segment_tokens = 45, .use_slots = true, .queries_a_call = 200}, *kernels_);
  }
}

// Items of several lists, and of lists that are cut; queries that a tile shares.
TEST_P(SelectedBackwardTest, LongLists) {
  ReferenceConfig config = SmallConfig();
  config.num_q_heads = 32;
  config.num_selected_blocks = 16;
  for (int64_t dim : {64, 128}) {
    config.head_dim_qk = config.head_dim_v = dim;
    ExpectAgreement(SelectedProblem(config, {0, 300, 1201}, {.dtype = DType::kBF16}, 5),
                    {.use_slots = true, .adds = dim == 64}, *kernels_);
  }
}

TEST_P(SelectedBackwardTest, ExtremeLogits) {
  for (double scale : {30.0, 1000.0}) {
    const SelectedProblem problem(SmallConfig(), {0, 300},
                                  {.dtype = DType::kBF16, .logit_scale = scale}, 6);
    const SelectedGradients out = RunSelected(problem, {}, *kernels_);
    for (const auto* values : {&out.dq, &out.dk, &out.dv}) {
      for (float value : *values) ASSERT_TRUE(std::isfinite(value));
    }
  }
}

// One list is cut.
TEST_P(SelectedBackwardTest, Bits) {
  ReferenceConfig config = SmallConfig();
  config.num_q_heads = 32;
  config.head_dim_qk = config.head_dim_v = 128;
  const SelectedProblem problem(config, {0, 40, 311, 1011}, {.dtype = DType::kBF16}, 7);
  const SelectedGradients expected = RunSelected(problem, {}, *kernels_);
  const SelectedGradients again = RunSelected(problem, {}, *kernels_);
  EXPECT_EQ(expected.dq, again.dq);
  EXPECT_EQ(expected.dk, again.dk);
  EXPECT_EQ(expected.dv, again.dv);
  const SelectedLayout layouts[] = {{.segment_tokens = 7},
                                    {.segment_tokens = 100, .use_slots = true},
                                    {.queries_a_call = 97},
                                    {.one_kv_head_a_call = true}};
  for (const SelectedLayout& layout : layouts) {
    EXPECT_EQ(expected.dq, RunSelected(problem, layout, *kernels_).dq) << layout.segment_tokens;
  }
}

}  // namespace
}  // namespace nsa::kernels::cuda
