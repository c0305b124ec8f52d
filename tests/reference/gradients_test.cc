#include "tests/reference/gradients.h"

#include <cmath>
#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/testing/generate.h"
#include "tests/testing/random.h"

namespace nsa::reference {
namespace {

struct Case {
  const char* name;
  ReferenceConfig config;
  std::vector<int64_t> cu_seqlens;
  test::InputOptions options;
};

void PrintTo(const Case& c, std::ostream* os) { *os << c.name; }
std::string CaseName(const testing::TestParamInfo<Case>& info) { return info.param.name; }

// A case of random inputs, the blocks that it selects, and its gradients for a random d_o.
struct Problem {
  explicit Problem(const Case& c, uint64_t seed = 1) : config(c.config) {
    test::Random random(seed);
    inputs = test::RandomInputs(config, c.cu_seqlens, c.options, &random);
    const auto forward = Forward(config, inputs);
    EXPECT_TRUE(forward.ok()) << forward.status();
    if (!forward.ok()) return;
    block_indices = forward->block_indices;
    d_o.resize(forward->o.size());
    for (double& x : d_o) x = random.Normal();
  }

  ReferenceGradients MustBackward(int num_threads = 2) const {
    auto gradients = Backward(config, inputs, block_indices, d_o, num_threads);
    EXPECT_TRUE(gradients.ok()) << gradients.status();
    return gradients.ok() ? *std::move(gradients) : ReferenceGradients{};
  }

  // The function whose gradients Backward gives.
  double Loss() const {
    const auto forward =
        Forward(config, inputs, {.given_block_indices = &block_indices, .num_threads = 1});
    EXPECT_TRUE(forward.ok()) << forward.status();
    double loss = 0.0;
    for (size_t i = 0; i < d_o.size(); ++i) loss += forward->o[i] * d_o[i];
    return loss;
  }

