// Decoding on the GPU, a step at a time: against the fp64 reference's forward of the whole
// sequence, and against itself in other batches. All that kernels have not written is NaN.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/stages_testing.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/gpu_testing.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cuda {
namespace {

using cpu::MakeStageProblem;
using cpu::SmallConfig;
using cpu::StageProblem;
using reference::CompressorKind;
using reference::ReferenceConfig;
using test::Bytes;

// What a step gave, by the row of the problem's tokens.
struct Outputs {
  Bytes o, o_cmp, o_slc, o_win;                  // [S,Hq,Dv]
  std::vector<float> lse_cmp, lse_slc, lse_win;  // [S,Hq]
  std::vector<int32_t> block_indices;            // [S,Hkv,n]
};

// Device memory that holds a copy of something on the host.
class Mirror {
 public:
  Mirror(Kernels& kernels, int64_t num_bytes, int value) : kernels_(kernels) {
    auto memory = kernels.Allocate(std::max<int64_t>(num_bytes, 1));
    EXPECT_TRUE(memory.ok()) << memory.status();
    memory_ = *std::move(memory);
    bytes_ = Bytes(num_bytes, static_cast<Bytes::value_type>(value));
    Upload();
  }
  void Upload() {
    EXPECT_EQ(kernels_.CopyFromHost(data(), bytes_.data(), bytes_.size(), nullptr),
              absl::OkStatus());
    EXPECT_EQ(kernels_.Synchronize(nullptr), absl::OkStatus());
  }
  void Download() {
    EXPECT_EQ(kernels_.CopyToHost(bytes_.data(), data(), bytes_.size(), nullptr), absl::OkStatus());
    EXPECT_EQ(kernels_.Synchronize(nullptr), absl::OkStatus());
  }
  void* data() { return memory_->data(); }
  template <class T>
  T* as() {
    return static_cast<T*>(data());
  }
  Bytes& bytes() { return bytes_; }

 private:
  Kernels& kernels_;
  std::unique_ptr<Memory> memory_;
  Bytes bytes_;
};

constexpr int kNaN = 0xff;  // of all types, when repeated

// The sequences of a problem, its documents, in pages; and the tensors of a step.
class Cache {
 public:
  // Steps of up to `max_rows` rows. Branches share tables if the problem shares keys.
  Cache(Kernels& kernels, const StageProblem& problem, int64_t max_rows)
      : kernels_(kernels), problem_(problem), dims_(problem.dims), max_rows_(max_rows) {
    const std::vector<int64_t>& cu = problem.inputs.cu_seqlens;
    num_sequences_ = static_cast<int64_t>(cu.size()) - 1;
    for (int64_t s = 0; s < num_sequences_; ++s) {
      max_tokens_ = std::max(max_tokens_, cu[s + 1] - cu[s]);
    }
    max_pages_ = max_tokens_ / dims_.select_block_tokens + 1;
    max_summary_pages_ = max_tokens_ / dims_.compress_stride_tokens / kSummaryPageBlocks + 1;
    page_bytes_ = kernels.RecordBytes(dims_) * dims_.num_kv_heads;
    const int64_t row_bytes =
        int64_t{dims_.num_kv_heads} * (dims_.head_dim_qk + dims_.head_dim_v) * 2;
    summary_page_bytes_ = row_bytes * kSummaryPageBlocks;
    const int num_tables = problem.options.share_keys ? 1 : 3;
    for (int i = 0; i < num_tables; ++i) tables_.push_back(MakePages(max_pages_, page_bytes_));
    tables_.push_back(MakePages(max_summary_pages_, summary_page_bytes_));

    const auto& e = problem.encoded;
    for (const Bytes* from :
         {&e.q, &e.k_slc, &e.v_slc, &e.k_win, &e.v_win, &e.k_cmp, &e.v_cmp, &e.gate}) {
      inputs_.push_back({from, static_cast<int64_t>(from->size()) / cu.back(), nullptr});
      inputs_.back().memory =
          std::make_unique<Mirror>(kernels, inputs_.back().row_bytes * max_rows, kNaN);
    }
    o_bytes_ = int64_t{dims_.num_q_heads} * dims_.head_dim_v * 2;
    for (int i = 0; i < 4; ++i) AddOutput(o_bytes_);
    for (int i = 0; i < 3; ++i) AddOutput(int64_t{dims_.num_q_heads} * 4);
    AddOutput(int64_t{dims_.num_kv_heads} * dims_.num_selected_blocks * 4);
    rows_ = std::make_unique<Mirror>(kernels, max_rows * sizeof(DecodeRow), 0);
    auto scratch = kernels.Allocate(kernels.DecodeScratchBytes(dims_, {max_rows, max_tokens_}));
    EXPECT_TRUE(scratch.ok()) << scratch.status();
    scratch_ = *std::move(scratch);
    weights_k_ = Upload(e.compress_k);
    weights_v_ = Upload(e.compress_v);
    results_.o = results_.o_cmp = results_.o_slc = results_.o_win = Bytes(o_bytes_ * cu.back());
    results_.lse_cmp = results_.lse_slc = results_.lse_win =
        std::vector<float>(dims_.num_q_heads * cu.back());
    results_.block_indices =
        std::vector<int32_t>(int64_t{dims_.num_kv_heads} * dims_.num_selected_blocks * cu.back());
  }

