#include "tests/testing/reference_check.h"

#include <numeric>
#include <thread>

#include "gtest/gtest.h"
#include "tests/testing/compare.h"

namespace nsa::test {
namespace {

// Of a dense tensor.
std::vector<double> Rows(const std::vector<double>& dense, const std::vector<int64_t>& rows,
                         int64_t row_size) {
  std::vector<double> taken;
  taken.reserve(rows.size() * row_size);
  for (int64_t row : rows) {
    taken.insert(taken.end(), dense.begin() + row * row_size, dense.begin() + (row + 1) * row_size);
  }
  return taken;
}

}  // namespace

void ExpectEqualsReference(const reference::ReferenceConfig& config,
                           const reference::ReferenceInputs& inputs, DType dtype,
                           const GlobalOutputs& outputs, const ReferenceCheck& check) {
  const std::vector<int32_t> indices = outputs.block_indices();
  reference::ReferenceOptions options;
  options.summary_rounding = SummaryRounding(dtype);
  options.given_block_indices = &indices;
  options.query_tokens = check.query_tokens;
  options.num_threads = static_cast<int>(std::thread::hardware_concurrency());
  const auto expected = reference::Forward(config, inputs, options);
  ASSERT_TRUE(expected.ok()) << expected.status();

  const bool is_f32 = dtype == DType::kF32;
  int64_t num_flipped = 0;
  EXPECT_TRUE(SelectionAgrees(
      config, inputs.cu_seqlens, *expected, indices,
      {.relative = is_f32 ? 1e-4 : 2e-2, .query_tokens = check.query_tokens}, &num_flipped));
  if (check.same_selection) {
    EXPECT_EQ(num_flipped, 0);
  }

  std::vector<int64_t> tokens(inputs.cu_seqlens.back());
  std::iota(tokens.begin(), tokens.end(), int64_t{0});
  if (check.query_tokens != nullptr) tokens = *check.query_tokens;
  const int64_t heads = config.num_q_heads, dim = config.head_dim_v;
  const auto expect_close = [&](const char* name, const std::vector<double>& wanted,
                                GlobalOutputs::Field field) {
    EXPECT_TRUE(Close(name, Rows(wanted, tokens, heads * dim),
                      Rows(outputs.Values(field), tokens, heads * dim), dim, is_f32 ? 1e-5 : 4e-3));
  };
  const auto expect_lse = [&](const char* name, const std::vector<double>& wanted,
                              GlobalOutputs::Field field, double tolerance) {
    EXPECT_TRUE(CloseElements(name, Rows(wanted, tokens, heads),
                              Rows(outputs.Values(field), tokens, heads), tolerance, tolerance));
  };
  expect_close("o_cmp", expected->o_cmp, GlobalOutputs::kOCmp);
  expect_close("o_slc", expected->o_slc, GlobalOutputs::kOSlc);
  expect_close("o_win", expected->o_win, GlobalOutputs::kOWin);
  expect_close("o", expected->o, GlobalOutputs::kO);
  // Summaries are rounded, tokens are not.
  expect_lse("lse_cmp", expected->lse_cmp, GlobalOutputs::kLseCmp, is_f32 ? 1e-5 : 1e-2);
  expect_lse("lse_slc", expected->lse_slc, GlobalOutputs::kLseSlc, 1e-5);
  expect_lse("lse_win", expected->lse_win, GlobalOutputs::kLseWin, 1e-5);
}

}  // namespace nsa::test
