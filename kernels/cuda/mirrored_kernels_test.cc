#include "kernels/cuda/mirrored_kernels.h"

#include <cstdint>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cpu/decode_testing.h"
#include "kernels/cpu/stages_testing.h"

namespace nsa::kernels::cuda {
namespace {

// Whatever a stage reads is there, and whatever it writes comes back, in any layout.
TEST(MirroredKernelsTest, StagesSeeTheSameMemory) {
  reference::ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = config.head_dim_v = 64;
  config.num_selected_blocks = 4;
  for (auto kind : {reference::CompressorKind::kWeighted, reference::CompressorKind::kMlp}) {
    config.compressor = kind;
    const auto problem = cpu::MakeStageProblem(config, {0, 40, 311}, {.dtype = DType::kBF16}, 3);
    auto kernels = CpuKernels::Create({.num_threads = 1});
    ASSERT_TRUE(kernels.ok()) << kernels.status();
    const std::shared_ptr<Kernels> direct = *std::move(kernels);
    MirroredKernels mirrored(direct);
    for (bool gate_in_place : {false, true}) {
      const cpu::StageLayout layout{.segment_tokens = 45,
                                    .use_halo_and_slots = true,
                                    .gate_in_place = gate_in_place,
                                    .row_padding = 8};
      const auto expected = cpu::RunStages(problem, layout, *direct);
      const auto actual = cpu::RunStages(problem, layout, mirrored);
      ASSERT_TRUE(expected.ok()) << expected.status();
      ASSERT_TRUE(actual.ok()) << actual.status();
      EXPECT_EQ(expected->kc, actual->kc);
      EXPECT_EQ(expected->vc, actual->vc);
      EXPECT_EQ(expected->o_win, actual->o_win);
      EXPECT_EQ(expected->o_slc, actual->o_slc);
      EXPECT_EQ(expected->o, actual->o);
      EXPECT_EQ(expected->lse_cmp, actual->lse_cmp);
      EXPECT_EQ(expected->lse_slc, actual->lse_slc);
      EXPECT_EQ(expected->block_indices, actual->block_indices);
    }
  }
}

// So do the stages of decoding: of every page that a step needs there is a copy.
TEST(MirroredKernelsTest, DecodingSeesTheSamePages) {
  reference::ReferenceConfig config;
  config.num_q_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim_qk = 128;
  config.head_dim_v = 64;
  config.select_block_tokens = 32;
  config.num_selected_blocks = 4;
  config.window_tokens = 70;
  config.compressor = reference::CompressorKind::kMlp;
  auto kernels = CpuKernels::Create({.num_threads = 1});
  ASSERT_TRUE(kernels.ok()) << kernels.status();
  const std::shared_ptr<Kernels> direct = *std::move(kernels);
  MirroredKernels mirrored(direct);
  for (bool shares : {false, true}) {
    const auto problem = cpu::MakeStageProblem(config, {0, 40, 1211, 1400},
                                               {.dtype = DType::kBF16, .share_keys = shares}, 4);
    for (bool looks : {false, true}) {
      const cpu::DecodeSchedule schedule{.prefixes = {0, 1050, 17},
                                         .max_new_tokens = 23,
                                         .shares_tables = shares,
                                         .looks_at_branches = looks};
      const auto expected = cpu::RunDecode(problem, schedule, *direct);
      const auto actual = cpu::RunDecode(problem, schedule, mirrored);
      ASSERT_TRUE(expected.ok()) << expected.status();
      ASSERT_TRUE(actual.ok()) << actual.status();
      const cpu::StageOutputs &e = expected->outputs, &a = actual->outputs;
      EXPECT_EQ(expected->tokens, actual->tokens);
      EXPECT_TRUE(e.kc == a.kc && e.vc == a.vc);
      EXPECT_TRUE(e.o == a.o);
      EXPECT_TRUE(e.o_cmp == a.o_cmp && e.o_slc == a.o_slc && e.o_win == a.o_win);
      EXPECT_EQ(e.block_indices, a.block_indices);
      if (!looks) continue;
      const auto lse_of_tokens = [&](const std::vector<float>& lse) {
        std::vector<float> rows;
        for (int64_t t : expected->tokens) rows.insert(rows.end(), &lse[t * 4], &lse[t * 4] + 4);
        return rows;
      };
      EXPECT_EQ(lse_of_tokens(e.lse_cmp), lse_of_tokens(a.lse_cmp));
      EXPECT_EQ(lse_of_tokens(e.lse_slc), lse_of_tokens(a.lse_slc));
      EXPECT_EQ(lse_of_tokens(e.lse_win), lse_of_tokens(a.lse_win));
    }
  }
}

TEST(MirroredKernelsTest, CopiesPieces) {
  auto kernels = CpuKernels::Create({.num_threads = 1});
  ASSERT_TRUE(kernels.ok()) << kernels.status();
  MirroredKernels mirrored(*std::move(kernels));
  std::vector<int64_t> memory = {1, 2, 3, 4, 0, 0, 0, 0};
  const void* const src[] = {&memory[2], &memory[0]};
  void* const dst[] = {&memory[4], &memory[6]};
  ASSERT_TRUE(
      mirrored.CopyPieces({.src = src, .dst = dst, .count = 2, .num_bytes = 16}, nullptr).ok());
  EXPECT_EQ(memory, (std::vector<int64_t>{1, 2, 3, 4, 3, 4, 1, 2}));
}

// Lists of no slots have the address of what comes after them.
TEST(MirroredKernelsTest, EmptyListsTakeNoPlace) {
  auto kernels = CpuKernels::Create({.num_threads = 1});
  ASSERT_TRUE(kernels.ok()) << kernels.status();
  MirroredKernels mirrored(*std::move(kernels));
  AttentionDims dims{};
  dims.num_kv_heads = dims.num_selected_blocks = 1;
  const Segment segment = {.row = 0, .num_tokens = 7, .position = 0, .document = 0, .is_halo = 0};
  const Document document = {};
  const std::vector<int32_t> block_indices(7, 0);
  const int32_t owner = 0, ordinal = 0;
  const int64_t blocks_of_rank = 1;
  int32_t location = -1, num_slots = -1;
  int64_t query_end = -1;
  const absl::Status status = mirrored.PlanFetch({.dims = dims,
                                                  .queries = {.q = {},
                                                              .segments = &segment,
                                                              .num_segments = 1,
                                                              .documents = &document,
                                                              .num_tokens = 7,
                                                              .kv_heads = dims.all_kv_heads()},
                                                  .block_indices = block_indices.data(),
                                                  .owners = {.rank = &owner,
                                                             .ordinal = &ordinal,
                                                             .blocks_of_rank = &blocks_of_rank,
                                                             .num_blocks = 1,
                                                             .num_ranks = 1,
                                                             .this_rank = 0},
                                                  .record_bytes = 64,
                                                  .query_begin = 0,
                                                  .capacity = 0,
                                                  .locations = &location,
                                                  .peers = reinterpret_cast<int32_t*>(&query_end),
                                                  .offsets = &query_end,
                                                  .num_slots = &num_slots,
                                                  .query_end = &query_end,
                                                  .num_remote_picks = nullptr,
                                                  .slots_of_rank = nullptr},
                                                 nullptr);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(query_end, 7);
  EXPECT_EQ(num_slots, 0);
  EXPECT_EQ(location, 0);
}

}  // namespace
}  // namespace nsa::kernels::cuda
