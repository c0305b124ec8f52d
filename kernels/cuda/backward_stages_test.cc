// The stages of the backward on the GPU: against the fp64 reference or plain loops, and against
// themselves under other layouts of the same work.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/stages_testing.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gpu_testing.h"
#include "kernels/cuda/mirrored_kernels.h"
#include "tests/reference/gradients.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cuda {
namespace {

using cpu::MakeStageProblem;
using cpu::SmallConfig;
using cpu::StageProblem;
using reference::CompressorKind;
using reference::ReferenceConfig;
using test::Bytes;
using test::Random;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

std::vector<double> ToDoubles(const std::vector<float>& values) {
  return {values.begin(), values.end()};
}

std::vector<float> RandomFloats(int64_t count, Random* random) {
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(random->Normal());
  return values;
}

// A dense tensor's bytes, `padding` elements between rows. Rows that are not set are NaN.
struct PaddedRows {
  PaddedRows(int64_t num_rows, int64_t row_bytes, int64_t padding_bytes)
      : stride(row_bytes + padding_bytes), bytes(num_rows * stride, std::byte{0xff}) {}
  std::byte* row(int64_t i) { return bytes.data() + i * stride; }
  int64_t stride;
  Bytes bytes;
};

// The tokens of a problem in segments of at most `segment_tokens`, last segment first in memory;
// every second one in the halo buffer if `use_halo`.
struct Layout {
  int64_t segment_tokens = int64_t{1} << 40;
  bool use_halo = false;

  std::vector<Segment> Segments(const StageProblem& problem) const {
    std::vector<Segment> segments;
    for (size_t d = 0; d < problem.documents.size(); ++d) {
      const Document& document = problem.documents[d];
      for (int64_t begin = 0; begin < document.num_tokens; begin += segment_tokens) {
        const int64_t end = std::min(begin + segment_tokens, document.num_tokens);
        segments.push_back({.row = problem.num_tokens() - document.token_begin - end,
                            .num_tokens = end - begin,
                            .position = begin,
                            .document = static_cast<int32_t>(d),
                            .is_halo = use_halo && segments.size() % 2 == 1});
      }
    }
    return segments;
  }
};

// visit(row, global token, is_halo)
template <class Visit>
void ForEachToken(const StageProblem& problem, const std::vector<Segment>& segments,
                  const Visit& visit) {
  for (const Segment& segment : segments) {
    const int64_t begin = problem.documents[segment.document].token_begin + segment.position;
    for (int64_t i = 0; i < segment.num_tokens; ++i) {
      visit(segment.row + i, begin + i, segment.is_halo != 0);
    }
  }
}

// Own and halo rows of a dense tensor.
struct PlacedRows {
  PlacedRows(const StageProblem& problem, const std::vector<Segment>& all, const Bytes& dense,
             int64_t num_heads, int64_t head_dim)
      : own(problem.num_tokens(), num_heads * head_dim * 2, 16),
        halo(own),
        segments(all),
        view{.own = {own.bytes.data(), num_heads * head_dim + 8, head_dim},
             .halo = {halo.bytes.data(), num_heads * head_dim + 8, head_dim},
             .segments = segments.data(),
             .num_segments = static_cast<int32_t>(segments.size())} {
    const int64_t row_bytes = num_heads * head_dim * 2;
    ForEachToken(problem, segments, [&](int64_t row, int64_t token, bool is_halo) {
      std::memcpy((is_halo ? halo : own).row(row), dense.data() + token * row_bytes, row_bytes);
    });
  }
  PlacedRows(const PlacedRows&) = delete;

  PaddedRows own, halo;
  std::vector<Segment> segments;
  TokenRows view;
};

class BackwardStagesTest : public ::testing::TestWithParam<CudaPath> {
 protected:
  void SetUp() override {
    NSA_SKIP_WITHOUT_GPU();
    auto kernels = CudaKernels::Create({.path = GetParam()});
    ASSERT_TRUE(kernels.ok()) << kernels.status();
    kernels_ = std::make_unique<MirroredKernels>(*std::move(kernels));
  }

