#include "tests/reference/reference.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace nsa::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<double> Uniform(std::mt19937_64* random, int64_t count) {
  std::vector<double> values(count);
  for (double& x : values) {
    x = static_cast<double>((*random)() >> 11) * std::ldexp(1.0, -52) - 1.0;
  }
  return values;
}

ReferenceInputs Random(const ReferenceConfig& config, const std::vector<int64_t>& cu_seqlens,
                       uint64_t seed = 1) {
  std::mt19937_64 random(seed);
  const int64_t s = cu_seqlens.back();
  ReferenceInputs inputs;
  inputs.cu_seqlens = cu_seqlens;
  inputs.q = Uniform(&random, s * config.num_q_heads * config.head_dim_qk);
  for (double& x : inputs.q) x *= 4.0;
  for (auto* k : {&inputs.k_cmp, &inputs.k_slc, &inputs.k_win}) {
    *k = Uniform(&random, s * config.num_kv_heads * config.head_dim_qk);
  }
  for (auto* v : {&inputs.v_cmp, &inputs.v_slc, &inputs.v_win}) {
    *v = Uniform(&random, s * config.num_kv_heads * config.head_dim_v);
  }
  inputs.gate = Uniform(&random, s * config.num_q_heads * 3);
  return inputs;
}

// One head, one dimension: logits are q * k, outputs weighted means of v.
ReferenceConfig Tiny() {
  ReferenceConfig config;
  config.compress_block_tokens = 2;
  config.compress_stride_tokens = 1;
  config.select_block_tokens = 2;
  config.num_selected_blocks = 2;
  config.num_initial_blocks = 0;
  config.num_local_blocks = 1;
  config.window_tokens = 2;
  return config;
}

ReferenceConfig Small() {
  ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = 6;
  config.head_dim_v = 10;
  config.compress_block_tokens = 8;
  config.compress_stride_tokens = 4;
  config.select_block_tokens = 16;
  config.num_selected_blocks = 4;
  config.window_tokens = 11;
  return config;
}

ReferenceOutputs MustForward(const ReferenceConfig& config, const ReferenceInputs& inputs,
                             const ReferenceOptions& options = {}) {
  auto outputs = Forward(config, inputs, options);
  EXPECT_TRUE(outputs.ok()) << outputs.status();
  return outputs.ok() ? *std::move(outputs) : ReferenceOutputs{};
}

void ExpectNear(const std::vector<double>& a, const std::vector<double>& b, const char* name) {
  ASSERT_EQ(a.size(), b.size()) << name;
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;  // infinities
    ASSERT_NEAR(a[i], b[i], 1e-12) << name << "[" << i << "]";
  }
}

// Dense causal attention with a plain exponential sum, written apart from the code under test:
// token t sees (t - reach, t].
void Dense(const ReferenceConfig& config, const ReferenceInputs& inputs,
           const std::vector<double>& k, const std::vector<double>& v, int64_t reach,
           std::vector<double>* o, std::vector<double>* lse) {
  const int64_t s = inputs.cu_seqlens.back();
  const int64_t hq = config.num_q_heads, hkv = config.num_kv_heads;
  const int64_t dk = config.head_dim_qk, dv = config.head_dim_v;
  o->assign(s * hq * dv, 0.0);
  lse->assign(s * hq, 0.0);
  for (int64_t t = 0; t < s; ++t) {
    for (int64_t h = 0; h < hq; ++h) {
      const int64_t g = h / (hq / hkv);
      double sum = 0.0;
      for (int64_t u = 0; u <= t; ++u) {
        if (u <= t - reach) continue;
        double logit = 0.0;
        for (int64_t c = 0; c < dk; ++c) {
          logit += inputs.q[(t * hq + h) * dk + c] * k[(u * hkv + g) * dk + c];
        }
        const double e = std::exp(logit / std::sqrt(static_cast<double>(dk)));
        sum += e;
        for (int64_t c = 0; c < dv; ++c) {
          (*o)[(t * hq + h) * dv + c] += e * v[(u * hkv + g) * dv + c];
        }
      }
      for (int64_t c = 0; c < dv; ++c) (*o)[(t * hq + h) * dv + c] /= sum;
      (*lse)[t * hq + h] = std::log(sum);
    }
  }
}