  ReferenceConfig config;
  ReferenceInputs inputs;
  std::vector<int32_t> block_indices;
  std::vector<double> d_o;
};

struct Tensor {
  std::string name;
  std::vector<double>* x;
  const std::vector<double>* dx;
  // What an error is measured against: dx but where that is zero up to rounding, see gradients.h.
  const std::vector<double>* scale;
};

// What is differentiated, with its gradient; absent tensors left out.
std::vector<Tensor> Tensors(Problem* problem, const ReferenceGradients& gradients) {
  ReferenceInputs& in = problem->inputs;
  const ReferenceGradients& out = gradients;
  std::vector<Tensor> tensors = {
      {"q", &in.q, &out.dq, &out.dq},
      {"k_cmp", &in.k_cmp, &out.dk_cmp, &out.dk_cmp},
      {"v_cmp", &in.v_cmp, &out.dv_cmp, &out.dv_cmp},
      {"k_slc", &in.k_slc, &out.dk_slc, &out.dk_slc},
      {"v_slc", &in.v_slc, &out.dv_slc, &out.dv_slc},
      {"k_win", &in.k_win, &out.dk_win, &out.dk_win},
      {"v_win", &in.v_win, &out.dv_win, &out.dv_win},
      {"gate", &in.gate, &out.dgate, &out.dgate},
  };
  const bool pe_shifts = problem->config.compressor != CompressorKind::kMlp;
  const auto add_parameters = [&](const std::string& name, CompressorParameters* x,
                                  const CompressorParameters& dx, bool is_k) {
    const CompressorParameters& v = out.dcompress_v;
    for (const Tensor& tensor : std::vector<Tensor>{
             {".weight", &x->weight, &dx.weight, &dx.weight},
             {".pe", &x->pe, &dx.pe, is_k && pe_shifts ? &v.pe : &dx.pe},
             {".w", &x->w, &dx.w, &dx.w},
             {".w1", &x->w1, &dx.w1, &dx.w1},
             {".b1", &x->b1, &dx.b1, &dx.b1},
             {".w2", &x->w2, &dx.w2, &dx.w2},
             {".b2", &x->b2, &dx.b2, is_k ? &v.b2 : &dx.b2},
         }) {
      if (tensor.x->empty()) continue;
      tensors.push_back(tensor);
      tensors.back().name = name + tensor.name;
    }
  };
  add_parameters("compress_k", &in.compress_k, out.dcompress_k, true);
  add_parameters("compress_v", &in.compress_v, out.dcompress_v, false);
  return tensors;
}

double Norm(const std::vector<double>& x) {
  double sum = 0.0;
  for (double value : x) sum += value * value;
  return std::sqrt(sum);
}

// Central difference of f about 0.
template <typename F>
double Derivative(double h, F f) {
  return (f(h) - f(-h)) / (2 * h);
}

constexpr double kTolerance = 1e-6;

ReferenceConfig Small(CompressorKind compressor) {
  ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = 3;
  config.head_dim_v = 5;
  config.compress_block_tokens = 4;
  config.compress_stride_tokens = 2;
  config.select_block_tokens = 4;
  config.num_selected_blocks = 3;
  config.num_initial_blocks = 1;
  config.num_local_blocks = 1;
  config.window_tokens = 5;
  config.compressor = compressor;
  return config;
}

// Each differs from Small in what its name says; documents of one token and of fewer tokens than a
// compression block stand among longer ones.
std::vector<Case> SmallCases() {
  const std::vector<int64_t> packed = {0, 17, 18, 21, 21, 34};
  std::vector<Case> cases;
  const auto add = [&](const char* name, CompressorKind compressor, bool per_head, bool with_pe) {
    Case c = {name, Small(compressor), packed, {}};
    c.options.parameters_per_head = per_head;
    c.options.with_pe = with_pe;
    c.options.hidden_width = 3;
    cases.push_back(c);
    return &cases.back();
  };
  add("Mean", CompressorKind::kMean, false, false);
  add("MeanSharpSoftmax", CompressorKind::kMean, false, false)->options.logit_scale = 4.0;

  Case* c = add("WeightedOneKvHeadWindowOfOne", CompressorKind::kWeighted, false, true);
  c->config.num_q_heads = 3;
  c->config.num_kv_heads = 1;
  c->config.compress_stride_tokens = 4;
  c->config.select_block_tokens = 8;
  c->config.num_selected_blocks = 1;
  c->config.num_initial_blocks = 0;
  c->config.window_tokens = 1;
  c = add("WeightedPerHeadNoPeScale", CompressorKind::kWeighted, true, false);
  c->config.softmax_scale = 0.9;

  c = add("LinearLongBlocks", CompressorKind::kLinear, false, true);
  c->config.compress_block_tokens = 6;
  add("LinearPerHead", CompressorKind::kLinear, true, true);

  c = add("MlpAllSelectedWideWindow", CompressorKind::kMlp, false, true);
  c->config.num_selected_blocks = 8;
  c->config.window_tokens = 40;
  add("MlpPerHead", CompressorKind::kMlp, true, true);
  c = add("MlpPerHeadNoPeNoGroups", CompressorKind::kMlp, true, false);
  c->config.num_q_heads = 2;
  c->config.compress_stride_tokens = 4;
  c->config.num_local_blocks = 2;
  return cases;
}

class ElementTest : public testing::TestWithParam<Case> {};

// Every element of every tensor, within 1e-6 of the root mean square of the tensor's gradient.
TEST_P(ElementTest, AgreesWithDifferences) {
  Problem problem(GetParam());
  const ReferenceGradients gradients = problem.MustBackward();
  for (const Tensor& tensor : Tensors(&problem, gradients)) {
    SCOPED_TRACE(tensor.name);
    ASSERT_EQ(tensor.x->size(), tensor.dx->size());
    const double root_mean_square = Norm(*tensor.scale) / std::sqrt(double(tensor.scale->size()));
    for (size_t i = 0; i < tensor.x->size(); ++i) {
      double& x = (*tensor.x)[i];
      const double kept = x;
      const double expected = Derivative(2e-5, [&](double h) {
        x = kept + h;
        return problem.Loss();
      });
      x = kept;
      ASSERT_NEAR((*tensor.dx)[i], expected, kTolerance * root_mean_square) << "element " << i;
    }
    // A softmax over one key is 1 whatever the key.
    const bool is_constant = tensor.name == "k_win" && problem.config.window_tokens == 1;
    EXPECT_EQ(root_mean_square == 0.0, is_constant);
  }
}

INSTANTIATE_TEST_SUITE_P(Small, ElementTest, testing::ValuesIn(SmallCases()), CaseName);

// The block sizes of the paper.
std::vector<Case> LargeCases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, CompressorKind compressor, bool per_head) {
    Case c = {name, {}, {0, 31, 290, 291, 340}, {}};
    c.config.num_q_heads = 4;
    c.config.num_kv_heads = 2;
    c.config.head_dim_qk = 24;
    c.config.head_dim_v = 16;
    c.config.num_selected_blocks = 4;
    c.config.window_tokens = 70;
    c.config.compressor = compressor;
    c.options.parameters_per_head = per_head;
    cases.push_back(c);
  };
  add("Mean", CompressorKind::kMean, false);
  add("Weighted", CompressorKind::kWeighted, false);
  add("Linear", CompressorKind::kLinear, true);
  add("Mlp", CompressorKind::kMlp, false);
  return cases;
}