  std::unique_ptr<Kernels> kernels_;
};

INSTANTIATE_TEST_SUITE_P(Paths, BackwardStagesTest,
                         ::testing::Values(CudaPath::kAuto, CudaPath::kPortable), NameOfPath);

// --- AttendSelectedBackward ----------------------------------------------------------------------

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
  EXPECT_TRUE(test::Close("dq", problem.expected.dq, ToDoubles(out.dq), dk, tolerance));
  EXPECT_TRUE(test::Close("dk", problem.expected.dk_slc, ToDoubles(out.dk), dk, tolerance));
  EXPECT_TRUE(test::Close("dv", problem.expected.dv_slc, ToDoubles(out.dv), dv, tolerance));
}

TEST_P(BackwardStagesTest, SelectedGroupSizes) {
  for (int64_t group_size : {1, 3, 16, 24, 64}) {
    ReferenceConfig config = SmallConfig();
    config.num_kv_heads = group_size > 16 ? 1 : 2;
    config.num_q_heads = config.num_kv_heads * group_size;
    ExpectAgreement(SelectedProblem(config, {0, 400}, {.dtype = DType::kBF16}, 2), {}, *kernels_);
  }
}

TEST_P(BackwardStagesTest, SelectedHeadDims) {
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

TEST_P(BackwardStagesTest, SelectedBlocksDocumentsAndSlots) {
  for (int64_t block_tokens : {16, 48, 64, 128}) {
    ReferenceConfig config = SmallConfig();
    config.compress_stride_tokens = config.compress_block_tokens = 16;
    config.select_block_tokens = block_tokens;
    ExpectAgreement(SelectedProblem(config, {0, 1, 40, 311, 650}, {.dtype = DType::kBF16}, 4),
                    {.segment_tokens = 45, .use_slots = true, .queries_a_call = 200}, *kernels_);
  }
}

// Items of several lists, and of lists that are cut; queries that a tile shares.
TEST_P(BackwardStagesTest, SelectedLongLists) {
  ReferenceConfig config = SmallConfig();
  config.num_q_heads = 32;
  config.num_selected_blocks = 16;
  for (int64_t dim : {64, 128}) {
    config.head_dim_qk = config.head_dim_v = dim;
    ExpectAgreement(SelectedProblem(config, {0, 300, 1201}, {.dtype = DType::kBF16}, 5),
                    {.use_slots = true, .adds = dim == 64}, *kernels_);
  }
}

TEST_P(BackwardStagesTest, SelectedExtremeLogits) {
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
TEST_P(BackwardStagesTest, SelectedBits) {
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

// --- CompressBackward ----------------------------------------------------------------------------

void ExpectCompressAgreement(const ReferenceConfig& config, const test::InputOptions& options,
                             const std::vector<int64_t>& cu_seqlens, const Layout& layout,
                             bool adds, Kernels& kernels) {
  SCOPED_TRACE(test::Describe(config));
  const StageProblem problem = MakeStageProblem(config, cu_seqlens, options, 9);
  const AttentionDims& dims = problem.dims;
  const int64_t hkv = dims.num_kv_heads, dim = dims.head_dim_qk, tokens = problem.num_tokens();
  const int64_t l = dims.compress_block_tokens;
  const std::vector<Segment> segments = layout.Segments(problem);
  const PlacedRows k(problem, segments, problem.encoded.k_cmp, hkv, dim);

  // Of each document but the second, two runs that leave out every fifth block.
  std::vector<BlockRun> runs;
  int64_t num_summaries = 0, num_blocks = 0;
  std::vector<bool> included;
  for (size_t d = 0; d < problem.documents.size(); ++d) {
    const int64_t count = problem.documents[d].num_cmp_blocks;
    num_summaries += count;
    included.resize(num_summaries, false);
    for (int64_t first = 0; first < count && d != 1; first += 5) {
      const int64_t length = std::min<int64_t>(4, count - first);
      runs.push_back({static_cast<int32_t>(d), first, length});
      num_blocks += length;
      for (int64_t i = 0; i < length; ++i) {
        included[problem.documents[d].cmp_block_begin + first + i] = true;
      }
    }
  }
  Random random(10);
  const int64_t stride = hkv * dim + 64;
  std::vector<float> d_summaries = RandomFloats(num_summaries * stride + 1, &random);
  std::vector<double> dy(num_summaries * hkv * dim, 0.0);
  for (int64_t row = 0; row < num_summaries; ++row) {
    for (int64_t i = 0; i < hkv * dim && included[row]; ++i) {
      dy[row * hkv * dim + i] = d_summaries[row * stride + i];
    }
  }
  std::vector<double> dx;
  const reference::CompressorParameters& parameters = problem.inputs.compress_k;
  const auto expected = reference::CompressBackward(config, parameters, cu_seqlens,
                                                    problem.inputs.k_cmp, dim, dy, &dx);

  std::vector<float> own(tokens * hkv * dim, adds ? 1.0f : kNaN), halo = own;
  const auto poisoned = [](const std::vector<double>& like) {
    return std::vector<float>(like.size(), kNaN);
  };
  const CompressorWeights weights = problem.encoded.compress_k.view();
  auto weight = poisoned(expected.weight), pe = poisoned(expected.pe), w = poisoned(expected.w);
  auto w1 = poisoned(expected.w1), b1 = poisoned(expected.b1);
  auto w2 = poisoned(expected.w2), b2 = poisoned(expected.b2);
  const auto where = [](const void* is_set, std::vector<float>& values) {
    return is_set == nullptr ? nullptr : values.data();
  };
  const Compressor compressor = test::MakeCompressor(config.compressor);
  Bytes scratch(
      kernels.CompressBackwardScratchBytes(dims, compressor, weights.hidden_width, num_blocks) + 1,
      std::byte{0xff});
  ASSERT_EQ(kernels.CompressBackward(
                {.dims = dims,
                 .head_dim = static_cast<int32_t>(dim),
                 .compressor = compressor,
                 .weights = weights,
                 .tokens = k.view,
                 .documents = problem.documents.data(),
                 .runs = runs.data(),
                 .num_runs = static_cast<int32_t>(runs.size()),
                 .num_blocks = num_blocks,
                 .d_summaries = d_summaries.data(),
                 .d_summaries_stride = stride,
                 .d_tokens = {own.data(), halo.data(), adds},
                 .d_weights = {where(weights.weight, weight), where(weights.pe, pe),
                               where(weights.w, w), where(weights.w1, w1), where(weights.b1, b1),
                               where(weights.w2, w2), where(weights.b2, b2)},
                 .scratch = scratch.data()},
                nullptr),
            absl::OkStatus());
  std::vector<double> actual(dx.size());
  ForEachToken(problem, segments, [&](int64_t row, int64_t token, bool is_halo) {
    for (int64_t i = 0; i < hkv * dim; ++i) {
      actual[token * hkv * dim + i] =
          (is_halo ? halo : own)[row * hkv * dim + i] - (adds ? 1.0 : 0.0);
    }
  });
  constexpr double kTolerance = 2e-3;  // tf32 has 10 bits
  const auto expect = [&](const char* name, const void* is_set, const std::vector<double>& wanted,
                          const std::vector<float>& values, int64_t row_size) {
    if (is_set == nullptr) return;
    EXPECT_TRUE(test::Close(name, wanted, ToDoubles(values), row_size, kTolerance));
  };
  EXPECT_TRUE(test::Close("dx", dx, actual, dim, kTolerance));
  expect("weight", weights.weight, expected.weight, weight, l);
  expect("pe", weights.pe, expected.pe, pe, dim);
  expect("w", weights.w, expected.w, w, l * dim);
  expect("w1", weights.w1, expected.w1, w1, l * dim);
  expect("b1", weights.b1, expected.b1, b1, std::max<int64_t>(weights.hidden_width, 1));
  expect("w2", weights.w2, expected.w2, w2, std::max<int64_t>(weights.hidden_width, 1));
  expect("b2", weights.b2, expected.b2, b2, dim);
}

TEST_P(BackwardStagesTest, Compressors) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kWeighted,
                              CompressorKind::kLinear, CompressorKind::kMlp}) {
    for (bool per_head : {false, true}) {
      ReferenceConfig config = SmallConfig();
      config.compressor = kind;
      config.head_dim_qk = per_head ? 64 : 192;
      config.compress_block_tokens = per_head ? 32 : 48;
      config.select_block_tokens = 48;
      const test::InputOptions options{.dtype = DType::kBF16,
                                       .parameter_dtype = per_head ? DType::kF32 : DType::kBF16,
                                       .parameters_per_head = per_head,
                                       .with_pe = true,
                                       .hidden_width = per_head ? 32 : 37};
      ExpectCompressAgreement(config, options, {0, 40, 311, 312, 900},
                              {.segment_tokens = 45, .use_halo = per_head}, per_head, *kernels_);
      ExpectCompressAgreement(config, options, {0, 20}, {}, false, *kernels_);  // no block
    }
  }
}

