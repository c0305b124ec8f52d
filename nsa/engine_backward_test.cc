// As engine_test.cc, of the backward.
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nsa/engine_testlib.h"
#include "tests/testing/delegating_kernels.h"

namespace nsa {
namespace {

using ::testing::HasSubstr;

class EngineBackwardTest : public EngineTest {
 protected:
  // Engines with a forward that is saved.
  void CreateAndForward() {
    for (Rank& rank : ranks_) rank.options.has_backward = true;
    Create();
    for (Rank& rank : ranks_) ASSERT_TRUE(rank.create_status.ok()) << rank.create_status;
    for (const absl::Status& status : CreateSaved()) ASSERT_TRUE(status.ok()) << status;
    for (Rank& rank : ranks_) rank.saved = rank.own_saved.get();
    for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  }
  std::vector<absl::Status> CreateSaved() {
    return CallOnEachRank([](Rank& rank) {
      auto saved = rank.engine->CreateSavedForward(rank.save_options);
      if (saved.ok()) rank.own_saved = *std::move(saved);
      return saved.status();
    });
  }
  std::vector<absl::Status> Backward() {
    return CallOnEachRank([](Rank& rank) {
      return rank.engine->Backward(rank.inputs, rank.d_o, *rank.saved, rank.gradients);
    });
  }
  template <typename Spoil>
  void ExpectBackwardFails(const std::string& part, Spoil spoil) {
    ExpectFails(
        absl::StatusCode::kInvalidArgument, part, [this] { return Backward(); }, spoil);
  }
};

TEST_F(EngineBackwardTest, WrongTensorsOfOneRankAreAnErrorOnEveryRankAndTheEngineGoesOn) {
  CreateAndForward();
  ExpectBackwardFails("rank 1: q.shape = [67,4,32]: must be [67,4,64]",
                      [](Rank& r) { r.inputs.q.shape[2] = 32; });
  ExpectBackwardFails("rank 1: d_o.data = null", [](Rank& r) { r.d_o.data = nullptr; });
  ExpectBackwardFails("rank 1: d_o.shape = [67,3,64]: must be [67,4,64]",
                      [](Rank& r) { r.d_o.shape[1] = 3; });
  ExpectBackwardFails("rank 1: d_o.dtype = f32: must be bf16",
                      [](Rank& r) { r.d_o.dtype = DType::kF32; });
  const struct {
    const char* name;
    Tensor Gradients::*tensor;
  } all[] = {{"dq", &Gradients::dq},         {"dk_cmp", &Gradients::dk_cmp},
             {"dv_cmp", &Gradients::dv_cmp}, {"dk_slc", &Gradients::dk_slc},
             {"dv_slc", &Gradients::dv_slc}, {"dk_win", &Gradients::dk_win},
             {"dv_win", &Gradients::dv_win}, {"dgate", &Gradients::dgate}};
  for (const auto& [name, tensor] : all) {
    const std::string field = std::string("rank 1: ") + name;
    ExpectBackwardFails(field + ".shape = [66,",
                        [&](Rank& r) { (r.gradients.*tensor).shape[0] = 66; });
    ExpectBackwardFails(field + ".dtype = f16: must be bf16",
                        [&](Rank& r) { (r.gradients.*tensor).dtype = DType::kF16; });
    ExpectBackwardFails(field + ".strides[2] = 2",
                        [&](Rank& r) { (r.gradients.*tensor).strides[2] = 2; });
  }
}

TEST_F(EngineBackwardTest, GradientsAreSharedAsKAndVAre) {
  CreateAndForward();
  ExpectBackwardFails("rank 1: dk_slc, dv_slc: must not be those of _cmp, as the branches do not",
                      [](Rank& r) { r.gradients.dk_slc = r.gradients.dk_cmp; });
  ExpectBackwardFails("rank 1: dk_win, dv_win: must not be those of _slc, as the branches do not",
                      [](Rank& r) { r.gradients.dv_win = r.gradients.dv_slc; });
  ExpectBackwardFails("branches that share k and v: rank 1 has {cmp slc win}", [](Rank& r) {
    r.inputs.SetSharedKv(r.inputs.k_cmp, r.inputs.v_cmp);
    r.gradients.SetSharedKv(r.gradients.dk_cmp, r.gradients.dv_cmp);
  });
  for (Rank& rank : ranks_) {
    rank.inputs.SetSharedKv(rank.inputs.k_cmp, rank.inputs.v_cmp);
    rank.gradients.SetSharedKv(rank.gradients.dk_cmp, rank.gradients.dv_cmp);
  }
  for (const absl::Status& status : Forward()) ASSERT_TRUE(status.ok()) << status;
  ExpectBackwardFails("rank 1: dk_slc, dv_slc: must be those of _cmp, as the branches share k",
                      [](Rank& r) { r.gradients.dk_slc = Tensor(); });
  ExpectBackwardFails("sum_over_ranks: rank 1 has true, rank 0 has false",
                      [](Rank& r) { r.gradients.sum_over_ranks = true; });
}

TEST_F(EngineBackwardTest, SavedMustHoldAForwardOfTheEngine) {
  CreateAndForward();
  std::vector<std::unique_ptr<SavedForward>> filled(kRanks);
  for (Rank& rank : ranks_) filled[rank.rank] = std::move(rank.own_saved);
  for (const absl::Status& status : CreateSaved()) ASSERT_TRUE(status.ok()) << status;
  const std::string part = "rank 1: saved: must hold a forward of this engine";
  ExpectBackwardFails(part, [](Rank& r) { r.saved = r.own_saved.get(); });
  ExpectBackwardFails(part, [&](Rank& r) { r.saved = filled[0].get(); });
  ExpectForwardFails("rank 1: saved: must be made by this engine",
                     [&](Rank& r) { r.saved = filled[0].get(); });
  ExpectForwardFails("saved: rank 1 has none", [](Rank& r) { r.saved = nullptr; });
  ExpectForwardFails("rank 1: outputs: all but o must be unset with `saved`",
                     [](Rank& r) { r.outputs.o_win = r.outputs.o; });
}

TEST_F(EngineBackwardTest, FailureOfOneRankInTheMiddleReachesTheOthersAtOnce) {
  class FailingWindow : public test::DelegatingKernels {
   public:
    using DelegatingKernels::DelegatingKernels;
    absl::Status AttendWindowBackward(const kernels::AttendWindowBackwardParams&, void*) override {
      return absl::InternalError("the window kernel failed");
    }
  };
  ranks_[2].kernels = std::make_shared<FailingWindow>(ranks_[2].kernels);
  CreateAndForward();
  const absl::Time begin = absl::Now();
  const std::vector<absl::Status> statuses = Backward();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  EXPECT_EQ(statuses[2].code(), absl::StatusCode::kInternal);
  for (int r : {0, 1}) {
    EXPECT_EQ(statuses[r].code(), absl::StatusCode::kAborted) << statuses[r];
    EXPECT_THAT(std::string(statuses[r].message()), HasSubstr("the window kernel failed"));
  }
}

TEST_F(EngineBackwardTest, CompressorGradients) {
  for (Rank& rank : ranks_) {
    rank.options.config.compressor = Compressor::kMlp;
    rank.options.max_hidden_width = 8;
  }
  std::vector<float> weights(16 * 32 * 64);
  std::vector<std::vector<float>> gradients(2 * kRanks, std::vector<float>(8 * 32 * 64));
  const auto params = [&weights](int64_t hidden) {
    const auto tensor = [&weights](Dims shape) {
      return ConstTensor(weights.data(), DType::kF32, std::move(shape));
    };
    CompressorParams p;
    p.w1 = tensor({1, hidden, 32 * 64});
    p.b1 = tensor({1, hidden});
    p.w2 = tensor({1, 64, hidden});
    p.b2 = tensor({1, 64});
    return p;
  };
  for (Rank& rank : ranks_) {
    rank.inputs.compress_k = rank.inputs.compress_v = params(8);
    rank.gradients.dcompress_k.w1 =
        Tensor(gradients[2 * rank.rank].data(), DType::kF32, {1, 8, 32 * 64});
    rank.gradients.dcompress_v.b1 =
        Tensor(gradients[2 * rank.rank + 1].data(), DType::kF32, {1, 8});
  }
  // Dense all the same.
  ranks_[0].inputs.compress_k.b2.strides[0] = 1;
  ranks_[2].gradients.dcompress_v.b1.strides[0] = 1;
  CreateAndForward();
  ExpectBackwardFails(
      "rank 1: compress_k.w1.shape[1] = 9: must be at most "
      "EngineOptions::max_hidden_width = 8",
      [&](Rank& r) { r.inputs.compress_k = params(9); });
  ExpectBackwardFails("rank 1: dcompress_k.w1: must be f32 of the parameter's shape [1,8,2048]",
                      [](Rank& r) { r.gradients.dcompress_k.w1.shape[1] = 7; });
  ExpectBackwardFails("rank 1: dcompress_v.b1: must be f32",
                      [](Rank& r) { r.gradients.dcompress_v.b1.dtype = DType::kBF16; });
  ExpectBackwardFails("rank 1: dcompress_v.b1.strides: must be those of a dense tensor",
                      [](Rank& r) { r.gradients.dcompress_v.b1.strides[1] = 2; });
  ExpectBackwardFails("rank 1: dcompress_v.b1.strides: must be those of a dense tensor",
                      [](Rank& r) { r.gradients.dcompress_v.b1.strides.clear(); });
  ExpectBackwardFails("rank 1: dcompress_v.b1.data: must be aligned to its element of 4 bytes",
                      [](Rank& r) {
                        Tensor& b1 = r.gradients.dcompress_v.b1;
                        b1.data = static_cast<char*>(b1.data) + 2;
                      });
  ExpectBackwardFails("rank 1: dcompress_v.pe: must be unset, as the parameter is",
                      [](Rank& r) { r.gradients.dcompress_v.pe = r.gradients.dcompress_v.b1; });
}

// A tensor of 2^31 numbers, whose memory nobody touches.
TEST_F(EngineBackwardTest, CompressorGradientsOfMoreNumbersThanInt32Counts) {
  class Untouched : public test::DelegatingKernels {
   public:
    using DelegatingKernels::DelegatingKernels;
    class Pages : public kernels::Memory {
     public:
      explicit Pages(int64_t num_bytes) : num_bytes_(num_bytes) {}
      ~Pages() override { munmap(data_, num_bytes_); }
      void* data() override { return data_; }

     private:
      const int64_t num_bytes_;
      void* const data_ = mmap(nullptr, num_bytes_, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    };
    absl::StatusOr<std::unique_ptr<kernels::Memory>> Allocate(int64_t num_bytes) override {
      auto pages = std::make_unique<Pages>(std::max<int64_t>(num_bytes, 1));
      if (pages->data() == MAP_FAILED) return absl::ResourceExhaustedError("mmap");
      return pages;
    }
    int64_t CompressBackwardScratchBytes(const kernels::AttentionDims&, Compressor, int32_t,
                                         int64_t) const override {
      return 0;
    }
    absl::Status Compress(const kernels::CompressParams&, void*) override {
      return absl::OkStatus();
    }
    absl::Status CompressBackward(const kernels::CompressBackwardParams&, void*) override {
      return absl::OkStatus();
    }
    absl::Status StoreGradient(const kernels::StoreGradientParams& params, void*) override {
      if (params.num_rows == 1) numbers += params.head_dim;
      return absl::OkStatus();
    }
    int64_t numbers = 0;
  };
  constexpr int64_t kHidden = 1 << 20;
  float number = 0;
  const auto tensor = [&number](Dims shape) {
    return Tensor(&number, DType::kF32, std::move(shape));
  };
  std::vector<std::shared_ptr<Untouched>> untouched;
  for (Rank& rank : ranks_) {
    rank.options.config.compressor = Compressor::kMlp;
    rank.options.max_hidden_width = kHidden;
    CompressorParams& params = rank.inputs.compress_k;
    params.w1 = tensor({1, kHidden, 32 * 64});
    params.b1 = tensor({1, kHidden});
    params.w2 = tensor({1, 64, kHidden});
    params.b2 = tensor({1, 64});
    rank.inputs.compress_v = params;
    rank.gradients.dcompress_k.w1 = tensor({1, kHidden, 32 * 64});
    untouched.push_back(std::make_shared<Untouched>(rank.kernels));
    rank.kernels = untouched.back();
  }
  CreateAndForward();
  for (const absl::Status& status : Backward()) ASSERT_TRUE(status.ok()) << status;
  for (const auto& kernels : untouched) EXPECT_EQ(kernels->numbers, kHidden * 32 * 64);
}

TEST_F(EngineBackwardTest, NoBackwardWithoutTheOption) {
  Create();
  for (const absl::Status& status : CreateSaved()) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("the engine has no backward"));
  }
  for (const absl::Status& status : Forward()) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(EngineBackwardTest, DifferentOptionsAreAnErrorOnEveryRank) {
  ranks_[1].options.has_backward = true;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument,
                    "has_backward: rank 1 has true, rank 0 has false");
  for (Rank& rank : ranks_) rank.options.has_backward = true;
  ranks_[2].options.max_hidden_width = 16;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument,
                    "max_hidden_width: rank 2 has 16, rank 0 has 0");
  ranks_[2].options.max_hidden_width = -1;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument, "rank 2: max_hidden_width = -1: must");
}