TEST(ReferenceTest, HandComputedThreeBranches) {
  // k = ln of small integers and q = 1, so probabilities are ratios of integers.
  const ReferenceConfig config = Tiny();
  ReferenceInputs inputs;
  inputs.cu_seqlens = {0, 5};
  inputs.q.assign(5, 1.0);
  // Sums of two neighbours' logs, halved: summaries exp to sqrt of products 1*4, 4*9, 9*1, 1*1.
  inputs.k_cmp = {std::log(1), std::log(4), std::log(9), std::log(1), std::log(1)};
  inputs.v_cmp = {0, 2, 4, 8, 0};  // means 1, 3, 6, 4
  inputs.k_slc = {std::log(1), std::log(2), std::log(3), std::log(4), std::log(5)};
  inputs.v_slc = {10, 20, 30, 40, 50};
  inputs.k_win = {std::log(5), std::log(1), std::log(1), std::log(1), std::log(3)};
  inputs.v_win = {1, 2, 3, 4, 8};
  inputs.gate = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 5};
  const ReferenceOutputs out = MustForward(config, inputs);
  // Token 0 sees no summary; token 4 sees weights 2, 6, 3, 1 (sum 12).
  EXPECT_EQ(out.lse_cmp[0], -kInfinity);
  EXPECT_EQ(out.o_cmp[0], 0.0);
  EXPECT_NEAR(out.lse_cmp[1], std::log(2), 1e-14);
  EXPECT_NEAR(out.o_cmp[1], 1.0, 1e-14);
  EXPECT_NEAR(out.lse_cmp[4], std::log(12), 1e-14);
  EXPECT_NEAR(out.o_cmp[4], (2 * 1 + 6 * 3 + 3 * 6 + 1 * 4) / 12.0, 1e-14);
  // l/d = l'/d = 2: block j takes p[2j-1] + 2 p[2j] + p[2j+1].
  EXPECT_EQ(out.max_blocks, 3);
  EXPECT_NEAR(out.scores[4 * 3 + 0], (2 * 2 + 6) / 12.0, 1e-14);
  EXPECT_NEAR(out.scores[4 * 3 + 1], (6 + 2 * 3 + 1) / 12.0, 1e-14);
  EXPECT_NEAR(out.scores[4 * 3 + 2], 1 / 12.0, 1e-14);
  EXPECT_EQ(out.block_indices[4 * 2 + 0], 1);
  EXPECT_EQ(out.block_indices[4 * 2 + 1], 2);
  EXPECT_NEAR(out.threshold[4], 13 / 12.0, 1e-14);
  EXPECT_NEAR(out.margin[4], 3 / 12.0, 1e-14);
  // Tokens 2, 3, 4 with weights 3, 4, 5.
  EXPECT_NEAR(out.lse_slc[4], std::log(12), 1e-14);
  EXPECT_NEAR(out.o_slc[4], (3 * 30 + 4 * 40 + 5 * 50) / 12.0, 1e-13);
  // Exactly two tokens, the own one counted in, with weights 1, 3.
  EXPECT_NEAR(out.lse_win[4], std::log(4), 1e-14);
  EXPECT_NEAR(out.o_win[4], (1 * 4 + 3 * 8) / 4.0, 1e-14);
  EXPECT_NEAR(out.o[4], 2 * 3.5 + 3 * (500 / 12.0) + 5 * 7.0, 1e-12);
  // The first token: its own value alone.
  EXPECT_EQ(out.block_indices[0], 0);
  EXPECT_EQ(out.block_indices[1], -1);
  EXPECT_EQ(out.margin[0], kInfinity);
  EXPECT_NEAR(out.o[0], 0 + 10 + 1, 1e-14);
}