  // Prepares a step of these rows.
  void SetRows(const std::vector<DecodeRow>& rows) {
    step_ = rows;
    std::memcpy(rows_->bytes().data(), rows.data(), rows.size() * sizeof(DecodeRow));
    rows_->Upload();
    for (Input& input : inputs_) {
      Bytes& to = input.memory->bytes();
      std::fill(to.begin(), to.end(), static_cast<Bytes::value_type>(kNaN));
      for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].sequence < 0) continue;
        std::memcpy(to.data() + i * input.row_bytes,
                    input.from->data() + Token(rows[i]) * input.row_bytes, input.row_bytes);
      }
      input.memory->Upload();
    }
    for (auto& output : outputs_) {
      std::fill(output->bytes().begin(), output->bytes().end(),
                static_cast<Bytes::value_type>(kNaN));
      output->Upload();
    }
  }

  absl::Status Append(int64_t num_rows, void* stream = nullptr) {
    AppendTokensParams p{};
    p.dims = dims_;
    p.rows = rows_->as<DecodeRow>();
    p.num_rows = num_rows;
    p.tables = Tables();
    p.slc = {Input3(1, dims_.head_dim_qk), Input3(2, dims_.head_dim_v)};
    p.win = {Input3(3, dims_.head_dim_qk), Input3(4, dims_.head_dim_v)};
    p.cmp = {Input3(5, dims_.head_dim_qk), Input3(6, dims_.head_dim_v)};
    p.compresses = true;
    p.compressor = test::MakeCompressor(problem_.config.compressor);
    p.weights_k = weights_k_;
    p.weights_v = weights_v_;
    return kernels_.AppendTokens(p, stream);
  }

  absl::Status Attend(int64_t num_rows, void* stream = nullptr) {
    DecodeSelectParams s{};
    s.dims = dims_;
    s.rows = rows_->as<DecodeRow>();
    s.num_rows = num_rows;
    s.max_tokens = max_tokens_;
    s.tables = Tables();
    s.q = {inputs_[0].memory->data(), int64_t{dims_.num_q_heads} * dims_.head_dim_qk,
           dims_.head_dim_qk};
    s.block_indices = outputs_[7]->as<int32_t>();
    s.o_cmp = Output3(1);
    s.lse_cmp = outputs_[4]->as<float>();
    s.scratch = scratch_->data();
    const absl::Status status = kernels_.DecodeSelect(s, stream);
    if (!status.ok()) return status;
    DecodeAttendParams a{};
    a.dims = dims_;
    a.rows = s.rows;
    a.num_rows = num_rows;
    a.max_tokens = max_tokens_;
    a.tables = s.tables;
    a.q = s.q;
    a.block_indices = s.block_indices;
    a.gate = inputs_[7].memory->data();
    a.gate_dtype = problem_.options.gate_dtype;
    a.gate_row_stride = int64_t{dims_.num_q_heads} * 3;
    a.gate_head_stride = 3;
    a.o = Output3(0);
    a.o_slc = Output3(2);
    a.o_win = Output3(3);
    a.lse_slc = outputs_[5]->as<float>();
    a.lse_win = outputs_[6]->as<float>();
    a.scratch = s.scratch;
    return kernels_.DecodeAttend(a, stream);
  }

  // Takes the step's outputs to results(). Rows without a token must not have been written.
  void Collect() {
    for (auto& output : outputs_) output->Download();
    const auto& cu = problem_.inputs.cu_seqlens;
    const auto take = [&](int index, void* to) {
      const Bytes& from = outputs_[index]->bytes();
      const int64_t row_bytes = static_cast<int64_t>(from.size()) / max_rows_;
      for (int64_t i = 0; i < max_rows_; ++i) {
        const auto* const begin = from.data() + i * row_bytes;
        if (i < static_cast<int64_t>(step_.size()) && step_[i].sequence >= 0) {
          std::memcpy(static_cast<char*>(to) + Token(step_[i]) * row_bytes, begin, row_bytes);
        } else {
          EXPECT_TRUE(std::all_of(begin, begin + row_bytes,
                                  [](auto byte) { return static_cast<uint8_t>(byte) == kNaN; }))
              << "output " << index << " of row " << i << ", which has no token, is written";
        }
      }
    };
    ASSERT_FALSE(cu.empty());
    take(0, results_.o.data());
    take(1, results_.o_cmp.data());
    take(2, results_.o_slc.data());
    take(3, results_.o_win.data());
    take(4, results_.lse_cmp.data());
    take(5, results_.lse_slc.data());
    take(6, results_.lse_win.data());
    take(7, results_.block_indices.data());
  }

  // Appends and attends.
  void Step(const std::vector<DecodeRow>& rows) {
    SetRows(rows);
    ASSERT_EQ(Append(rows.size()), absl::OkStatus());
    ASSERT_EQ(Attend(rows.size()), absl::OkStatus());
    Collect();
  }

  // Appends tokens [0, num_tokens) of each sequence in steps of max_rows.
  void Prefill(const std::vector<int64_t>& num_tokens) {
    std::vector<DecodeRow> rows;
    for (int32_t s = 0; s < static_cast<int32_t>(num_tokens.size()); ++s) {
      for (int64_t t = 0; t < num_tokens[s]; ++t) rows.push_back({s, t});
    }
    for (size_t begin = 0; begin < rows.size(); begin += max_rows_) {
      const size_t end = std::min(rows.size(), begin + max_rows_);
      SetRows({rows.begin() + begin, rows.begin() + end});
      ASSERT_EQ(Append(end - begin), absl::OkStatus());
    }
  }

  // Summaries of all sequences as the kernels have them, [N,Hkv,D] in the reference's order.
  std::pair<Bytes, Bytes> Summaries() {
    Pages& pages = tables_.back();
    pages.memory->Download();
    const int64_t k_bytes = int64_t{dims_.num_kv_heads} * dims_.head_dim_qk * 2;
    const int64_t v_bytes = int64_t{dims_.num_kv_heads} * dims_.head_dim_v * 2;
    Bytes kc, vc;
    for (const Document& document : problem_.documents) {
      const int64_t sequence = &document - problem_.documents.data();
      for (int64_t i = 0; i < document.num_cmp_blocks; ++i) {
        const int64_t page = pages.slots[sequence * max_summary_pages_ + i / kSummaryPageBlocks];
        const auto row = pages.memory->bytes().begin() + page * summary_page_bytes_ +
                         i % kSummaryPageBlocks * (k_bytes + v_bytes);
        kc.insert(kc.end(), row, row + k_bytes);
        vc.insert(vc.end(), row + k_bytes, row + k_bytes + v_bytes);
      }
    }
    return {kc, vc};
  }

  int64_t num_sequences() const { return num_sequences_; }
  const Outputs& results() const { return results_; }
  int64_t Token(const DecodeRow& row) const {
    return problem_.inputs.cu_seqlens[row.sequence] + row.position;
  }

 private:
  struct Pages {
    std::vector<int64_t> slots;  // [sequences, max_pages]
    std::unique_ptr<Mirror> memory, table;
  };
  struct Input {
    const Bytes* from;
    int64_t row_bytes;
    std::unique_ptr<Mirror> memory;
  };

  // Pages of all sequences, in no order.
  Pages MakePages(int64_t max_pages, int64_t page_bytes) {
    const int64_t count = num_sequences_ * max_pages;
    Pages pages;
    pages.memory = std::make_unique<Mirror>(kernels_, count * page_bytes, kNaN);
    pages.table = std::make_unique<Mirror>(kernels_, count * sizeof(void*), 0);
    for (int64_t i = 0; i < count; ++i) {
      pages.slots.push_back(count - 1 - i);
      char* const address = pages.memory->as<char>() + pages.slots.back() * page_bytes;
      std::memcpy(pages.table->bytes().data() + i * sizeof(void*), &address, sizeof(void*));
    }
    pages.table->Upload();
    return pages;
  }

  void AddOutput(int64_t row_bytes) {
    outputs_.push_back(std::make_unique<Mirror>(kernels_, row_bytes * max_rows_, kNaN));
  }

  CompressorWeights Upload(const test::EncodedParameters& parameters) {
    CompressorWeights weights = parameters.view();
    const auto upload = [&](const Bytes& from) -> const void* {
      if (from.empty()) return nullptr;
      parameters_.push_back(std::make_unique<Mirror>(kernels_, from.size(), 0));
      parameters_.back()->bytes() = from;
      parameters_.back()->Upload();
      return parameters_.back()->data();
    };
    weights.weight = upload(parameters.weight);
    weights.pe = upload(parameters.pe);
    weights.w = upload(parameters.w);
    weights.w1 = upload(parameters.w1);
    weights.b1 = upload(parameters.b1);
    weights.w2 = upload(parameters.w2);
    weights.b2 = upload(parameters.b2);
    return weights;
  }

  PageTables Tables() {
    const size_t last = tables_.size() - 2;
    return {tables_[0].table->as<void*>(),
            tables_[std::min<size_t>(1, last)].table->as<void*>(),
            tables_[last].table->as<void*>(),
            tables_.back().table->as<void*>(),
            max_pages_,
            max_summary_pages_};
  }
  ConstTensor3 Input3(int index, int64_t head_dim) {
    return {inputs_[index].memory->data(), dims_.num_kv_heads * head_dim, head_dim};
  }
  Tensor3 Output3(int index) {
    return {outputs_[index]->data(), int64_t{dims_.num_q_heads} * dims_.head_dim_v,
            dims_.head_dim_v};
  }

  Kernels& kernels_;
  const StageProblem& problem_;
  const AttentionDims dims_;
  const int64_t max_rows_;
  int64_t num_sequences_ = 0, max_tokens_ = 1, max_pages_ = 0, max_summary_pages_ = 0;
  int64_t page_bytes_ = 0, summary_page_bytes_ = 0, o_bytes_ = 0;
  std::vector<Pages> tables_;                     // slc, win, cmp, or one for all; summaries
  std::vector<Input> inputs_;                     // q, k and v of slc, win, cmp, gate
  std::vector<std::unique_ptr<Mirror>> outputs_;  // o, cmp, slc, win; three lse; block indices
  std::vector<std::unique_ptr<Mirror>> parameters_;
  std::unique_ptr<Mirror> rows_;
  std::unique_ptr<Memory> scratch_;
  CompressorWeights weights_k_, weights_v_;
  std::vector<DecodeRow> step_;
  Outputs results_;
};