class DirectionTest : public testing::TestWithParam<Case> {};

// All elements of a tensor at once, each by +h or -h. What a random direction of that kind sees of
// a gradient, or of an error in it, has the norm of either for its root mean square.
TEST_P(DirectionTest, AgreesWithDifferences) {
  Problem problem(GetParam());
  test::Random random(2);
  const ReferenceGradients gradients = problem.MustBackward();
  for (const Tensor& tensor : Tensors(&problem, gradients)) {
    SCOPED_TRACE(tensor.name);
    ASSERT_EQ(tensor.x->size(), tensor.dx->size());
    std::vector<double> direction(tensor.x->size());
    for (double& x : direction) x = random.OneIn(2) ? 1.0 : -1.0;
    double along = 0.0;
    for (size_t i = 0; i < direction.size(); ++i) along += (*tensor.dx)[i] * direction[i];
    const std::vector<double> kept = *tensor.x;
    const double expected = Derivative(3e-6, [&](double h) {
      for (size_t i = 0; i < kept.size(); ++i) (*tensor.x)[i] = kept[i] + h * direction[i];
      return problem.Loss();
    });
    *tensor.x = kept;
    EXPECT_NEAR(along, expected, kTolerance * Norm(*tensor.scale));
    EXPECT_GT(Norm(*tensor.scale), 0.0);
  }
}

INSTANTIATE_TEST_SUITE_P(Large, DirectionTest, testing::ValuesIn(LargeCases()), CaseName);

TEST(GradientsTest, OneHeadOfTheWindowByHand) {
  ReferenceConfig config;
  config.window_tokens = 2;
  ReferenceInputs inputs;
  inputs.cu_seqlens = {0, 2};
  inputs.q = {1, 1};
  inputs.k_cmp = inputs.v_cmp = inputs.k_slc = inputs.v_slc = {0, 0};
  inputs.k_win = {std::log(1), std::log(3)};  // p = 1/4, 3/4
  inputs.v_win = {4, 8};                      // o_win = 7
  inputs.gate = {0, 0, 0, 0, 0, 5};
  const std::vector<int32_t> blocks(2 * 16, -1);
  const auto out = Backward(config, inputs, blocks, {0, 10});
  ASSERT_TRUE(out.ok()) << out.status();
  EXPECT_NEAR(out->dgate[5], 10 * 7, 1e-12);
  EXPECT_NEAR(out->dv_win[0], 10 * 5 / 4.0, 1e-12);
  EXPECT_NEAR(out->dv_win[1], 10 * 5 * 3 / 4.0, 1e-12);
  // p * gate * d_o * (v - o_win) times q.
  EXPECT_NEAR(out->dk_win[0], 50 / 4.0 * (4 - 7), 1e-12);
  EXPECT_NEAR(out->dk_win[1], 50 * 3 / 4.0 * (8 - 7), 1e-12);
  EXPECT_NEAR(out->dq[1], 50 * 3 / 4.0 * std::log(3), 1e-12);
  EXPECT_EQ(out->dq[0], 0.0);
}