TEST(ReferenceTest, CompressorsByHand) {
  ReferenceConfig config = Tiny();
  const std::vector<int64_t> cu_seqlens = {0, 3};
  const std::vector<double> x = {1, 2, 3, 4, 5, 6};  // [3,1,2]
  CompressorParameters parameters;
  parameters.pe = {10, 20, 30, 40};  // [1,2,2]; the mean does not use it
  EXPECT_EQ(Compress(config, parameters, cu_seqlens, x, 2), (std::vector<double>{2, 3, 4, 5}));

  config.compressor = CompressorKind::kWeighted;
  parameters.weight = {2, -1};
  // 2 * (1+10, 2+20) - (3+30, 4+40), and one token on.
  EXPECT_EQ(Compress(config, parameters, cu_seqlens, x, 2), (std::vector<double>{-11, 0, -9, 2}));

  config.compressor = CompressorKind::kLinear;
  parameters.pe.clear();
  parameters.w = {1, 0, 0, 0,    // first token's first value
                  0, 0, 1, 10};  // second token's, token-major
  EXPECT_EQ(Compress(config, parameters, cu_seqlens, x, 2), (std::vector<double>{1, 43, 3, 65}));

  config.compressor = CompressorKind::kMlp;
  parameters.hidden_width = 1;
  parameters.w1 = {1, 0, 0, 0};
  parameters.b1 = {0.5};
  parameters.w2 = {1, 2};
  parameters.b2 = {0, 100};
  const auto y = Compress(config, parameters, cu_seqlens, x, 2);
  // The exact gelu at 1.5 and 3.5: x * Phi(x).
  const double gelu0 = 1.5 * 0.9331927987311419, gelu1 = 3.5 * 0.9997673709209645;
  EXPECT_NEAR(y[0], gelu0, 1e-12);
  EXPECT_NEAR(y[1], 2 * gelu0 + 100, 1e-12);
  EXPECT_NEAR(y[2], gelu1, 1e-12);
  EXPECT_NEAR(y[3], 2 * gelu1 + 100, 1e-12);
}

TEST(ReferenceTest, EachHeadHasItsOwnParameters) {
  ReferenceConfig config = Tiny();
  config.num_q_heads = config.num_kv_heads = 2;
  config.compressor = CompressorKind::kWeighted;
  CompressorParameters parameters;
  parameters.num_heads = 2;
  parameters.weight = {1, 0, 0, 1};
  parameters.pe = {0, 0, 0, 1000};
  // [2,2,1]: head 0 takes its first token, head 1 its second.
  EXPECT_EQ(Compress(config, parameters, {0, 2}, {1, 2, 3, 4}, 1), (std::vector<double>{1, 1004}));
}

TEST(ReferenceTest, ScoreWeightsOf32_16_64) {
  // A query with one overwhelming summary i has p = 1 there, so scores show the weight of i.
  ReferenceConfig config;
  const int64_t s = 256, num_blocks = 15;
  ASSERT_EQ(NumCompressBlocks(config, s), num_blocks);
  ReferenceInputs inputs = Random(config, {0, s});
  const std::vector<double> expected = {2, 2, 2, 1, 0, 0};   // p[0..3] and beyond, in block 0
  const std::vector<double> around = {0, 1, 2, 2, 2, 1, 0};  // p[4j-2 .. 4j+4] in block j > 0
  const std::vector<double> vc(num_blocks, 0.0);
  const std::vector<int64_t> last = {s - 1};
  for (int64_t i = 0; i < num_blocks; ++i) {
    inputs.q[s - 1] = 1000.0;
    std::vector<double> kc(num_blocks, 0.0);
    kc[i] = 1.0;
    const ReferenceOutputs out =
        MustForward(config, inputs, {.given_kc = &kc, .given_vc = &vc, .query_tokens = &last});
    for (int64_t j = 0; j < 4; ++j) {
      double weight = 0.0;
      if (j == 0) {
        weight = i < 6 ? expected[i] : 0.0;
      } else if (i >= 4 * j - 2 && i <= 4 * j + 4) {
        weight = around[i - (4 * j - 2)];
      }
      EXPECT_NEAR(out.scores[(s - 1) * 4 + j], weight, 1e-12) << "block " << j << ", p " << i;
    }
  }
}

TEST(ReferenceTest, ScoreIsTheProbabilityWhenBlocksCoincide) {
  ReferenceConfig config = Tiny();
  config.compress_stride_tokens = 2;
  config.num_q_heads = 3;
  const ReferenceInputs inputs = Random(config, {0, 9});
  const ReferenceOutputs out = MustForward(config, inputs);
  const int64_t t = 8;
  for (int64_t j = 0; j < 4; ++j) {
    double expected = 0.0;
    for (int64_t h = 0; h < 3; ++h) {
      expected += std::exp(inputs.q[t * 3 + h] * out.kc[j] - out.lse_cmp[t * 3 + h]);
    }
    EXPECT_NEAR(out.scores[t * out.max_blocks + j], expected, 1e-12);
  }
  // The query's own block is not yet whole.
  EXPECT_EQ(out.scores[t * out.max_blocks + 4], 0.0);
}