// Steps over the last `num_decoded` tokens of each sequence.
struct Schedule {
  int64_t num_decoded = 3;
  int64_t new_tokens = 1;        // of a sequence in a step
  bool with_empty_rows = false;  // between sequences
  bool one_sequence_a_step = false;
};

class DecodeTest : public ::testing::TestWithParam<CudaPath> {
 protected:
  void SetUp() override {
    NSA_SKIP_WITHOUT_GPU();
    auto kernels = CudaKernels::Create({.path = GetParam()});
    ASSERT_TRUE(kernels.ok()) << kernels.status();
    kernels_ = *std::move(kernels);
  }

  static std::vector<std::vector<DecodeRow>> Steps(const StageProblem& problem,
                                                   const Schedule& schedule,
                                                   std::vector<int64_t>& prefill) {
    const auto& cu = problem.inputs.cu_seqlens;
    std::vector<std::vector<DecodeRow>> steps;
    const auto num_sequences = static_cast<int32_t>(cu.size()) - 1;
    for (int32_t s = 0; s < num_sequences; ++s) {
      prefill.push_back(std::max<int64_t>(0, cu[s + 1] - cu[s] - schedule.num_decoded));
    }
    for (int64_t begin = 0; begin < schedule.num_decoded; begin += schedule.new_tokens) {
      std::vector<DecodeRow> rows;
      for (int32_t s = 0; s < num_sequences; ++s) {
        const int64_t length = cu[s + 1] - cu[s];
        for (int64_t i = 0; i < schedule.new_tokens; ++i) {
          const int64_t position = prefill[s] + begin + i;
          if (position < length) rows.push_back({s, position});
        }
        if (schedule.with_empty_rows) rows.push_back({-1, 0});
        if (schedule.one_sequence_a_step && !rows.empty()) {
          steps.push_back(std::move(rows));
          rows.clear();
        }
      }
      if (!rows.empty()) steps.push_back(rows);
    }
    return steps;
  }

