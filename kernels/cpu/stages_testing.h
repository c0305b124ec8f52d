// Runs the CPU stages one after another on one problem, without ranks: for tests that compare them
// with the reference, or with themselves under another layout of the same tokens.
#ifndef KERNELS_CPU_STAGES_TESTING_H_
#define KERNELS_CPU_STAGES_TESTING_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/kernels.h"
#include "tests/reference/reference.h"
#include "tests/testing/generate.h"

namespace nsa::kernels::cpu {

constexpr std::byte kPoison{0xff};  // a NaN in every type

// A tensor [rows,heads,dim] in memory of its own, rows `padding` elements further apart than dense.
struct Rows {
  Rows(DType dtype, int64_t num_rows, int64_t heads, int64_t dim, int64_t padding)
      : row_bytes(heads * dim * SizeOf(dtype)),
        stride_bytes((heads * dim + padding) * SizeOf(dtype)),
        head_stride(dim),
        row_stride(heads * dim + padding),
        bytes(num_rows * stride_bytes, kPoison) {}

  std::byte* row(int64_t i) { return bytes.data() + i * stride_bytes; }
  ConstTensor3 view() const { return {bytes.data(), row_stride, head_stride}; }
  Tensor3 mutable_view() { return {bytes.data(), row_stride, head_stride}; }

  int64_t row_bytes, stride_bytes, head_stride, row_stride;
  test::Bytes bytes;
};

struct StageProblem {
  reference::ReferenceConfig config;
  test::InputOptions options;
  reference::ReferenceInputs inputs;
  test::EncodedInputs encoded;
  AttentionDims dims;
  std::vector<Document> documents;

  int64_t num_tokens() const { return inputs.cu_seqlens.back(); }
};

// 4 query and 2 kv heads of 64, 5 selected blocks, a window of 70 tokens.
reference::ReferenceConfig SmallConfig();
// The same with other sizes of blocks; windows; numbers of selected, initial and local blocks.
std::vector<reference::ReferenceConfig> ConfigsOfBlockSizes();
std::vector<reference::ReferenceConfig> ConfigsOfWindows();
std::vector<reference::ReferenceConfig> ConfigsOfBlockNumbers();

StageProblem MakeStageProblem(const reference::ReferenceConfig& config,
                              const std::vector<int64_t>& cu_seqlens,
                              const test::InputOptions& options, uint64_t seed);
// The same with inputs of the caller's.
StageProblem MakeStageProblem(const reference::ReferenceConfig& config,
                              const test::InputOptions& options,
                              const reference::ReferenceInputs& inputs);

// How a problem's tokens lie in memory and are given to the stages. None of it may show in results.
struct StageLayout {
  // Documents are cut into segments of this many tokens at most, and the segments' rows lie in the
  // tensors last segment first.
  int64_t segment_tokens = int64_t{1} << 40;
  // K and V of every second segment come from the halo buffer, and every second record is a slot.
  bool use_halo_and_slots = false;
  // Queries are given in calls of one each.
  bool one_query_a_call = false;
  // kv heads are given in calls of one each.
  bool one_kv_head_a_call = false;
  // o is written over o_cmp, which then holds o.
  bool gate_in_place = false;
  // Elements between the rows of activations beyond what a dense tensor has.
  int64_t row_padding = 0;
};

// In global token order, dense; lse as float. Everything is filled with NaN patterns beforehand.
struct StageOutputs {
  test::Bytes kc, vc, o_cmp, o_slc, o_win, o;
  std::vector<float> lse_cmp, lse_slc, lse_win;
  std::vector<int32_t> block_indices;
};

absl::StatusOr<StageOutputs> RunStages(const StageProblem& problem, const StageLayout& layout,
                                       Kernels& kernels);

}  // namespace nsa::kernels::cpu

#endif  // KERNELS_CPU_STAGES_TESTING_H_