bool AllZero(const std::vector<double>& x, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    if (x[i] != 0.0) return false;
  }
  return true;
}

bool AllZero(const std::vector<double>& x) { return AllZero(x, 0, x.size()); }

// Whether row `row` of `width` elements holds nothing but exact zeros.
bool IsZeroRow(const std::vector<double>& x, int64_t row, int64_t width) {
  return AllZero(x, row * width, (row + 1) * width);
}

// A gradient is exactly zero but for what the one query with a d_o attends to.
TEST(GradientsTest, OneQueryReachesOnlyWhatItAttendsTo) {
  Case c = {"", Small(CompressorKind::kWeighted), {0, 20, 60, 80}, {}};
  c.options.parameters_per_head = true;
  Problem problem(c);
  const int64_t s = 80, hq = 4, hkv = 2, dk = 3, dv = 5, n = 3;
  const int64_t begin = 20, t = 30, head = 3, g = 1;  // the query: token 50
  const int64_t q_row = (begin + t) * hq + head;
  for (int64_t i = 0; i < s * hq * dv; ++i) {
    if (i / dv != q_row) problem.d_o[i] = 0.0;
  }
  const ReferenceGradients out = problem.MustBackward();
  for (int64_t row = 0; row < s * hq; ++row) {
    EXPECT_EQ(IsZeroRow(out.dq, row, dk), row != q_row) << row;
    EXPECT_EQ(IsZeroRow(out.dgate, row, 3), row != q_row) << row;
  }
  // Blocks 0 to 13 end at the query's 30 or before, so the last token of a visible one is 29.
  const int64_t cmp_end = 30;
  for (int64_t row = 0; row < s * hkv; ++row) {
    const int64_t u = row / hkv - begin;
    const bool is_past = row % hkv == g && u >= 0 && u <= t;
    bool is_selected = false;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t block = problem.block_indices[((begin + t) * hkv + g) * n + i];
      is_selected |= is_past && u / 4 == block;
    }
    const bool is_in_window = is_past && u > t - 5;
    const bool is_compressed = is_past && u < cmp_end;
    EXPECT_EQ(IsZeroRow(out.dk_cmp, row, dk), !is_compressed) << row;
    EXPECT_EQ(IsZeroRow(out.dv_cmp, row, dv), !is_compressed) << row;
    EXPECT_EQ(IsZeroRow(out.dk_slc, row, dk), !is_selected) << row;
    EXPECT_EQ(IsZeroRow(out.dv_slc, row, dv), !is_selected) << row;
    EXPECT_EQ(IsZeroRow(out.dk_win, row, dk), !is_in_window) << row;
    EXPECT_EQ(IsZeroRow(out.dv_win, row, dv), !is_in_window) << row;
  }
  for (const CompressorParameters* parameters : {&out.dcompress_k, &out.dcompress_v}) {
    for (int64_t h = 0; h < hkv; ++h) {
      EXPECT_EQ(IsZeroRow(parameters->weight, h, 4), h != g) << h;
    }
  }
}

// Documents shorter than a block, and the tokens before the first block's end.
TEST(GradientsTest, QueriesThatSeeNoSummaryGiveItNoGradient) {
  Problem problem({"", Small(CompressorKind::kMlp), {0, 3, 23, 24}, {}});
  for (int64_t i = 0; i < 24 * 4 * 5; ++i) {
    const int64_t token = i / (4 * 5);
    if (token >= 3 + 3 && token < 23) problem.d_o[i] = 0.0;
  }
  const ReferenceGradients out = problem.MustBackward();
  for (const auto* x : {&out.dkc, &out.dvc, &out.dk_cmp, &out.dv_cmp}) EXPECT_TRUE(AllZero(*x));
  for (const CompressorParameters* p : {&out.dcompress_k, &out.dcompress_v}) {
    for (const auto* x : {&p->pe, &p->w1, &p->b1, &p->w2, &p->b2}) {
      EXPECT_FALSE(x->empty());
      EXPECT_TRUE(AllZero(*x));
    }
  }
  for (int64_t row = 0; row < 24 * 4; ++row) EXPECT_EQ(out.dgate[row * 3], 0.0);
  // The other branches have theirs: the first token's v of either.
  EXPECT_FALSE(IsZeroRow(out.dv_slc, 0, 5));
  EXPECT_FALSE(IsZeroRow(out.dv_win, 0, 5));
}