// --- The small ones, against plain loops ---------------------------------------------------------

TEST_P(BackwardStagesTest, Gates) {
  for (int64_t head_dim : {64, 128, 192, 256}) {
    for (DType gate_dtype : {DType::kF32, DType::kBF16}) {
      AttentionDims dims{};
      dims.dtype = DType::kBF16;
      dims.num_q_heads = 6;
      dims.head_dim_v = static_cast<int32_t>(head_dim);
      const int64_t tokens = 77, heads = dims.num_q_heads, rows = tokens * heads;
      const int64_t row_stride = heads * head_dim + 8;
      Random random(11);
      const auto make = [&](DType dtype, int64_t count) {
        return test::Encode(dtype, ToDoubles(RandomFloats(count, &random)));
      };
      Bytes tensors[4];
      std::vector<double> values[4];
      for (int i = 0; i < 4; ++i) {
        tensors[i] = make(dims.dtype, tokens * row_stride);
        values[i] = test::Decode(dims.dtype, tensors[i]);
      }
      const Bytes gate = make(gate_dtype, rows * 4);
      const std::vector<double> gate_values = test::Decode(gate_dtype, gate);
      std::vector<float> d_gate(rows * 3, kNaN), gates = d_gate, deltas = d_gate;
      const auto view = [&](int i) {
        return ConstTensor3{tensors[i].data(), row_stride, head_dim};
      };
      ASSERT_EQ(kernels_->GateBackward({.dims = dims,
                                        .num_tokens = tokens,
                                        .gate = gate.data(),
                                        .gate_dtype = gate_dtype,
                                        .row_stride = heads * 4,
                                        .head_stride = 4,
                                        .d_o = view(0),
                                        .o_cmp = view(1),
                                        .o_slc = view(2),
                                        .o_win = view(3),
                                        .d_gate = d_gate.data(),
                                        .gates = gates.data(),
                                        .deltas = deltas.data()},
                                       nullptr),
                absl::OkStatus());
      for (int64_t row = 0; row < rows; ++row) {
        for (int b = 0; b < 3; ++b) {
          double dot = 0.0;
          for (int64_t i = 0; i < head_dim; ++i) {
            const int64_t at = row / heads * row_stride + row % heads * head_dim + i;
            dot += values[0][at] * values[b + 1][at];
          }
          const double g = gate_values[row * 4 + b];
          ASSERT_NEAR(d_gate[row * 3 + b], dot, 1e-4);
          ASSERT_EQ(gates[b * rows + row], static_cast<float>(g));
          ASSERT_NEAR(deltas[b * rows + row], g * dot, 4e-4);
        }
      }
    }
  }
}