  Outputs Run(const StageProblem& problem, const Schedule& schedule,
              std::pair<Bytes, Bytes>* summaries = nullptr) {
    std::vector<int64_t> prefill;
    const auto steps = Steps(problem, schedule, prefill);
    size_t max_rows = 64;
    for (const auto& step : steps) max_rows = std::max(max_rows, step.size());
    Cache cache(*kernels_, problem, max_rows);
    cache.Prefill(prefill);
    for (const auto& step : steps) cache.Step(step);
    if (summaries != nullptr) *summaries = cache.Summaries();
    return cache.results();
  }

  void ExpectAgreement(const StageProblem& problem, const Schedule& schedule = {}) {
    SCOPED_TRACE(test::Describe(problem.config));
    ASSERT_EQ(kernels_->Supports(problem.dims), absl::OkStatus());
    std::pair<Bytes, Bytes> summaries;
    const Outputs out = Run(problem, schedule, &summaries);
    if (HasFailure()) return;
    const DType dtype = problem.options.dtype;
    const int64_t dk = problem.config.head_dim_qk, dv = problem.config.head_dim_v;
    const double tolerance = test::DefaultTolerance(dtype);
    const std::vector<int64_t>& cu = problem.inputs.cu_seqlens;
    std::vector<int64_t> tokens, prefill;
    for (const auto& step : Steps(problem, schedule, prefill)) {
      for (const DecodeRow& row : step) {
        if (row.sequence >= 0) tokens.push_back(cu[row.sequence] + row.position);
      }
    }

    // What the summaries and the selection feed is compared on the kernels' own ones.
    reference::ReferenceOptions options;
    const std::vector<double> kc = test::Decode(dtype, summaries.first);
    const std::vector<double> vc = test::Decode(dtype, summaries.second);
    options.given_kc = &kc;
    options.given_vc = &vc;
    options.given_block_indices = &out.block_indices;
    options.query_tokens = &tokens;
    options.num_threads = static_cast<int>(std::thread::hardware_concurrency());
    const auto expected = reference::Forward(problem.config, problem.inputs, options);
    ASSERT_TRUE(expected.ok()) << expected.status();
    const auto expect_summaries = [&](const char* name, const auto& parameters, const auto& x,
                                      int64_t dim, const std::vector<double>& actual) {
      EXPECT_TRUE(test::Close(name, reference::Compress(problem.config, parameters, cu, x, dim),
                              actual, dim, tolerance));
    };
    expect_summaries("kc", problem.inputs.compress_k, problem.inputs.k_cmp, dk, kc);
    expect_summaries("vc", problem.inputs.compress_v, problem.inputs.v_cmp, dv, vc);
    // Of the tokens alone.
    const auto pick = [&](const auto& all, int64_t row_size) {
      std::vector<double> picked;
      for (int64_t token : tokens) {
        picked.insert(picked.end(), all.begin() + token * row_size,
                      all.begin() + (token + 1) * row_size);
      }
      return picked;
    };
    const int64_t heads = problem.config.num_q_heads;
    const auto expect_rows = [&](const char* name, const std::vector<double>& wanted,
                                 const Bytes& actual) {
      EXPECT_TRUE(test::Close(name, pick(wanted, heads * dv),
                              pick(test::Decode(dtype, actual), heads * dv), dv, tolerance));
    };
    const auto expect_lse = [&](const char* name, const std::vector<double>& wanted,
                                const std::vector<float>& actual) {
      EXPECT_TRUE(test::CloseElements(name, pick(wanted, heads), pick(actual, heads), 1e-5, 2e-6));
    };
    expect_rows("o_cmp", expected->o_cmp, out.o_cmp);
    expect_rows("o_slc", expected->o_slc, out.o_slc);
    expect_rows("o_win", expected->o_win, out.o_win);
    expect_rows("o", expected->o, out.o);
    expect_lse("lse_cmp", expected->lse_cmp, out.lse_cmp);
    expect_lse("lse_slc", expected->lse_slc, out.lse_slc);
    expect_lse("lse_win", expected->lse_win, out.lse_win);
    EXPECT_TRUE(test::SelectionAgrees(problem.config, cu, *expected, out.block_indices,
                                      {.query_tokens = &tokens}));
  }