TEST(GradientsTest, NothingSelectedGivesNoGradient) {
  Problem problem({"", Small(CompressorKind::kMean), {0, 20}, {}});
  problem.block_indices.assign(problem.block_indices.size(), -1);
  const ReferenceGradients out = problem.MustBackward();
  EXPECT_TRUE(AllZero(out.dk_slc));
  EXPECT_TRUE(AllZero(out.dv_slc));
  for (int64_t row = 0; row < 20 * 4; ++row) {
    EXPECT_EQ(out.dgate[row * 3 + 1], 0.0);
  }
  EXPECT_FALSE(AllZero(out.dq));
}

TEST(GradientsTest, NothingButDocumentsShorterThanABlock) {
  Problem problem({"", Small(CompressorKind::kLinear), {0, 3, 4, 4, 6}, {}});
  const ReferenceGradients out = problem.MustBackward();
  EXPECT_TRUE(out.dkc.empty());
  EXPECT_EQ(out.dk_cmp, std::vector<double>(6 * 2 * 3, 0.0));
  EXPECT_EQ(out.dcompress_v.w, std::vector<double>(5 * 4 * 5, 0.0));
  EXPECT_FALSE(AllZero(out.dq));
}

TEST(GradientsTest, UnreadParametersHaveZeroGradients) {
  Problem problem({"", Small(CompressorKind::kMean), {0, 20}, {}});
  problem.inputs.compress_k.pe = {1, 2, 3};
  const ReferenceGradients out = problem.MustBackward();
  EXPECT_EQ(out.dcompress_k.pe, (std::vector<double>{0, 0, 0}));
  EXPECT_FALSE(AllZero(out.dk_cmp));
}

TEST(GradientsTest, ExtremeLogitsStayFinite) {
  Problem problem({"", Small(CompressorKind::kMlp), {0, 30}, {}});
  for (double& x : problem.inputs.q) x *= 1e6;
  const ReferenceGradients out = problem.MustBackward();
  for (const Tensor& tensor : Tensors(&problem, out)) {
    for (double x : *tensor.dx) ASSERT_TRUE(std::isfinite(x)) << tensor.name;
  }
}

TEST(GradientsTest, ThreadsChangeNothing) {
  Problem problem({"", Small(CompressorKind::kLinear), {0, 17, 40}, {}});
  const ReferenceGradients one = problem.MustBackward(1), many = problem.MustBackward(5);
  const std::vector<Tensor> a = Tensors(&problem, one), b = Tensors(&problem, many);
  for (size_t i = 0; i < a.size(); ++i) EXPECT_EQ(*a[i].dx, *b[i].dx) << a[i].name;
}

TEST(GradientsTest, WrongSizesAreRefused) {
  const Problem problem({"", Small(CompressorKind::kMean), {0, 20}, {}});
  const auto message = [](const Problem& wrong) {
    return std::string(
        Backward(wrong.config, wrong.inputs, wrong.block_indices, wrong.d_o).status().message());
  };
  Problem wrong = problem;
  wrong.d_o.pop_back();
  EXPECT_EQ(message(wrong), "d_o has 399 elements, must have 400");
  wrong = problem;
  wrong.inputs.gate.clear();
  EXPECT_EQ(message(wrong), "gate has 0 elements, must have 240");
  wrong = problem;
  wrong.block_indices.pop_back();
  EXPECT_EQ(message(wrong), "given_block_indices has 119 elements, must have 120");
  wrong = problem;
  wrong.inputs.v_win.pop_back();
  EXPECT_EQ(message(wrong), "v_win has 199 elements, must have 200");
}

}  // namespace
}  // namespace nsa::reference