TEST_P(BackwardStagesTest, RecordsToTokens) {
  ReferenceConfig config = SmallConfig();
  config.head_dim_v = 128;
  const StageProblem problem =
      MakeStageProblem(config, {0, 40, 311, 650}, {.dtype = DType::kBF16}, 12);
  const AttentionDims& dims = problem.dims;
  const int64_t hkv = dims.num_kv_heads, dk = 64, dv = 128, slc = dims.select_block_tokens;
  const std::vector<Segment> segments =
      Layout{.segment_tokens = 50, .use_halo = true}.Segments(problem);
  const std::vector<BlockRun> runs = {{1, 0, 2}, {1, 4, 1}, {2, 1, 5}};
  const int64_t num_blocks = 8, values = (dk + dv) * slc, tokens = problem.num_tokens();
  Random random(13);
  const std::vector<float> records = RandomFloats(hkv * num_blocks * values, &random);
  std::vector<float> k_own = RandomFloats(tokens * hkv * dk, &random), k_halo = k_own;
  std::vector<float> v_own = RandomFloats(tokens * hkv * dv, &random), v_halo = v_own;
  auto k_own_expected = k_own, k_halo_expected = k_halo;
  auto v_own_expected = v_own, v_halo_expected = v_halo;
  for (const Segment& segment : segments) {
    for (int64_t i = 0; i < segment.num_tokens; ++i) {
      const int64_t position = segment.position + i;
      int64_t index = 0;
      for (const BlockRun& run : runs) {
        const int64_t block = position / slc - run.first_block;
        if (run.document == segment.document && block >= 0 && block < run.num_blocks) {
          for (int64_t h = 0; h < hkv; ++h) {
            const float* const record = &records[(h * num_blocks + index + block) * values];
            const int64_t row = (segment.row + i) * hkv + h;
            for (int64_t c = 0; c < dk; ++c) {
              (segment.is_halo ? k_halo_expected : k_own_expected)[row * dk + c] +=
                  record[position % slc * dk + c];
            }
            for (int64_t c = 0; c < dv; ++c) {
              (segment.is_halo ? v_halo_expected : v_own_expected)[row * dv + c] +=
                  record[slc * dk + position % slc * dv + c];
            }
          }
        }
        index += run.num_blocks;
      }
    }
  }
  ASSERT_EQ(kernels_->UnpackGradients({.dims = dims,
                                       .record_gradients = records.data(),
                                       .segments = segments.data(),
                                       .num_segments = static_cast<int32_t>(segments.size()),
                                       .documents = problem.documents.data(),
                                       .runs = runs.data(),
                                       .num_runs = static_cast<int32_t>(runs.size()),
                                       .num_blocks = num_blocks,
                                       .dk = {k_own.data(), k_halo.data(), true},
                                       .dv = {v_own.data(), v_halo.data(), true}},
                                      nullptr),
            absl::OkStatus());
  EXPECT_EQ(k_own, k_own_expected);
  EXPECT_EQ(k_halo, k_halo_expected);
  EXPECT_EQ(v_own, v_own_expected);
  EXPECT_EQ(v_halo, v_halo_expected);
}