  static void ExpectSameBits(const Outputs& expected, const Outputs& actual) {
    EXPECT_EQ(expected.o, actual.o);
    EXPECT_EQ(expected.o_cmp, actual.o_cmp);
    EXPECT_EQ(expected.o_slc, actual.o_slc);
    EXPECT_EQ(expected.o_win, actual.o_win);
    EXPECT_EQ(expected.lse_cmp, actual.lse_cmp);
    EXPECT_EQ(expected.lse_slc, actual.lse_slc);
    EXPECT_EQ(expected.lse_win, actual.lse_win);
    EXPECT_EQ(expected.block_indices, actual.block_indices);
  }

  std::unique_ptr<Kernels> kernels_;
};

INSTANTIATE_TEST_SUITE_P(Paths, DecodeTest, ::testing::Values(CudaPath::kAuto, CudaPath::kPortable),
                         NameOfPath);

TEST_P(DecodeTest, StorageTypes) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (DType gate_dtype : {DType::kF32, dtype}) {
      for (bool share_keys : {false, true}) {
        ExpectAgreement(MakeStageProblem(
            SmallConfig(), {0, 701},
            {.dtype = dtype, .gate_dtype = gate_dtype, .share_keys = share_keys}, 1));
      }
    }
  }
}

TEST_P(DecodeTest, GroupSizes) {
  for (int64_t group_size : {1, 3, 16, 24, 64, 130}) {
    ReferenceConfig config = SmallConfig();
    config.num_kv_heads = group_size > 16 ? 1 : 2;
    config.num_q_heads = config.num_kv_heads * group_size;
    ExpectAgreement(MakeStageProblem(config, {0, 900}, {.dtype = DType::kBF16}, 2));
  }
}

