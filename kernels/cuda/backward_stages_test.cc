// The other stages of the backward on the GPU: against the fp64 reference or plain loops, and
// against themselves under other layouts of the same work.
#include <algorithm>
#include <cstdint>
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
using reference::CompressorKind;
using reference::ReferenceConfig;

using BackwardStagesTest = MirroredTest;

INSTANTIATE_TEST_SUITE_P(Paths, BackwardStagesTest,
                         ::testing::Values(CudaPath::kAuto, CudaPath::kPortable), NameOfPath);

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
    EXPECT_TRUE(test::Close(name, wanted, test::ToDoubles(values), row_size, kTolerance));
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
        return test::Encode(dtype, test::ToDoubles(RandomFloats(count, &random)));
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
      Bytes actual = test::Encode(dtype, test::ToDoubles(RandomFloats(kRows * kStride, &random)));
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
