// Which kernel is taken. It needs no GPU: nothing is launched.
#include "kernels/cuda/dispatch.h"

#include "gtest/gtest.h"

namespace nsa::kernels::cuda {
namespace {

AttentionDims HopperDims() {
  AttentionDims dims{};
  dims.dtype = DType::kBF16;
  dims.num_q_heads = 64;
  dims.num_kv_heads = 4;
  dims.head_dim_qk = 128;
  dims.head_dim_v = 128;
  dims.compress_block_tokens = 32;
  dims.compress_stride_tokens = 16;
  dims.select_block_tokens = 64;
  dims.num_selected_blocks = 16;
  dims.num_initial_blocks = 1;
  dims.num_local_blocks = 2;
  dims.window_tokens = 512;
  dims.softmax_scale = 0.1f;
  return dims;
}

// Expects Hopper's kernels on Hopper for the stages named, and portable ones otherwise.
void ExpectChoices(const AttentionDims& dims, bool score, bool selected, bool window) {
  EXPECT_EQ(kScoreAndSelect.Choose(dims, Path::kHopper),
            score ? LaunchScoreSelectFast : LaunchScoreSelectAny);
  EXPECT_EQ(kAttendSelected.Choose(dims, Path::kHopper),
            selected ? LaunchAttendSelectedFast : LaunchAttendSelectedAny);
  EXPECT_EQ(kAttendWindow.Choose(dims, Path::kHopper),
            window ? LaunchAttendWindowFast : LaunchAttendWindowAny);
  EXPECT_EQ(kScoreAndSelect.Choose(dims, Path::kPortable), LaunchScoreSelectAny);
  EXPECT_EQ(kAttendSelected.Choose(dims, Path::kPortable), LaunchAttendSelectedAny);
  EXPECT_EQ(kAttendWindow.Choose(dims, Path::kPortable), LaunchAttendWindowAny);
  for (Path path : {Path::kHopper, Path::kPortable}) {
    EXPECT_EQ(kPackBlocks.Choose(dims, path), LaunchPackBlocks);
    EXPECT_EQ(kPlanFetch.Choose(dims, path), LaunchPlanFetch);
  }
}

TEST(DispatchTest, HopperServesItsShapes) {
  ExpectChoices(HopperDims(), true, true, true);
  AttentionDims dims = HopperDims();
  dims.head_dim_qk = 192;
  dims.num_q_heads = 20;
  ExpectChoices(dims, true, true, true);
  dims.select_block_tokens = 128;
  dims.compress_block_tokens = 96;
  dims.num_selected_blocks = 99;
  ExpectChoices(dims, true, true, true);
}

TEST(DispatchTest, HopperRanksItsShapes) {
  for (int32_t d : {16, 48}) {
    for (int32_t l : {d, 2 * d, 3 * d, 4 * d, 5 * d, 8 * d}) {
      for (int32_t block : {d, 2 * d, 3 * d, 4 * d, 6 * d, 8 * d, 9 * d, 16 * d}) {
        AttentionDims dims = HopperDims();
        dims.compress_stride_tokens = d;
        dims.compress_block_tokens = l;
        dims.select_block_tokens = block;
        const bool serves_l = l == d || l == 2 * d || l == 4 * d;
        const bool serves_block = block == 2 * d || block == 4 * d || block == 8 * d;
        EXPECT_EQ(HasFastRank(dims), serves_l && serves_block && l <= block)
            << l << " " << d << " " << block;
        dims.head_dim_v = 64;
        EXPECT_FALSE(HasFastRank(dims));
      }
    }
  }
  AttentionDims dims = HopperDims();
  dims.num_selected_blocks = 35;
  EXPECT_TRUE(HasFastRank(dims));
  dims.num_selected_blocks = 36;
  EXPECT_FALSE(HasFastRank(dims));
}

TEST(DispatchTest, HopperServesItsShapesBackward) {
  const auto choice = [](const AttentionDims& dims, Path path) {
    return kAttendSelectedBackward.Choose(dims, path);
  };
  for (int32_t dim : {64, 128}) {
    AttentionDims dims = HopperDims();
    dims.head_dim_qk = dims.head_dim_v = dim;
    EXPECT_EQ(choice(dims, Path::kHopper), LaunchAttendSelectedBackwardFast);
    EXPECT_EQ(choice(dims, Path::kPortable), LaunchAttendSelectedBackwardAny);
    dims.num_q_heads = 65 * dims.num_kv_heads;
    EXPECT_EQ(choice(dims, Path::kHopper), LaunchAttendSelectedBackwardAny);
  }
  AttentionDims dims = HopperDims();
  dims.select_block_tokens = 128;
  EXPECT_EQ(choice(dims, Path::kHopper), LaunchAttendSelectedBackwardAny);
  dims = HopperDims();
  dims.head_dim_qk = 192;
  EXPECT_EQ(choice(dims, Path::kHopper), LaunchAttendSelectedBackwardAny);
}

TEST(DispatchTest, PortableKernelsServeTheOthers) {
  AttentionDims dims = HopperDims();
  dims.head_dim_v = 64;
  ExpectChoices(dims, false, false, false);
  dims.head_dim_qk = dims.head_dim_v = 256;
  ExpectChoices(dims, false, false, false);
}

}  // namespace
}  // namespace nsa::kernels::cuda