TEST(ReferenceTest, ForcedBlocksAndTies) {
  // All summaries equal: equal scores but for the edges, so the lower indices win.
  ReferenceConfig config = Tiny();
  config.compress_block_tokens = config.compress_stride_tokens = 2;
  config.num_selected_blocks = 6;
  config.num_initial_blocks = 1;
  config.num_local_blocks = 2;
  ReferenceInputs inputs = Random(config, {0, 24});
  inputs.q.assign(24, 0.0);
  const ReferenceOutputs out = MustForward(config, inputs);
  const auto indices = [&](int64_t t) {
    return std::vector<int32_t>(out.block_indices.begin() + t * 6,
                                out.block_indices.begin() + (t + 1) * 6);
  };
  EXPECT_EQ(indices(23), (std::vector<int32_t>{0, 1, 2, 3, 10, 11}));
  EXPECT_EQ(indices(22), (std::vector<int32_t>{0, 1, 2, 3, 10, 11}));
  EXPECT_EQ(indices(21), (std::vector<int32_t>{0, 1, 2, 3, 9, 10}));
  EXPECT_EQ(indices(11), (std::vector<int32_t>{0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(indices(3), (std::vector<int32_t>{0, 1, -1, -1, -1, -1}));
  EXPECT_NEAR(out.margin[23], 0.0, 1e-15);
  EXPECT_EQ(out.margin[11], kInfinity);
}

TEST(ReferenceTest, AllBlocksSelectedIsDense) {
  ReferenceConfig config = Small();
  const ReferenceInputs inputs = Random(config, {0, 75});
  config.num_selected_blocks = 5;
  config.window_tokens = 75;
  const ReferenceOutputs out = MustForward(config, inputs);
  std::vector<double> o, lse;
  Dense(config, inputs, inputs.k_slc, inputs.v_slc, 75, &o, &lse);
  ExpectNear(out.o_slc, o, "o_slc");
  ExpectNear(out.lse_slc, lse, "lse_slc");
  Dense(config, inputs, inputs.k_win, inputs.v_win, 75, &o, &lse);
  ExpectNear(out.o_win, o, "o_win");
  ExpectNear(out.lse_win, lse, "lse_win");
}

TEST(ReferenceTest, WindowHoldsExactlyItsTokens) {
  const ReferenceConfig config = Small();
  const ReferenceInputs inputs = Random(config, {0, 50});
  const ReferenceOutputs out = MustForward(config, inputs);
  std::vector<double> o, lse;
  Dense(config, inputs, inputs.k_win, inputs.v_win, config.window_tokens, &o, &lse);
  ExpectNear(out.o_win, o, "o_win");
  ExpectNear(out.lse_win, lse, "lse_win");
}

// What rows [begin, end) hold, `width` values each.
std::vector<double> Rows(const std::vector<double>& x, int64_t begin, int64_t end, int64_t width) {
  return {x.begin() + begin * width, x.begin() + end * width};
}

TEST(ReferenceTest, PackedDocumentsAreIndependent) {
  const ReferenceConfig config = Small();
  const std::vector<int64_t> cu_seqlens = {0, 37, 38, 38, 138, 145};
  const ReferenceInputs packed = Random(config, cu_seqlens);
  const ReferenceOutputs whole = MustForward(config, packed);
  const int64_t hq = 4, hkv = 2, dk = 6, dv = 10, n = 4;
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    const int64_t begin = cu_seqlens[i], end = cu_seqlens[i + 1];
    ReferenceInputs alone;
    alone.cu_seqlens = {0, end - begin};
    alone.q = Rows(packed.q, begin, end, hq * dk);
    alone.k_cmp = Rows(packed.k_cmp, begin, end, hkv * dk);
    alone.k_slc = Rows(packed.k_slc, begin, end, hkv * dk);
    alone.k_win = Rows(packed.k_win, begin, end, hkv * dk);
    alone.v_cmp = Rows(packed.v_cmp, begin, end, hkv * dv);
    alone.v_slc = Rows(packed.v_slc, begin, end, hkv * dv);
    alone.v_win = Rows(packed.v_win, begin, end, hkv * dv);
    alone.gate = Rows(packed.gate, begin, end, hq * 3);
    const ReferenceOutputs out = MustForward(config, alone);
    EXPECT_EQ(out.o, Rows(whole.o, begin, end, hq * dv));
    EXPECT_EQ(out.lse_cmp, Rows(whole.lse_cmp, begin, end, hq));
    EXPECT_EQ(out.block_indices, std::vector<int32_t>(whole.block_indices.begin() + begin * hkv * n,
                                                      whole.block_indices.begin() + end * hkv * n));
  }
}

TEST(ReferenceTest, LaterTokensDoNotShow) {
  const ReferenceConfig config = Small();
  const ReferenceInputs inputs = Random(config, {0, 100});
  ReferenceInputs changed = inputs;
  for (auto* x : {&changed.k_cmp, &changed.k_slc, &changed.k_win}) {
    for (size_t i = 71 * 2 * 6; i < x->size(); ++i) (*x)[i] = -(*x)[i] + 1.0;
  }
  for (auto* x : {&changed.v_cmp, &changed.v_slc, &changed.v_win}) {
    for (size_t i = 71 * 2 * 10; i < x->size(); ++i) (*x)[i] = 5.0;
  }
  const ReferenceOutputs a = MustForward(config, inputs), b = MustForward(config, changed);
  EXPECT_EQ(Rows(a.o, 0, 71, 40), Rows(b.o, 0, 71, 40));
  EXPECT_NE(Rows(a.o, 71, 72, 40), Rows(b.o, 71, 72, 40));
}

TEST(ReferenceTest, GivenBlocksAreAttended) {
  const ReferenceConfig config = Small();
  const ReferenceInputs inputs = Random(config, {0, 100});
  const ReferenceOutputs own = MustForward(config, inputs);
  const ReferenceOutputs same =
      MustForward(config, inputs, {.given_block_indices = &own.block_indices});
  EXPECT_EQ(own.o, same.o);
  // Only the query's own block: attention over the last few tokens, as a window would see them.
  std::vector<int32_t> indices(own.block_indices.size(), -1);
  for (int64_t row = 0; row < 200; ++row) indices[row * 4] = static_cast<int32_t>(row / 2 / 16);
  const ReferenceOutputs local = MustForward(config, inputs, {.given_block_indices = &indices});
  EXPECT_EQ(local.block_indices, own.block_indices);
  std::vector<double> o, lse;
  Dense(config, inputs, inputs.k_slc, inputs.v_slc, 4, &o, &lse);
  ExpectNear(Rows(local.o_slc, 67, 68, 40), Rows(o, 67, 68, 40), "o_slc of token 67");
}

TEST(ReferenceTest, SubsetOfQueriesAndThreads) {
  const ReferenceConfig config = Small();
  const ReferenceInputs inputs = Random(config, {0, 60, 100});
  const ReferenceOutputs all = MustForward(config, inputs, {.num_threads = 1});
  EXPECT_EQ(all.o, MustForward(config, inputs, {.num_threads = 5}).o);
  const std::vector<int64_t> tokens = {3, 60, 99};
  const ReferenceOutputs some = MustForward(config, inputs, {.query_tokens = &tokens});
  for (int64_t token : tokens) {
    EXPECT_EQ(Rows(all.o, token, token + 1, 40), Rows(some.o, token, token + 1, 40));
  }
  EXPECT_EQ(Rows(some.o, 4, 5, 40), std::vector<double>(40, 0.0));
}

TEST(ReferenceTest, ExtremeLogitsStayFinite) {
  const ReferenceConfig config = Small();
  ReferenceInputs inputs = Random(config, {0, 70});
  for (double& x : inputs.q) x *= 1e6;
  const ReferenceOutputs out = MustForward(config, inputs);
  for (double x : out.o) ASSERT_TRUE(std::isfinite(x));
}

TEST(ReferenceTest, SummariesAreRounded) {
  const ReferenceConfig config = Small();
  const ReferenceInputs inputs = Random(config, {0, 40});
  const ReferenceOutputs out = MustForward(config, inputs, {.summary_rounding = Rounding::kBF16});
  const ReferenceOutputs exact = MustForward(config, inputs);
  ASSERT_EQ(out.kc.size(), exact.kc.size());
  for (size_t i = 0; i < out.kc.size(); ++i) {
    EXPECT_EQ(out.kc[i], Round(Rounding::kBF16, exact.kc[i]));
  }
  EXPECT_NE(out.o_cmp, exact.o_cmp);
  EXPECT_EQ(out.o_win, exact.o_win);
}

TEST(ReferenceTest, WrongSizesAreRefused) {
  const ReferenceConfig config = Small();
  ReferenceInputs inputs = Random(config, {0, 40});
  inputs.v_slc.pop_back();
  const auto outputs = Forward(config, inputs);
  EXPECT_EQ(outputs.status().message(), "v_slc has 799 elements, must have 800");
  ReferenceConfig odd = config;
  odd.num_q_heads = 3;
  EXPECT_FALSE(Forward(odd, inputs).ok());
}

}  // namespace
}  // namespace nsa::reference
