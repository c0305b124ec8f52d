// PlanFetch on the GPU against the CPU's, entry for entry.
#include <cstdint>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gpu_testing.h"
#include "kernels/cuda/mirrored_kernels.h"
#include "tests/testing/random.h"

namespace nsa::kernels::cuda {
namespace {

struct Plan {
  std::vector<int32_t> locations, peers;
  std::vector<int64_t> offsets;
  int32_t num_slots = -1;
  int64_t query_end = -1, num_remote_picks = -1;
  std::vector<int64_t> slots_of_rank;
};

// Documents of blocks on a few ranks; queries in segments whose rows lie the other way round.
struct Problem {
  Problem(int64_t num_documents, int64_t blocks_of_document, int64_t queries_of_document,
          int64_t num_ranks, uint64_t seed) {
    dims.num_kv_heads = 3;
    dims.num_selected_blocks = 5;
    test::Random random(seed);
    std::vector<int32_t> next(num_ranks, 0);
    num_tokens = num_documents * queries_of_document;
    for (int64_t d = 0; d < num_documents; ++d) {
      documents.push_back({0, 0, 0, 0, d * blocks_of_document, blocks_of_document});
      segments.push_back({.row = num_tokens - (d + 1) * queries_of_document,
                          .num_tokens = queries_of_document,
                          .position = 0,
                          .document = static_cast<int32_t>(d),
                          .is_halo = 0});
    }
    for (int64_t b = 0; b < num_documents * blocks_of_document; ++b) {
      rank.push_back(static_cast<int32_t>(random.Int(0, num_ranks - 1)));
      ordinal.push_back(next[rank.back()]++);
    }
    blocks_of_rank.assign(next.begin(), next.end());
    for (int64_t i = 0; i < num_tokens * dims.num_kv_heads; ++i) {
      std::set<int32_t> picks;
      for (int64_t k = random.Int(1, 5); k > 0; --k) {
        picks.insert(static_cast<int32_t>(random.Int(0, blocks_of_document - 1)));
      }
      std::vector<int32_t> row(picks.begin(), picks.end());
      row.resize(5, -1);
      indices.insert(indices.end(), row.begin(), row.end());
    }
  }

  Plan Run(Kernels& kernels, int64_t query_begin, int64_t capacity, bool count_picks,
           HeadRange heads) const {
    Plan plan;
    plan.slots_of_rank.assign(blocks_of_rank.size(), -9);
    plan.locations.assign(dims.num_kv_heads * rank.size(), -9);
    plan.peers.assign(capacity, -9);
    plan.offsets.assign(capacity, -9);
    const absl::Status status =
        kernels.PlanFetch({.dims = dims,
                           .queries = {.q = {},
                                       .segments = segments.data(),
                                       .num_segments = static_cast<int32_t>(segments.size()),
                                       .documents = documents.data(),
                                       .num_tokens = num_tokens,
                                       .kv_heads = heads},
                           .block_indices = indices.data(),
                           .owners = {.rank = rank.data(),
                                      .ordinal = ordinal.data(),
                                      .blocks_of_rank = blocks_of_rank.data(),
                                      .num_blocks = static_cast<int64_t>(rank.size()),
                                      .num_ranks = static_cast<int32_t>(blocks_of_rank.size()),
                                      .this_rank = 1},
                           .record_bytes = 4096,
                           .query_begin = query_begin,
                           .capacity = capacity,
                           .locations = plan.locations.data(),
                           .peers = plan.peers.data(),
                           .offsets = plan.offsets.data(),
                           .num_slots = &plan.num_slots,
                           .query_end = &plan.query_end,
                           .num_remote_picks = count_picks ? &plan.num_remote_picks : nullptr,
                           .slots_of_rank = count_picks ? plan.slots_of_rank.data() : nullptr},
                          nullptr);
    EXPECT_TRUE(status.ok()) << status;
    return plan;
  }

  AttentionDims dims{};
  int64_t num_tokens;
  std::vector<Document> documents;
  std::vector<Segment> segments;
  std::vector<int32_t> rank, ordinal, indices;
  std::vector<int64_t> blocks_of_rank;
};

class PlanFetchTest : public ::testing::TestWithParam<CudaPath> {
 protected:
  void SetUp() override {
    NSA_SKIP_WITHOUT_GPU();
    auto device = CudaKernels::Create({.path = GetParam()});
    ASSERT_TRUE(device.ok()) << device.status();
    gpu_ = std::make_unique<MirroredKernels>(*std::move(device));
    auto host = CpuKernels::Create({.num_threads = 1});
    ASSERT_TRUE(host.ok()) << host.status();
    cpu_ = *std::move(host);
  }

  // All pieces of the queries.
  void ExpectTheSame(const Problem& problem, int64_t capacity) {
    ExpectTheSame(problem, capacity, problem.dims.all_kv_heads());
    ExpectTheSame(problem, capacity, {problem.dims.num_kv_heads - 1, problem.dims.num_kv_heads});
  }
  void ExpectTheSame(const Problem& problem, int64_t capacity, HeadRange heads) {
    SCOPED_TRACE(capacity);
    SCOPED_TRACE(heads.size());
    for (int64_t begin = 0; begin < problem.num_tokens;) {
      const Plan expected = problem.Run(*cpu_, begin, capacity, true, heads);
      const Plan actual = problem.Run(*gpu_, begin, capacity, true, heads);
      ASSERT_EQ(expected.query_end, actual.query_end);
      EXPECT_EQ(expected.num_slots, actual.num_slots);
      EXPECT_EQ(expected.num_remote_picks, actual.num_remote_picks);
      EXPECT_EQ(expected.slots_of_rank, actual.slots_of_rank);
      EXPECT_EQ(expected.locations, actual.locations);
      EXPECT_EQ(expected.peers, actual.peers);
      EXPECT_EQ(expected.offsets, actual.offsets);
      ASSERT_GT(actual.query_end, begin);
      begin = actual.query_end;
    }
  }

  std::unique_ptr<Kernels> gpu_, cpu_;
};

INSTANTIATE_TEST_SUITE_P(Paths, PlanFetchTest,
                         ::testing::Values(CudaPath::kAuto, CudaPath::kPortable), NameOfPath);

TEST_P(PlanFetchTest, PiecesAreTheCpus) {
  const Problem problem(3, 40, 50, 3, 1);
  for (int64_t capacity : {15, 22, 60, 1000}) ExpectTheSame(problem, capacity);
}

TEST_P(PlanFetchTest, OneRankFetchesNothing) {
  Problem problem(1, 40, 50, 1, 2);
  problem.rank.assign(problem.rank.size(), 1);
  problem.blocks_of_rank = {0, 40};
  ExpectTheSame(problem, 0);
}

// More blocks and queries than one CTA has threads, and first queries of more than 8 and 16 bits.
TEST_P(PlanFetchTest, ManyBlocksAndQueries) {
  const Problem problem(7, 1999, 13000, 5, 3);
  for (int64_t capacity : {9000, 30000, 100000}) ExpectTheSame(problem, capacity);
}

TEST_P(PlanFetchTest, CountingPicksIsOptional) {
  const Problem problem(2, 20, 20, 2, 4);
  const Plan plan = problem.Run(*gpu_, 3, 1000, false, problem.dims.all_kv_heads());
  EXPECT_EQ(plan.num_remote_picks, -1);
  EXPECT_EQ(plan.query_end, 40);
}

}  // namespace
}  // namespace nsa::kernels::cuda