TEST_P(DecodeTest, HeadDims) {
  for (int64_t dk : {64, 128, 192, 256}) {
    for (int64_t dv : {64, 128, 192, 256}) {
      ReferenceConfig config = SmallConfig();
      config.head_dim_qk = dk;
      config.head_dim_v = dv;
      ExpectAgreement(MakeStageProblem(config, {0, 433}, {.dtype = DType::kF16}, 3));
    }
  }
}

TEST_P(DecodeTest, BlockSizes) {
  for (const ReferenceConfig& config : cpu::ConfigsOfBlockSizes()) {
    ExpectAgreement(MakeStageProblem(config, {0, 2611}, {.dtype = DType::kBF16}, 4),
                    {.num_decoded = 40, .new_tokens = 13});
  }
}

// Every token is decoded, from the first on; and rows without a token lie between.
TEST_P(DecodeTest, SequencesOfAnyLength) {
  ExpectAgreement(
      MakeStageProblem(SmallConfig(), {0, 1, 3, 34, 66, 163, 288}, {.dtype = DType::kBF16}, 5),
      {.num_decoded = 125, .new_tokens = 1, .with_empty_rows = true});
  ExpectAgreement(MakeStageProblem(SmallConfig(), {0, 100, 300, 2300}, {.dtype = DType::kF16}, 6),
                  {.num_decoded = 128, .new_tokens = 64, .with_empty_rows = true});
}

