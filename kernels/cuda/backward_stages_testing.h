// What the tests of the backward's stages on the GPU share.
#ifndef KERNELS_CUDA_BACKWARD_STAGES_TESTING_H_
#define KERNELS_CUDA_BACKWARD_STAGES_TESTING_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels/cpu/stages_testing.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cuda {

using cpu::StageProblem;
using test::Bytes;
using test::Random;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline std::vector<float> RandomFloats(int64_t count, Random* random) {
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

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_BACKWARD_STAGES_TESTING_H_
