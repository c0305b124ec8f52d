// The sequences of a problem in pages of the GPU, for tests that decode them. All that kernels have
// not written is NaN.
#ifndef KERNELS_CUDA_DECODE_TESTING_H_
#define KERNELS_CUDA_DECODE_TESTING_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/stages_testing.h"
#include "kernels/kernels.h"
#include "tests/testing/compare.h"

namespace nsa::kernels::cuda {

// What a step gave, by the row of the problem's tokens.
struct DecodeOutputs {
  test::Bytes o, o_cmp, o_slc, o_win;            // [S,Hq,Dv]
  std::vector<float> lse_cmp, lse_slc, lse_win;  // [S,Hq]
  std::vector<int32_t> block_indices;            // [S,Hkv,n]
};

// Device memory that holds a copy of something on the host.
class DeviceCopy {
 public:
  DeviceCopy(Kernels& kernels, int64_t num_bytes, int value) : kernels_(kernels) {
    auto memory = kernels.Allocate(std::max<int64_t>(num_bytes, 1));
    EXPECT_TRUE(memory.ok()) << memory.status();
    memory_ = *std::move(memory);
    bytes_ = test::Bytes(num_bytes, static_cast<test::Bytes::value_type>(value));
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
  test::Bytes& bytes() { return bytes_; }

 private:
  Kernels& kernels_;
  std::unique_ptr<Memory> memory_;
  test::Bytes bytes_;
};

constexpr int kNaN = 0xff;  // of all types, when repeated

// The sequences of a problem, its documents, in pages; and the tensors of a step.
class DecodeCache {
 public:
  // Steps of up to `max_rows` rows. Branches share tables if the problem shares keys.
  DecodeCache(Kernels& kernels, const cpu::StageProblem& problem, int64_t max_rows)
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
    for (const test::Bytes* from :
         {&e.q, &e.k_slc, &e.v_slc, &e.k_win, &e.v_win, &e.k_cmp, &e.v_cmp, &e.gate}) {
      inputs_.push_back({from, static_cast<int64_t>(from->size()) / cu.back(), nullptr});
      inputs_.back().memory =
          std::make_unique<DeviceCopy>(kernels, inputs_.back().row_bytes * max_rows, kNaN);
    }
    o_bytes_ = int64_t{dims_.num_q_heads} * dims_.head_dim_v * 2;
    for (int i = 0; i < 4; ++i) AddOutput(o_bytes_);
    for (int i = 0; i < 3; ++i) AddOutput(int64_t{dims_.num_q_heads} * 4);
    AddOutput(int64_t{dims_.num_kv_heads} * dims_.num_selected_blocks * 4);
    rows_ = std::make_unique<DeviceCopy>(kernels, max_rows * sizeof(DecodeRow), 0);
    auto scratch = kernels.Allocate(kernels.DecodeScratchBytes(dims_, {max_rows, max_tokens_}));
    EXPECT_TRUE(scratch.ok()) << scratch.status();
    scratch_ = *std::move(scratch);
    weights_k_ = Upload(e.compress_k);
    weights_v_ = Upload(e.compress_v);
    results_.o = results_.o_cmp = results_.o_slc = results_.o_win =
        test::Bytes(o_bytes_ * cu.back());
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
      test::Bytes& to = input.memory->bytes();
      std::fill(to.begin(), to.end(), static_cast<test::Bytes::value_type>(kNaN));
      for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].sequence < 0) continue;
        std::memcpy(to.data() + i * input.row_bytes,
                    input.from->data() + Token(rows[i]) * input.row_bytes, input.row_bytes);
      }
      input.memory->Upload();
    }
    for (auto& output : outputs_) {
      std::fill(output->bytes().begin(), output->bytes().end(),
                static_cast<test::Bytes::value_type>(kNaN));
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
      const test::Bytes& from = outputs_[index]->bytes();
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
  std::pair<test::Bytes, test::Bytes> Summaries() {
    Pages& pages = tables_.back();
    pages.memory->Download();
    const int64_t k_bytes = int64_t{dims_.num_kv_heads} * dims_.head_dim_qk * 2;
    const int64_t v_bytes = int64_t{dims_.num_kv_heads} * dims_.head_dim_v * 2;
    test::Bytes kc, vc;
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
  const DecodeOutputs& results() const { return results_; }
  int64_t Token(const DecodeRow& row) const {
    return problem_.inputs.cu_seqlens[row.sequence] + row.position;
  }

 private:
  struct Pages {
    std::vector<int64_t> slots;  // [sequences, max_pages]
    std::unique_ptr<DeviceCopy> memory, table;
  };
  struct Input {
    const test::Bytes* from;
    int64_t row_bytes;
    std::unique_ptr<DeviceCopy> memory;
  };

  // Pages of all sequences, in no order.
  Pages MakePages(int64_t max_pages, int64_t page_bytes) {
    const int64_t count = num_sequences_ * max_pages;
    Pages pages;
    pages.memory = std::make_unique<DeviceCopy>(kernels_, count * page_bytes, kNaN);
    pages.table = std::make_unique<DeviceCopy>(kernels_, count * sizeof(void*), 0);
    for (int64_t i = 0; i < count; ++i) {
      pages.slots.push_back(count - 1 - i);
      char* const address = pages.memory->as<char>() + pages.slots.back() * page_bytes;
      std::memcpy(pages.table->bytes().data() + i * sizeof(void*), &address, sizeof(void*));
    }
    pages.table->Upload();
    return pages;
  }

  void AddOutput(int64_t row_bytes) {
    outputs_.push_back(std::make_unique<DeviceCopy>(kernels_, row_bytes * max_rows_, kNaN));
  }

  CompressorWeights Upload(const test::EncodedParameters& parameters) {
    CompressorWeights weights = parameters.view();
    const auto upload = [&](const test::Bytes& from) -> const void* {
      if (from.empty()) return nullptr;
      parameters_.push_back(std::make_unique<DeviceCopy>(kernels_, from.size(), 0));
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
  const cpu::StageProblem& problem_;
  const AttentionDims dims_;
  const int64_t max_rows_;
  int64_t num_sequences_ = 0, max_tokens_ = 1, max_pages_ = 0, max_summary_pages_ = 0;
  int64_t page_bytes_ = 0, summary_page_bytes_ = 0, o_bytes_ = 0;
  std::vector<Pages> tables_;                         // slc, win, cmp, or one for all; summaries
  std::vector<Input> inputs_;                         // q, k and v of slc, win, cmp, gate
  std::vector<std::unique_ptr<DeviceCopy>> outputs_;  // o, cmp, slc, win; three lse; block indices
  std::vector<std::unique_ptr<DeviceCopy>> parameters_;
  std::unique_ptr<DeviceCopy> rows_;
  std::unique_ptr<Memory> scratch_;
  CompressorWeights weights_k_, weights_v_;
  std::vector<DecodeRow> step_;
  DecodeOutputs results_;
};

}  // namespace nsa::kernels::cuda

#endif  // KERNELS_CUDA_DECODE_TESTING_H_
