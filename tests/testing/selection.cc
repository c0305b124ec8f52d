#include <algorithm>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/testing/compare.h"

namespace nsa::test {
namespace {

using ::testing::AssertionFailure;
using ::testing::AssertionResult;
using ::testing::AssertionSuccess;

// What is wrong with the choice of one row, or empty. `expected` and `actual` are padded with -1.
std::string RowFault(const reference::ReferenceConfig& config, int64_t own_block,
                     absl::Span<const double> scores, absl::Span<const int32_t> expected,
                     absl::Span<const int32_t> actual, const SelectionOptions& options) {
  const auto blocks_of = [](absl::Span<const int32_t> row) {
    return row.subspan(0, std::find(row.begin(), row.end(), -1) - row.begin());
  };
  const auto taken = blocks_of(actual), wanted = blocks_of(expected);
  for (int32_t block : actual.subspan(taken.size())) {
    if (block != -1) return "a block after the padding";
  }
  for (size_t i = 0; i < taken.size(); ++i) {
    if (taken[i] < 0 || taken[i] > own_block) return absl::StrCat("no candidate: ", taken[i]);
    if (i > 0 && taken[i] <= taken[i - 1]) return "not ascending";
  }
  if (taken.size() != wanted.size()) {
    return absl::StrCat(taken.size(), " blocks in place of ", wanted.size());
  }
  // The highest score left out against the lowest taken for it.
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double left_out = -kInfinity, taken_for_it = kInfinity;
  for (int32_t block : wanted) {
    if (std::binary_search(taken.begin(), taken.end(), block)) continue;
    if (block < config.num_initial_blocks || block > own_block - config.num_local_blocks) {
      return absl::StrCat("forced block ", block, " left out");
    }
    left_out = std::max(left_out, scores[block]);
  }
  for (int32_t block : taken) {
    if (std::binary_search(wanted.begin(), wanted.end(), block)) continue;
    taken_for_it = std::min(taken_for_it, scores[block]);
  }
  if (left_out - taken_for_it > options.absolute + options.relative * left_out) {
    return absl::StrCat("a block of score ", left_out, " left out for one of ", taken_for_it);
  }
  return "";
}

}  // namespace

AssertionResult SelectionAgrees(const reference::ReferenceConfig& config,
                                const std::vector<int64_t>& cu_seqlens,
                                const reference::ReferenceOutputs& expected,
                                absl::Span<const int32_t> actual, const SelectionOptions& options,
                                int64_t* num_flipped) {
  const int64_t n = config.num_selected_blocks, hkv = config.num_kv_heads;
  if (actual.size() != expected.block_indices.size()) {
    return AssertionFailure() << "block_indices has " << actual.size() << " values, expected "
                              << expected.block_indices.size();
  }
  std::string first;
  int64_t num_bad = 0, num_rows = 0;
  const auto compare = [&](int64_t token, int64_t document_begin) {
    const int64_t own_block = (token - document_begin) / config.select_block_tokens;
    for (int64_t g = 0; g < hkv; ++g, ++num_rows) {
      const int64_t row = token * hkv + g;
      const auto e = absl::MakeConstSpan(expected.block_indices).subspan(row * n, n);
      const auto a = actual.subspan(row * n, n);
      if (e == a) continue;
      if (num_flipped != nullptr) ++*num_flipped;
      const auto scores = absl::MakeConstSpan(expected.scores)
                              .subspan(row * expected.max_blocks, expected.max_blocks);
      const std::string fault = RowFault(config, own_block, scores, e, a, options);
      if (!fault.empty() && num_bad++ == 0) {
        first = absl::StrCat("token ", token, " (", token - document_begin,
                             " of its document), kv head ", g, ": ", fault, "; expected {",
                             absl::StrJoin(e, " "), "}, actual {", absl::StrJoin(a, " "), "}");
      }
    }
  };
  for (size_t i = 0; i + 1 < cu_seqlens.size(); ++i) {
    for (int64_t token = cu_seqlens[i]; token < cu_seqlens[i + 1]; ++token) {
      const auto* only = options.query_tokens;
      if (only == nullptr || std::find(only->begin(), only->end(), token) != only->end()) {
        compare(token, cu_seqlens[i]);
      }
    }
  }
  if (num_bad == 0) return AssertionSuccess();
  return AssertionFailure() << "block_indices: " << num_bad << " of " << num_rows
                            << " rows are no right choice; first " << first;
}

}  // namespace nsa::test