TEST_P(BackwardStagesTest, RowsThatAreAdded) {
  constexpr int64_t kRows = 300, kElements = 1028;
  Random random(14);
  const std::vector<float> src = RandomFloats(kRows * kElements, &random);
  const std::vector<float> before = RandomFloats(2 * kRows * kElements, &random);

  std::vector<int32_t> rows(kRows);
  for (int64_t i = 0; i < kRows; ++i) rows[i] = static_cast<int32_t>((i * 7 + 3) % kRows * 2);
  const int32_t count = kRows - 9;
  auto expected = before, actual = before;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t e = 0; e < kElements; ++e) {
      expected[rows[i] * kElements + e] += src[i * kElements + e];
    }
  }
  ASSERT_EQ(kernels_->AddIndexedRows({.dst = actual.data(),
                                      .src = src.data(),
                                      .rows = rows.data(),
                                      .count = &count,
                                      .max_count = kRows,
                                      .row_elements = kElements},
                                     nullptr),
            absl::OkStatus());
  EXPECT_EQ(actual, expected);

  const std::vector<Segment> segments = {{400, 120, 0, 0, 0}, {3, 0, 0, 0, 0}, {5, 180, 0, 0, 0}};
  expected = actual = before;
  int64_t i = 0;
  for (const Segment& segment : segments) {
    for (int64_t row = segment.row; row < segment.row + segment.num_tokens; ++row, ++i) {
      for (int64_t e = 0; e < kElements; ++e) {
        expected[row * kElements + e] += src[i * kElements + e];
      }
    }
  }
  ASSERT_EQ(kernels_->AddRows({.dst = actual.data(),
                               .src = src.data(),
                               .segments = segments.data(),
                               .num_segments = static_cast<int32_t>(segments.size()),
                               .row_elements = kElements},
                              nullptr),
            absl::OkStatus());
  EXPECT_EQ(actual, expected);
}

