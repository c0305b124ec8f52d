// Engines of any configs and plans that use the memory of one another's calls, in turn, give the
// bits that each gives alone.
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/forward/backend.h"
#include "tests/testing/compare.h"
#include "tests/testing/gradient_check.h"
#include "tests/testing/sharded_backward.h"

namespace nsa::test {
namespace {

using G = GlobalGradients;

constexpr int kRanks = 3;

// One problem, and what the ranks make of it.
struct Part {
  Part(const reference::ReferenceConfig& config, const std::vector<int64_t>& cu_seqlens,
       const std::string& sharding, uint64_t seed)
      : plan(*ShardPlan::Parse(sharding, cu_seqlens.back(), kRanks, cu_seqlens)) {
    const DType dtype = TheBackend().dtypes.front();
    InputOptions options;
    options.dtype = dtype;
    options.hidden_width = 24;
    problem = RandomProblem(config, cu_seqlens, options, seed);
    Random random(seed + 1);
    d_o = Encode(dtype, RandomOutputGradients(problem, &random));
    outputs = std::make_unique<GlobalOutputs>(problem);
    gradients = std::make_unique<G>(problem, kRanks, DType::kF32);
  }

  absl::Status Run(std::shared_ptr<comm::Communicator> communicator,
                   std::shared_ptr<kernels::Kernels> kernels, const Engine* memory_of,
                   const BackwardRun& run = {}) {
    return RunRankBackward(problem, d_o, plan, {.memory_of = memory_of}, run,
                           std::move(communicator), std::move(kernels), outputs.get(),
                           gradients.get());
  }

  const ShardPlan plan;
  Problem problem;
  Bytes d_o;
  std::unique_ptr<GlobalOutputs> outputs;
  std::unique_ptr<G> gradients;
};

class SharedMemoryTest : public BackendTest {};

TEST_F(SharedMemoryTest, EnginesThatTakeTurnsGiveTheBitsOfEnginesAlone) {
  const reference::ReferenceConfig mean = {.num_q_heads = 4,
                                           .num_kv_heads = 2,
                                           .head_dim_qk = 64,
                                           .head_dim_v = 64,
                                           .num_selected_blocks = 3,
                                           .window_tokens = 40};
  reference::ReferenceConfig mlp = mean;
  mlp.num_q_heads = 8;
  mlp.head_dim_v = 128;
  mlp.num_selected_blocks = 6;
  mlp.compressor = reference::CompressorKind::kMlp;
  const auto make = [&] {
    std::vector<Part> parts;
    parts.emplace_back(mean, std::vector<int64_t>{0, 200}, "contiguous", 1);
    parts.emplace_back(mlp, std::vector<int64_t>{0, 900, 1300}, "zigzag", 2);
    parts.emplace_back(mean, std::vector<int64_t>{0, 500, 501, 1203}, "zigzag-per-document", 3);
    parts.emplace_back(mean, std::vector<int64_t>{0, 700, 1203}, "zigzag-per-document", 4);
    return parts;
  };
  std::vector<Part> alone = make(), sharing = make();
  for (Part& part : alone) {
    const absl::Status status =
        RunLoopbackBackward(part.problem, part.d_o, part.plan, {}, {}, part.outputs.get(),
                            part.gradients.get(), nullptr, TheBackend().make_kernels);
    ASSERT_TRUE(status.ok()) << status;
  }

  // The first part's engine is the one whose memory the others use; it has to grow for them. NaNs
  // of a first round would show in the second if a byte were read before it is written.
  Part nans(mlp, {0, 900, 1300}, "zigzag", 5);
  for (Bytes* bytes :
       {&nans.problem.inputs.q, &nans.problem.inputs.k_cmp, &nans.problem.inputs.v_cmp,
        &nans.problem.inputs.k_slc, &nans.problem.inputs.v_slc, &nans.problem.inputs.k_win,
        &nans.problem.inputs.v_win, &nans.d_o}) {
    std::memset(bytes->data(), 0xff, bytes->size());
  }
  const absl::Status status = OnLoopbackRanks(
      kRanks,
      [&](std::shared_ptr<comm::Communicator> communicator,
          std::shared_ptr<kernels::Kernels> kernels) -> absl::Status {
        auto first = RankForward::Create(sharing[0].problem, sharing[0].plan,
                                         {.has_backward = true}, communicator, kernels);
        if (!first.ok()) return first.status();
        const Engine* const memory_of = &(*first)->engine();
        absl::Status status = nans.Run(communicator, kernels, memory_of);
        for (size_t i = 0; i < sharing.size() && status.ok(); ++i) {
          // Another engine's calls between a forward and its backward.
          Part& other = sharing[(i + 1) % sharing.size()];
          status =
              sharing[i].Run(communicator, kernels, memory_of,
                             {.keep_blocks = i % 2 == 1, .copies_saved = i < 2, .between = [&] {
                                return other.Run(communicator, kernels, memory_of);
                              }});
        }
        return status;
      },
      TheBackend().make_kernels);
  ASSERT_TRUE(status.ok()) << status;
  for (size_t i = 0; i < alone.size(); ++i) {
    SCOPED_TRACE(i);
    EXPECT_TRUE(SameOutputs(alone[i].problem, *alone[i].outputs, *sharing[i].outputs));
    const G &expected = *alone[i].gradients, &actual = *sharing[i].gradients;
    for (int f = 0; f < G::kNumFields; ++f) {
      const auto field = static_cast<G::Field>(f);
      EXPECT_TRUE(SameBits(G::Name(field), expected.dtype(), expected.shape(field),
                           expected.data(field), actual.data(field)));
    }
    for (int c = 0; c < 2; ++c) {
      for (int w = 0; w < G::kNumWeights; ++w) {
        const auto weight = static_cast<G::Weight>(w);
        if (expected.weight_shape(c, weight).empty()) continue;
        EXPECT_EQ(expected.WeightValues(c, weight), actual.WeightValues(c, weight));
      }
    }
  }
}

}  // namespace
}  // namespace nsa::test