TEST_F(EngineBackwardTest, FetchBudgetMustHoldOneKvHead) {
  for (Rank& rank : ranks_) {
    NsaConfig& config = rank.options.config;
    config.num_selected_blocks = config.num_local_blocks = 1;
    config.num_initial_blocks = 0;
  }
  // A query selects one block for each of two kv heads; three blocks are remote to rank 2.
  const int64_t record_bytes =
      ranks_[2].kernels->RecordBytes(MakeDims(SmallConfig(), DType::kBF16));
  ranks_[2].options.fetch_budget_bytes = 2 * record_bytes;
  Create();
  for (const Rank& rank : ranks_) EXPECT_TRUE(rank.create_status.ok()) << rank.create_status;
  for (Rank& rank : ranks_) rank.options.has_backward = true;
  ExpectCreateFails(absl::StatusCode::kInvalidArgument,
                    absl::StrCat("rank 2: fetch_budget_bytes = ", 2 * record_bytes,
                                 ": must be at least ", 3 * record_bytes));
}

TEST_F(EngineBackwardTest, SaveOptionsAndMemoryOfOneRank) {
  class NoMemory : public test::DelegatingKernels {
   public:
    using DelegatingKernels::DelegatingKernels;
    absl::StatusOr<std::unique_ptr<kernels::Memory>> Allocate(int64_t num_bytes) override {
      return DelegatingKernels::Allocate(std::exchange(is_out, false) ? num_bytes << 30
                                                                      : num_bytes);
    }
    bool is_out = false;  // for the next time
  };
  const auto no_memory = std::make_shared<NoMemory>(ranks_[1].kernels);
  ranks_[1].kernels = no_memory;
  CreateAndForward();
  const auto create = [this] { return CreateSaved(); };
  ExpectFails(absl::StatusCode::kInvalidArgument,
              "keep_summaries: rank 1 has false, rank 0 has true", create,
              [](Rank& r) { r.save_options.keep_summaries = false; });
  ExpectFails(absl::StatusCode::kResourceExhausted, "rank 1: ", create,
              [&](Rank&) { no_memory->is_out = true; });
}

}  // namespace
}  // namespace nsa