TEST_P(BackwardStagesTest, GradientsOfTheCallersType) {
  constexpr int64_t kRows = 33, kHeads = 3, kDim = 64, kStride = kHeads * kDim + 8;
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (bool adds : {false, true}) {
      Random random(15);
      const std::vector<float> src = RandomFloats(kRows * kHeads * kDim, &random);
      Bytes actual = test::Encode(dtype, ToDoubles(RandomFloats(kRows * kStride, &random)));
      std::vector<double> expected = test::Decode(dtype, actual);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t i = 0; i < kHeads * kDim; ++i) {
          double& to = expected[row * kStride + i];
          to = src[row * kHeads * kDim + i] + (adds ? static_cast<float>(to) : 0.0f);
        }
      }
      ASSERT_EQ(kernels_->StoreGradient({.src = src.data(),
                                         .num_rows = kRows,
                                         .num_heads = kHeads,
                                         .head_dim = kDim,
                                         .dst = {actual.data(), kStride, kDim},
                                         .dst_dtype = dtype,
                                         .adds = adds},
                                        nullptr),
                absl::OkStatus());
      EXPECT_EQ(actual, test::Encode(dtype, expected));
    }
  }
  std::vector<float> values(1000, kNaN);
  ASSERT_EQ(kernels_->Zero(values.data(), 999 * sizeof(float), nullptr), absl::OkStatus());
  EXPECT_EQ(std::count(values.begin(), values.end(), 0.0f), 999);
}

TEST_P(BackwardStagesTest, PlanReturn) {
  constexpr int32_t kHeads = 3, kRanks = 3, kPeer = 2, kThis = 1;
  constexpr int64_t kBlocks = 3000, kBytes = 64;
  Random random(16);
  std::vector<int32_t> rank(kBlocks), ordinal(kBlocks), locations(kHeads * kBlocks, -1);
  std::vector<int64_t> blocks_of_rank(kRanks, 0);
  for (int64_t b = 0; b < kBlocks; ++b) {
    rank[b] = static_cast<int32_t>(random.Int(0, kRanks - 1));
    ordinal[b] = static_cast<int32_t>(blocks_of_rank[rank[b]]++);
  }
  const int64_t peer_own = kHeads * blocks_of_rank[kPeer];
  int32_t slot = 0;
  std::vector<int64_t> offsets;
  std::vector<int32_t> own_records;
  constexpr HeadRange kRange{1, 3};
  for (int64_t i = 0; i < kHeads * kBlocks; ++i) {
    const int64_t head = i / kBlocks, block = i % kBlocks;
    if (random.OneIn(3)) continue;
    if (rank[block] == kPeer) {
      locations[i] = static_cast<int32_t>(head * blocks_of_rank[kPeer] + ordinal[block]);
      continue;
    }
    locations[i] = static_cast<int32_t>(peer_own + slot++);
    if (rank[block] != kThis || head < kRange.begin) continue;
    offsets.push_back((slot - 1) * kBytes);
    own_records.push_back(static_cast<int32_t>(head * blocks_of_rank[kThis] + ordinal[block]));
  }
  AttentionDims dims{};
  dims.num_kv_heads = kHeads;
  const int64_t capacity = kRange.size() * blocks_of_rank[kThis];
  std::vector<int32_t> peers(capacity, -9), actual_records(capacity, -9);
  std::vector<int64_t> actual_offsets(capacity, -9);
  int32_t count = -9;
  ASSERT_EQ(kernels_->PlanReturn({.dims = dims,
                                  .kv_heads = kRange,
                                  .peer_locations = locations.data(),
                                  .peer_own_records = peer_own,
                                  .peer = kPeer,
                                  .owners = {.rank = rank.data(),
                                             .ordinal = ordinal.data(),
                                             .blocks_of_rank = blocks_of_rank.data(),
                                             .num_blocks = kBlocks,
                                             .num_ranks = kRanks,
                                             .this_rank = kThis},
                                  .record_gradient_bytes = kBytes,
                                  .capacity = capacity,
                                  .peers = peers.data(),
                                  .offsets = actual_offsets.data(),
                                  .own_records = actual_records.data(),
                                  .count = &count},
                                 nullptr),
            absl::OkStatus());
  ASSERT_EQ(count, static_cast<int32_t>(offsets.size()));
  peers.resize(count), actual_offsets.resize(count), actual_records.resize(count);
  EXPECT_EQ(actual_offsets, offsets);
  EXPECT_EQ(actual_records, own_records);
  EXPECT_EQ(peers, std::vector<int32_t>(count, kPeer));
}

}  // namespace
}  // namespace nsa::kernels::cuda
