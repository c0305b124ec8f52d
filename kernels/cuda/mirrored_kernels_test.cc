#include "kernels/cuda/mirrored_kernels.h"

#include <memory>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
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

}  // namespace
}  // namespace nsa::kernels::cuda