TEST_P(DecodeTest, WindowSizes) {
  for (const ReferenceConfig& config : cpu::ConfigsOfWindows()) {
    ExpectAgreement(MakeStageProblem(config, {0, 300, 500}, {.dtype = DType::kF16}, 7));
  }
}

TEST_P(DecodeTest, NumbersOfBlocks) {
  for (const ReferenceConfig& config : cpu::ConfigsOfBlockNumbers()) {
    ExpectAgreement(MakeStageProblem(config, {0, 900, 5300}, {.dtype = DType::kF16}, 8));
  }
}

// Several tiles a part, and scores that do not fit into shared memory.
TEST_P(DecodeTest, LongSequences) {
  ReferenceConfig config = SmallConfig();
  config.num_kv_heads = 1;
  config.compress_block_tokens = config.compress_stride_tokens = 16;
  config.select_block_tokens = 16;
  config.num_selected_blocks = 40;
  config.window_tokens = 9000;
  ExpectAgreement(MakeStageProblem(config, {0, 150003}, {.dtype = DType::kBF16}, 9));
}

TEST_P(DecodeTest, Compressors) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kWeighted,
                              CompressorKind::kLinear, CompressorKind::kMlp}) {
    for (bool per_head : {false, true}) {
      ReferenceConfig config = SmallConfig();
      config.head_dim_v = 128;
      config.compressor = kind;
      for (DType parameters : {DType::kF32, DType::kBF16, DType::kF16}) {
        ExpectAgreement(MakeStageProblem(config, {0, 300, 310, 700},
                                         {.dtype = DType::kF16,
                                          .parameter_dtype = parameters,
                                          .parameters_per_head = per_head,
                                          .hidden_width = 290},
                                         10),
                        {.num_decoded = 40, .new_tokens = 20});
      }
      ExpectAgreement(MakeStageProblem(config, {0, 300, 310, 400},
                                       {.dtype = DType::kBF16,
                                        .parameters_per_head = per_head,
                                        .with_pe = false,
                                        .hidden_width = 7},
                                       11));
    }
  }
}

TEST_P(DecodeTest, ExtremeLogits) {
  for (double scale : {100.0, 1000.0}) {
    const Outputs out = Run(MakeStageProblem(SmallConfig(), {0, 600},
                                             {.dtype = DType::kBF16, .logit_scale = scale}, 12),
                            {});
    for (const Bytes* o : {&out.o, &out.o_cmp, &out.o_slc, &out.o_win}) {
      for (double x : test::Decode(DType::kBF16, *o)) ASSERT_TRUE(std::isfinite(x));
    }
  }
  ExpectAgreement(
      MakeStageProblem(SmallConfig(), {0, 600}, {.dtype = DType::kBF16, .logit_scale = 1e-30}, 13));
}

TEST_P(DecodeTest, RandomConfigurations) {
  test::Random random(14);
  for (int i = 0; i < 30; ++i) {
    SCOPED_TRACE(i);
    const ReferenceConfig config = test::RandomConfig({.max_head_dim = 256}, &random);
    const auto cu_seqlens = test::RandomDocuments(config, random.Int(1, 1500), 5, &random);
    const test::InputOptions options{.dtype = random.Pick({DType::kBF16, DType::kF16}),
                                     .parameter_dtype = random.Pick({DType::kF32, DType::kBF16}),
                                     .parameters_per_head = random.OneIn(2)};
    ExpectAgreement(MakeStageProblem(config, cu_seqlens, options, random.Next()),
                    {.num_decoded = random.Int(1, 40),
                     .new_tokens = random.Int(1, 20),
                     .with_empty_rows = random.OneIn(2)});
  }
}

