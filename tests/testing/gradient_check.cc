#include "tests/testing/gradient_check.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>

#include "gtest/gtest.h"
#include "tests/reference/gradients.h"
#include "tests/testing/compare.h"

namespace nsa::test {
namespace {

using G = GlobalGradients;

double Norm(const std::vector<double>& values) {
  double sum = 0.0;
  for (double x : values) sum += x * x;
  return std::sqrt(sum);
}

// The error of the whole, against at least `floor` in place of a norm that is zero up to rounding.
void ExpectClose(const std::string& name, const std::vector<double>& expected,
                 const std::vector<double>& actual, double tolerance, double floor) {
  const double norm = std::max(Norm(expected), floor);
  std::vector<double> difference = actual;
  ASSERT_EQ(expected.size(), actual.size()) << name;
  for (size_t i = 0; i < expected.size(); ++i) difference[i] -= expected[i];
  EXPECT_LE(Norm(difference), tolerance * norm)
      << name << ": norm " << Norm(expected) << ", relative error " << Norm(difference) / norm;
}

// Where no query attends to a token (so that `expected_dv` is zero), `actual` must be so.
void ExpectZeros(const std::string& name, const std::vector<double>& expected_dv, int64_t dv,
                 const std::vector<double>& actual, int64_t head_dim) {
  const int64_t rows = static_cast<int64_t>(expected_dv.size()) / dv;
  int64_t num_not_zero = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const auto* const first = &expected_dv[row * dv];
    if (std::any_of(first, first + dv, [](double x) { return x != 0.0; })) continue;
    for (int64_t i = 0; i < head_dim; ++i) num_not_zero += actual[row * head_dim + i] != 0.0;
  }
  EXPECT_EQ(num_not_zero, 0) << name << ": not zero where no query attends";
}

}  // namespace

void ExpectGradientsEqualReference(const reference::ReferenceConfig& config,
                                   const reference::ReferenceInputs& inputs, DType dtype,
                                   const std::vector<double>& d_o, bool share_kv,
                                   const GlobalOutputs& outputs, const GlobalGradients& gradients,
                                   double factor) {
  const auto expected = reference::Backward(config, inputs, outputs.block_indices(), d_o,
                                            static_cast<int>(std::thread::hardware_concurrency()),
                                            SummaryRounding(dtype));
  ASSERT_TRUE(expected.ok()) << expected.status();
  const double tolerance = dtype == DType::kF32 ? 1e-5 : 6e-3;
  // Of what goes through the softmax, whose terms cancel.
  const double softmax_tolerance = dtype == DType::kF32 ? 1e-5 : 8e-3;
  const auto times_factor = [factor](std::vector<double> values) {
    for (double& x : values) x *= factor;
    return values;
  };
  const auto sum = [](const std::vector<double>& a, const std::vector<double>& b,
                      const std::vector<double>& c) {
    std::vector<double> result(a.size());
    for (size_t i = 0; i < a.size(); ++i) result[i] = a[i] + b[i] + c[i];
    return result;
  };
  const reference::ReferenceGradients& e = *expected;
  // With one key to attend to, or keys alike, what goes through the softmax is zero up to rounding.
  const double floor = 0.25 * factor * Norm(d_o);
  const auto check = [&](G::Field field, const std::vector<double>& wanted) {
    ExpectClose(G::Name(field), times_factor(wanted), gradients.Values(field), tolerance, 0.0);
  };
  const auto check_through_softmax = [&](G::Field field, const std::vector<double>& wanted) {
    ExpectClose(G::Name(field), times_factor(wanted), gradients.Values(field), softmax_tolerance,
                floor);
  };
  check_through_softmax(G::kDq, e.dq);
  check(G::kDgate, e.dgate);
  const auto check_branch = [&](G::Field k, const std::vector<double>& dk, G::Field v,
                                const std::vector<double>& dv) {
    check_through_softmax(k, dk);
    check(v, dv);
    ExpectZeros(G::Name(k), dv, config.head_dim_v, gradients.Values(k), config.head_dim_qk);
    ExpectZeros(G::Name(v), dv, config.head_dim_v, gradients.Values(v), config.head_dim_v);
  };
  if (share_kv) {
    check_branch(G::kDkCmp, sum(e.dk_cmp, e.dk_slc, e.dk_win), G::kDvCmp,
                 sum(e.dv_cmp, e.dv_slc, e.dv_win));
  } else {
    check_branch(G::kDkCmp, e.dk_cmp, G::kDvCmp, e.dv_cmp);
    check_branch(G::kDkSlc, e.dk_slc, G::kDvSlc, e.dv_slc);
    check_branch(G::kDkWin, e.dk_win, G::kDvWin, e.dv_win);
  }
  for (int c = 0; c < 2; ++c) {
    const reference::CompressorParameters& p = c == 0 ? e.dcompress_k : e.dcompress_v;
    const std::vector<double>* const wanted[] = {&p.weight, &p.pe, &p.w, &p.w1,
                                                 &p.b1,     &p.w2, &p.b2};
    for (int w = 0; w < G::kNumWeights; ++w) {
      const auto weight = static_cast<G::Weight>(w);
      if (gradients.weight_shape(c, weight).empty()) continue;
      // Those of compress_k are sums over blocks of what cancels within each query. With one block
      // they are zero.
      const bool is_zero = Norm(*wanted[w]) < 1e-9 * Norm(d_o);
      ExpectClose((c == 0 ? "dcompress_k." : "dcompress_v.") + std::string(G::Name(weight)),
                  times_factor(*wanted[w]), gradients.WeightValues(c, weight),
                  c == 0 ? softmax_tolerance : tolerance,
                  c == 0 ? (is_zero ? 10 : 1) * floor : 0.0);
    }
  }
}

std::vector<double> RandomOutputGradients(const Problem& problem, Random* random) {
  std::vector<double> d_o(problem.num_tokens() * problem.config.num_q_heads *
                          problem.config.head_dim_v);
  for (double& x : d_o) x = random->Normal();
  return Rounded(problem.input_options.dtype, d_o);
}

}  // namespace nsa::test
