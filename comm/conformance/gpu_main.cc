// The main function of tests whose ranks have GPUs.
//
//   --gpu_ranks=N   start N ranks where there are fewer GPUs: they share them, which NCCL allows
//                   since 2.30 with NCCL_MULTI_RANK_GPU_ENABLE=1, without load/store windows
#include <cstdio>

#include "absl/strings/numbers.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "comm/conformance/gpus.h"
#include "gtest/gtest.h"

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  for (int i = 1; i < argc; ++i) {
    absl::string_view value = argv[i];
    int num_ranks = 0;
    if (!absl::ConsumePrefix(&value, "--gpu_ranks=") || !absl::SimpleAtoi(value, &num_ranks)) {
      fprintf(stderr, "%s: must be --gpu_ranks=N\n", argv[i]);
      return 2;
    }
    nsa::comm::conformance::SetGpuRanks(num_ranks);
  }
  return RUN_ALL_TESTS();
}