// Nothing of the batch shows in a single bit.
TEST_P(DecodeTest, BatchesGiveTheSameBits) {
  for (CompressorKind kind : {CompressorKind::kMean, CompressorKind::kMlp}) {
    ReferenceConfig config = SmallConfig();
    config.compressor = kind;
    const StageProblem problem =
        MakeStageProblem(config, {0, 40, 311, 4771}, {.dtype = DType::kBF16}, 15);
    const Outputs expected = Run(problem, {.num_decoded = 36, .one_sequence_a_step = true});
    ExpectSameBits(expected, Run(problem, {.num_decoded = 36}));
    ExpectSameBits(expected, Run(problem, {.num_decoded = 36, .new_tokens = 12}));
    ExpectSameBits(expected,
                   Run(problem, {.num_decoded = 36, .new_tokens = 36, .with_empty_rows = true}));
  }
}

// One graph serves steps of other lengths and of fewer rows.
TEST_P(DecodeTest, GraphServesLaterSteps) {
  ReferenceConfig config = SmallConfig();
  config.num_q_heads = 32;
  const StageProblem problem =
      MakeStageProblem(config, {0, 200, 3200, 3900}, {.dtype = DType::kBF16}, 16);
  const Schedule schedule{.num_decoded = 70, .with_empty_rows = true};
  const Outputs expected = Run(problem, schedule);
  std::vector<int64_t> prefill;
  const auto steps = Steps(problem, schedule, prefill);
  Cache cache(*kernels_, problem, 64);
  cache.Prefill(prefill);

  const int64_t num_rows = 6;
  auto stream = kernels_->CreateStream();
  ASSERT_TRUE(stream.ok());
  auto* const cuda_stream = static_cast<cudaStream_t>((*stream)->get());
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_EQ(cache.Append(num_rows, cuda_stream), absl::OkStatus());
  ASSERT_EQ(cache.Attend(num_rows, cuda_stream), absl::OkStatus());
  ASSERT_EQ(cudaStreamEndCapture(cuda_stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  for (std::vector<DecodeRow> rows : steps) {
    rows.resize(num_rows, {-1, 0});
    cache.SetRows(rows);
    ASSERT_EQ(cudaGraphLaunch(exec, cuda_stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(cuda_stream), cudaSuccess);
    cache.Collect();
  }
  ExpectSameBits(expected, cache.results());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
}

TEST_P(DecodeTest, CopiesPieces) {
  test::Random random(17);
  for (int64_t num_bytes : {16, 48, 16384, 1 << 20}) {
    constexpr int64_t kCount = 5;
    Mirror from(*kernels_, kCount * num_bytes, 0), to(*kernels_, kCount * num_bytes, kNaN);
    for (auto& byte : from.bytes()) byte = static_cast<Bytes::value_type>(random.Next());
    from.Upload();
    Mirror src(*kernels_, kCount * sizeof(void*), 0), dst(*kernels_, kCount * sizeof(void*), 0);
    for (int64_t i = 0; i < kCount; ++i) {
      const char* const a = from.as<char>() + i * num_bytes;
      const char* const b = to.as<char>() + (kCount - 1 - i) * num_bytes;
      std::memcpy(src.bytes().data() + i * sizeof(a), &a, sizeof(a));
      std::memcpy(dst.bytes().data() + i * sizeof(b), &b, sizeof(b));
    }
    src.Upload();
    dst.Upload();
    ASSERT_EQ(
        kernels_->CopyPieces({src.as<const void*>(), dst.as<void*>(), kCount, num_bytes}, nullptr),
        absl::OkStatus());
    to.Download();
    for (int64_t i = 0; i < kCount; ++i) {
      EXPECT_TRUE(std::equal(from.bytes().begin() + i * num_bytes,
                             from.bytes().begin() + (i + 1) * num_bytes,
                             to.bytes().begin() + (kCount - 1 - i) * num_bytes));
    }
  }
}

}  // namespace
}  // namespace nsa::kernels::cuda
