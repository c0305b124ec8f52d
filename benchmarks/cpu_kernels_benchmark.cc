// Each stage of the CPU kernels on one document, without ranks.
//
//   bazel run -c opt //benchmarks:cpu_kernels_benchmark -- --benchmark_filter=bf16
//
// Arguments of a benchmark: tokens, storage type, threads; of decoding also the sequences that take
// one token each in a step, with so many tokens cached of each. `flops` counts two a multiply-add
// of the attended (query, key) pairs, in keys and in values; softmax and selection are not counted.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "benchmark/benchmark.h"
#include "kernels/cpu/cpu_kernels.h"
#include "kernels/kernels.h"

namespace nsa::kernels {
namespace {

AttentionDims DemoDims(DType dtype) {
  AttentionDims dims;
  dims.dtype = dtype;
  dims.num_q_heads = 8;
  dims.num_kv_heads = 2;
  dims.head_dim_qk = 64;
  dims.head_dim_v = 64;
  dims.compress_block_tokens = 32;
  dims.compress_stride_tokens = 16;
  dims.select_block_tokens = 64;
  dims.num_selected_blocks = 16;
  dims.num_initial_blocks = 1;
  dims.num_local_blocks = 2;
  dims.window_tokens = 512;
  dims.softmax_scale = 0.125f;
  return dims;
}

void Check(const absl::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "%s\n", status.ToString().c_str());
}

// A dense tensor [rows,heads,dim] in memory of the kernels.
struct Array {
  Array(Kernels& kernels, int64_t num_bytes) : memory(*kernels.Allocate(num_bytes)) {}
  void* data() const { return memory->data(); }
  template <class T>
  T* as() const {
    return static_cast<T*>(memory->data());
  }
  std::unique_ptr<Memory> memory;
};

// Values of about unit variance: bits of the type itself, so that no conversion is needed here.
void FillRandom(DType dtype, void* data, int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    if (dtype == DType::kF32) {
      static_cast<float*>(data)[i] = value;
    } else if (dtype == DType::kBF16) {
      static_cast<uint16_t*>(data)[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
    } else {
      // Sign, an exponent from 2^-3 to 2^0, and a mantissa.
      const uint32_t bits = random();
      static_cast<uint16_t*>(data)[i] =
          static_cast<uint16_t>((bits & 0x83ff) | (((bits >> 16) % 4 + 12) << 10));
    }
  }
}

// A document whose stages have all run once, each on the results of those before.
class Forward {
 public:
  explicit Forward(const benchmark::State& state)
      : num_tokens_(state.range(0)),
        dims_(DemoDims(static_cast<DType>(state.range(1)))),
        kernels_(*CpuKernels::Create({.num_threads = static_cast<int>(state.range(2))})),
        element_bytes_(SizeOf(dims_.dtype)),
        num_cmp_blocks_((num_tokens_ - dims_.compress_block_tokens) / dims_.compress_stride_tokens +
                        1),
        num_slc_blocks_((num_tokens_ + dims_.select_block_tokens - 1) / dims_.select_block_tokens),
        document_{.token_begin = 0,
                  .num_tokens = num_tokens_,
                  .cmp_block_begin = 0,
                  .num_cmp_blocks = num_cmp_blocks_,
                  .slc_block_begin = 0,
                  .num_slc_blocks = num_slc_blocks_},
        segment_{.row = 0, .num_tokens = num_tokens_, .position = 0, .document = 0, .is_halo = 0},
        cmp_run_{0, 0, num_cmp_blocks_},
        slc_run_{0, 0, num_slc_blocks_},
        q_(Random(num_tokens_ * q_row(), 1)),
        k_(Random(num_tokens_ * kv_row(), 2)),
        v_(Random(num_tokens_ * kv_row(), 3)),
        kc_(*kernels_, num_cmp_blocks_ * kv_row() * element_bytes_),
        vc_(*kernels_, num_cmp_blocks_ * kv_row() * element_bytes_),
        o_cmp_(*kernels_, num_tokens_ * q_row() * element_bytes_),
        o_win_(*kernels_, num_tokens_ * q_row() * element_bytes_),
        o_(*kernels_, num_tokens_ * q_row() * element_bytes_),
        gate_(*kernels_, num_tokens_ * dims_.num_q_heads * 3 * int64_t{sizeof(float)}),
        indices_(*kernels_, num_tokens_ * dims_.num_kv_heads * dims_.num_selected_blocks *
                                int64_t{sizeof(int32_t)}),
        records_(*kernels_, num_slc_blocks_ * dims_.num_kv_heads * kernels_->RecordBytes(dims_)),
        locations_(num_slc_blocks_ * dims_.num_kv_heads),
        owner_(num_slc_blocks_, 0),
        ordinal_(num_slc_blocks_),
        peers_(locations_.size()),
        offsets_(locations_.size()) {
    std::fill_n(gate_.as<float>(), num_tokens_ * dims_.num_q_heads * 3, 0.5f);
    for (int64_t i = 0; i < num_slc_blocks_; ++i) ordinal_[i] = static_cast<int32_t>(i);
    Compress();
    Pack();
    Window();
    Score();
    Plan();
  }

  void Compress() {
    Check(kernels_->Compress(CompressOf(k_, kc_, dims_.head_dim_qk), nullptr));
    Check(kernels_->Compress(CompressOf(v_, vc_, dims_.head_dim_v), nullptr));
  }
  void Pack() {
    Check(kernels_->PackBlocks({.dims = dims_,
                                .k = Tokens(k_),
                                .v = Tokens(v_),
                                .documents = &document_,
                                .runs = &slc_run_,
                                .num_runs = 1,
                                .num_blocks = num_slc_blocks_,
                                .records = records_.data()},
                               nullptr));
  }
  void Window() {
    Check(kernels_->AttendWindow({.dims = dims_,
                                  .queries = queries(),
                                  .k = Tokens(k_),
                                  .v = Tokens(v_),
                                  .o_win = Output(o_win_),
                                  .lse_win = nullptr},
                                 nullptr));
  }
  void Score() {
    Check(kernels_->ScoreAndSelect({.dims = dims_,
                                    .queries = queries(),
                                    .kc = Input(kc_, kv_row(), dims_.head_dim_qk),
                                    .vc = Input(vc_, kv_row(), dims_.head_dim_v),
                                    .num_cmp_blocks = num_cmp_blocks_,
                                    .num_documents = 1,
                                    .o_cmp = Output(o_cmp_),
                                    .lse_cmp = nullptr,
                                    .block_indices = indices_.as<int32_t>(),
                                    .scratch = nullptr},
                                   nullptr));
  }
  void Plan() {
    int32_t num_slots = 0;
    int64_t query_end = 0;
    Check(kernels_->PlanFetch({.dims = dims_,
                               .queries = queries(),
                               .block_indices = indices_.as<int32_t>(),
                               .owners = {.rank = owner_.data(),
                                          .ordinal = ordinal_.data(),
                                          .blocks_of_rank = &num_slc_blocks_,
                                          .num_blocks = num_slc_blocks_,
                                          .num_ranks = 1,
                                          .this_rank = 0},
                               .record_bytes = kernels_->RecordBytes(dims_),
                               .query_begin = 0,
                               .capacity = static_cast<int64_t>(peers_.size()),
                               .locations = locations_.data(),
                               .peers = peers_.data(),
                               .offsets = offsets_.data(),
                               .num_slots = &num_slots,
                               .query_end = &query_end,
                               .num_remote_picks = nullptr,
                               .slots_of_rank = nullptr},
                              nullptr));
  }
  void Selected() {
    Check(kernels_->AttendSelected({.dims = dims_,
                                    .queries = queries(),
                                    .query_begin = 0,
                                    .query_end = num_tokens_,
                                    .block_indices = indices_.as<int32_t>(),
                                    .locations = locations_.data(),
                                    .num_blocks = num_slc_blocks_,
                                    .own_records = records_.data(),
                                    .num_own_records = num_slc_blocks_ * dims_.num_kv_heads,
                                    .slots = nullptr,
                                    .o_slc = {},
                                    .lse_slc = nullptr,
                                    .gate = {.gate = gate_.data(),
                                             .gate_dtype = DType::kF32,
                                             .row_stride = int64_t{3} * dims_.num_q_heads,
                                             .head_stride = 3,
                                             .o_cmp = Input(o_cmp_, q_row(), dims_.head_dim_v),
                                             .o_win = Input(o_win_, q_row(), dims_.head_dim_v),
                                             .o = Output(o_)}},
                                   nullptr));
  }

  // Values that do not occur in a forward take as long.
  void PrepareBackward() {
    const int64_t rows = num_tokens_ * dims_.num_q_heads;
    d_o_.emplace(Random(num_tokens_ * q_row(), 4));
    const int64_t f32 = sizeof(float);
    stats_.emplace(*kernels_, rows * f32);
    std::fill_n(stats_->as<float>(), rows, 6.0f);
    dq_.emplace(*kernels_, num_tokens_ * q_row() * f32);
    dk_.emplace(*kernels_, num_tokens_ * kv_row() * f32);
    dv_.emplace(*kernels_, num_tokens_ * kv_row() * f32);
    d_records_.emplace(*kernels_, 2 * num_slc_blocks_ * dims_.select_block_tokens * kv_row() * f32);
    d_summaries_.emplace(*kernels_, 2 * num_cmp_blocks_ * kv_row() * f32);
    scratch_.emplace(*kernels_, kernels_->SelectedBackwardScratchBytes(
                                    dims_, {.num_tokens = num_tokens_,
                                            .num_segments = 1,
                                            .num_kv_heads = dims_.num_kv_heads,
                                            .num_cmp_blocks = num_cmp_blocks_,
                                            .num_slc_blocks = num_slc_blocks_,
                                            .num_records = num_slc_blocks_ * dims_.num_kv_heads,
                                            .num_documents = 1}));
  }
  OutputGradients BranchOutputs() const {
    return {.d_o = Input(*d_o_, q_row(), dims_.head_dim_v),
            .lse = stats_->as<float>(),
            .gate = stats_->as<float>(),
            .delta = stats_->as<float>()};
  }
  void WindowBackward() {
    Check(kernels_->AttendWindowBackward({.dims = dims_,
                                          .queries = queries(),
                                          .k = Tokens(k_),
                                          .v = Tokens(v_),
                                          .outputs = BranchOutputs(),
                                          .queries_gradients = {dq_->as<float>(), false},
                                          .dk = {dk_->as<float>(), nullptr, false},
                                          .dv = {dv_->as<float>(), nullptr, false}},
                                         nullptr));
  }
  void SelectedBackward() {
    Check(kernels_->AttendSelectedBackward({.dims = dims_,
                                            .queries = queries(),
                                            .query_begin = 0,
                                            .query_end = num_tokens_,
                                            .block_indices = indices_.as<int32_t>(),
                                            .locations = locations_.data(),
                                            .num_blocks = num_slc_blocks_,
                                            .num_documents = 1,
                                            .own_records = records_.data(),
                                            .num_own_records = num_slc_blocks_ * dims_.num_kv_heads,
                                            .slots = nullptr,
                                            .outputs = BranchOutputs(),
                                            .queries_gradients = {dq_->as<float>(), false},
                                            .own_gradients = d_records_->as<float>(),
                                            .adds_to_own = false,
                                            .slot_gradients = nullptr,
                                            .scratch = scratch_->data()},
                                           nullptr));
  }
  void SummariesBackward() {
    Check(kernels_->AttendSummariesBackward({.dims = dims_,
                                             .queries = queries(),
                                             .kc = Input(kc_, kv_row(), dims_.head_dim_qk),
                                             .vc = Input(vc_, kv_row(), dims_.head_dim_v),
                                             .num_cmp_blocks = num_cmp_blocks_,
                                             .num_documents = 1,
                                             .outputs = BranchOutputs(),
                                             .queries_gradients = {dq_->as<float>(), false},
                                             .d_summaries = d_summaries_->as<float>(),
                                             .scratch = nullptr},
                                            nullptr));
  }
  void CompressBackward() {
    Check(kernels_->CompressBackward({.dims = dims_,
                                      .head_dim = dims_.head_dim_qk,
                                      .compressor = Compressor::kMean,
                                      .weights = {},
                                      .tokens = Tokens(k_),
                                      .documents = &document_,
                                      .runs = &cmp_run_,
                                      .num_runs = 1,
                                      .num_blocks = num_cmp_blocks_,
                                      .d_summaries = d_summaries_->as<float>(),
                                      .d_summaries_stride = 2 * kv_row(),
                                      .d_tokens = {dk_->as<float>(), nullptr, false},
                                      .d_weights = {},
                                      .scratch = nullptr},
                                     nullptr));
  }

  // (query, key) pairs times heads times the multiply-adds of one pair, two flops each.
  double Flops(double pairs) const {
    return pairs * dims_.num_q_heads * 2.0 * (dims_.head_dim_qk + dims_.head_dim_v);
  }
  double ScorePairs() const {
    double pairs = 0.0;
    for (int64_t t = dims_.compress_block_tokens - 1; t < num_tokens_; ++t) {
      pairs += static_cast<double>(
          (t + 1 - dims_.compress_block_tokens) / dims_.compress_stride_tokens + 1);
    }
    return pairs;
  }
  double SelectedPairs() const {
    return Pairs(dims_.num_selected_blocks * dims_.select_block_tokens);
  }
  double WindowPairs() const { return Pairs(dims_.window_tokens); }
  double InputBytes() const {
    return 2.0 * static_cast<double>(num_tokens_ * kv_row() * element_bytes_);
  }

 private:
  // Of queries that attend to their last `reach` tokens' number of keys.
  double Pairs(int64_t reach) const {
    double pairs = 0.0;
    for (int64_t t = 0; t < num_tokens_; ++t) pairs += static_cast<double>(std::min(t + 1, reach));
    return pairs;
  }
  int64_t q_row() const { return int64_t{dims_.num_q_heads} * dims_.head_dim_qk; }
  int64_t kv_row() const { return int64_t{dims_.num_kv_heads} * dims_.head_dim_qk; }
  Array Random(int64_t count, uint32_t seed) {
    Array array(*kernels_, count * element_bytes_);
    FillRandom(dims_.dtype, array.data(), count, seed);
    return array;
  }
  ConstTensor3 Input(const Array& array, int64_t row, int64_t head) const {
    return {array.data(), row, head};
  }
  Tensor3 Output(const Array& array) const { return {array.data(), q_row(), dims_.head_dim_v}; }
  TokenRows Tokens(const Array& array) const {
    return {.own = Input(array, kv_row(), dims_.head_dim_qk),
            .halo = {},
            .segments = &segment_,
            .num_segments = 1};
  }
  Queries queries() const {
    return {.q = Input(q_, q_row(), dims_.head_dim_qk),
            .segments = &segment_,
            .num_segments = 1,
            .documents = &document_,
            .num_tokens = num_tokens_,
            .kv_heads = dims_.all_kv_heads()};
  }
  CompressParams CompressOf(const Array& tokens, const Array& summaries, int32_t head_dim) const {
    return {.dims = dims_,
            .head_dim = head_dim,
            .compressor = Compressor::kMean,
            .weights = {},
            .tokens = Tokens(tokens),
            .documents = &document_,
            .runs = &cmp_run_,
            .num_runs = 1,
            .summaries = {summaries.data(), kv_row(), head_dim}};
  }

  const int64_t num_tokens_;
  const AttentionDims dims_;
  const std::unique_ptr<Kernels> kernels_;
  const int64_t element_bytes_;
  const int64_t num_cmp_blocks_, num_slc_blocks_;
  const Document document_;
  const Segment segment_;
  const BlockRun cmp_run_, slc_run_;
  Array q_, k_, v_, kc_, vc_, o_cmp_, o_win_, o_, gate_, indices_, records_;
  std::vector<int32_t> locations_, owner_, ordinal_, peers_;
  std::vector<int64_t> offsets_;
  std::optional<Array> d_o_, stats_, dq_, dk_, dv_, d_records_, d_summaries_, scratch_;
};

// Sequences of equal length, of which each step decodes the last token again.
class Decoding {
 public:
  explicit Decoding(const benchmark::State& state)
      : num_tokens_(state.range(0)),
        dims_(DemoDims(static_cast<DType>(state.range(1)))),
        kernels_(*CpuKernels::Create({.num_threads = static_cast<int>(state.range(2))})),
        num_sequences_(state.range(3)),
        num_pages_((num_tokens_ + dims_.select_block_tokens - 1) / dims_.select_block_tokens),
        num_summary_pages_(num_tokens_ / dims_.compress_stride_tokens / kSummaryPageBlocks + 1),
        pages_(Random(num_sequences_ * num_pages_ * page_values(), 1)),
        summaries_(Random(num_sequences_ * num_summary_pages_ * summary_page_values(), 2)),
        q_(Random(num_sequences_ * q_row(), 3)),
        kv_(Random(num_sequences_ * kv_row(), 4)),
        o_(*kernels_, num_sequences_ * q_row() * SizeOf(dims_.dtype)),
        gate_(*kernels_, num_sequences_ * dims_.num_q_heads * 3 * int64_t{sizeof(float)}),
        indices_(*kernels_, num_sequences_ * dims_.num_kv_heads * dims_.num_selected_blocks *
                                int64_t{sizeof(int32_t)}),
        scratch_(*kernels_, kernels_->DecodeScratchBytes(dims_, {num_sequences_, num_tokens_})) {
    std::fill_n(gate_.as<float>(), num_sequences_ * dims_.num_q_heads * 3, 0.5f);
    const int64_t element_bytes = SizeOf(dims_.dtype);
    for (int64_t i = 0; i < num_sequences_ * num_pages_; ++i) {
      page_table_.push_back(pages_.as<char>() + i * page_values() * element_bytes);
    }
    for (int64_t i = 0; i < num_sequences_ * num_summary_pages_; ++i) {
      summary_table_.push_back(summaries_.as<char>() + i * summary_page_values() * element_bytes);
    }
    for (int64_t i = 0; i < num_sequences_; ++i) {
      rows_.push_back({static_cast<int32_t>(i), num_tokens_ - 1});
    }
    Select();
  }

  void Append() {
    const ConstTensor3 tokens = {kv_.data(), kv_row(), dims_.head_dim_qk};
    Check(kernels_->AppendTokens({.dims = dims_,
                                  .rows = rows_.data(),
                                  .num_rows = num_sequences_,
                                  .tables = Tables(),
                                  .slc = {tokens, tokens},
                                  .win = {},
                                  .cmp = {},
                                  .compresses = true,
                                  .compressor = Compressor::kMean,
                                  .weights_k = {},
                                  .weights_v = {}},
                                 nullptr));
  }
  void Select() {
    Check(kernels_->DecodeSelect({.dims = dims_,
                                  .rows = rows_.data(),
                                  .num_rows = num_sequences_,
                                  .max_tokens = num_tokens_,
                                  .tables = Tables(),
                                  .q = {q_.data(), q_row(), dims_.head_dim_qk},
                                  .block_indices = indices_.as<int32_t>(),
                                  .o_cmp = {},
                                  .lse_cmp = nullptr,
                                  .scratch = scratch_.data()},
                                 nullptr));
  }
  void Attend() {
    Check(kernels_->DecodeAttend({.dims = dims_,
                                  .rows = rows_.data(),
                                  .num_rows = num_sequences_,
                                  .max_tokens = num_tokens_,
                                  .tables = Tables(),
                                  .q = {q_.data(), q_row(), dims_.head_dim_qk},
                                  .block_indices = indices_.as<int32_t>(),
                                  .gate = gate_.data(),
                                  .gate_dtype = DType::kF32,
                                  .gate_row_stride = int64_t{3} * dims_.num_q_heads,
                                  .gate_head_stride = 3,
                                  .o = {o_.data(), q_row(), dims_.head_dim_v},
                                  .o_slc = {},
                                  .o_win = {},
                                  .lse_slc = nullptr,
                                  .lse_win = nullptr,
                                  .scratch = scratch_.data()},
                                 nullptr));
  }

 private:
  int64_t q_row() const { return int64_t{dims_.num_q_heads} * dims_.head_dim_qk; }
  int64_t kv_row() const { return int64_t{dims_.num_kv_heads} * dims_.head_dim_qk; }
  int64_t page_values() const { return 2 * dims_.select_block_tokens * kv_row(); }
  int64_t summary_page_values() const { return 2 * kSummaryPageBlocks * kv_row(); }
  Array Random(int64_t count, uint32_t seed) {
    Array array(*kernels_, count * SizeOf(dims_.dtype));
    FillRandom(dims_.dtype, array.data(), count, seed);
    return array;
  }
  PageTables Tables() const {
    return {.slc = page_table_.data(),
            .win = page_table_.data(),
            .cmp = page_table_.data(),
            .summaries = summary_table_.data(),
            .max_pages = num_pages_,
            .max_summary_pages = num_summary_pages_};
  }

  const int64_t num_tokens_;
  const AttentionDims dims_;
  const std::unique_ptr<Kernels> kernels_;
  const int64_t num_sequences_, num_pages_, num_summary_pages_;
  Array pages_, summaries_, q_, kv_, o_, gate_, indices_, scratch_;
  std::vector<void*> page_table_, summary_table_;
  std::vector<DecodeRow> rows_;
};

void ReportFlops(benchmark::State& state, double flops) {
  state.counters["flops"] = benchmark::Counter(flops * static_cast<double>(state.iterations()),
                                               benchmark::Counter::kIsRate);
}

void BM_Compress(benchmark::State& state) {
  Forward forward(state);
  for (auto _ : state) forward.Compress();
  state.SetBytesProcessed(static_cast<int64_t>(forward.InputBytes()) * state.iterations());
}

void BM_Pack(benchmark::State& state) {
  Forward forward(state);
  for (auto _ : state) forward.Pack();
  state.SetBytesProcessed(static_cast<int64_t>(forward.InputBytes()) * state.iterations());
}

void BM_ScoreAndSelect(benchmark::State& state) {
  Forward forward(state);
  for (auto _ : state) forward.Score();
  ReportFlops(state, forward.Flops(forward.ScorePairs()));
}

void BM_PlanFetch(benchmark::State& state) {
  Forward forward(state);
  for (auto _ : state) forward.Plan();
}

void BM_AttendSelected(benchmark::State& state) {
  Forward forward(state);
  for (auto _ : state) forward.Selected();
  ReportFlops(state, forward.Flops(forward.SelectedPairs()));
}

void BM_AttendWindow(benchmark::State& state) {
  Forward forward(state);
  for (auto _ : state) forward.Window();
  ReportFlops(state, forward.Flops(forward.WindowPairs()));
}

void BM_WindowBackward(benchmark::State& state) {
  Forward forward(state);
  forward.PrepareBackward();
  for (auto _ : state) forward.WindowBackward();
  ReportFlops(state, 2.5 * forward.Flops(forward.WindowPairs()));
}

void BM_SelectedBackward(benchmark::State& state) {
  Forward forward(state);
  forward.PrepareBackward();
  for (auto _ : state) forward.SelectedBackward();
  ReportFlops(state, 2.5 * forward.Flops(forward.SelectedPairs()));
}

void BM_SummariesBackward(benchmark::State& state) {
  Forward forward(state);
  forward.PrepareBackward();
  for (auto _ : state) forward.SummariesBackward();
  ReportFlops(state, 2.5 * forward.Flops(forward.ScorePairs()));
}

void BM_CompressBackward(benchmark::State& state) {
  Forward forward(state);
  forward.PrepareBackward();
  for (auto _ : state) forward.CompressBackward();
}

// The last token ends a compression block, as one in compress_stride_tokens does.
void BM_AppendTokens(benchmark::State& state) {
  Decoding decoding(state);
  for (auto _ : state) decoding.Append();
}

void BM_DecodeSelect(benchmark::State& state) {
  Decoding decoding(state);
  for (auto _ : state) decoding.Select();
}

void BM_DecodeAttend(benchmark::State& state) {
  Decoding decoding(state);
  for (auto _ : state) decoding.Attend();
}

// Tokens, storage type, threads. The demo's 65,536 tokens are run by name, being seconds long.
void Shapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"tokens", "dtype", "threads"})->Unit(benchmark::kMillisecond)->UseRealTime();
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int64_t threads : {1, 2}) bench->Args({16384, static_cast<int64_t>(dtype), threads});
  }
  bench->Args({65536, static_cast<int64_t>(DType::kBF16), 2});
}

void DecodeShapes(benchmark::internal::Benchmark* bench) {
  bench->ArgNames({"tokens", "dtype", "threads", "sequences"})
      ->Unit(benchmark::kMicrosecond)
      ->UseRealTime();
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    for (int64_t sequences : {1, 8}) {
      bench->Args({65536, static_cast<int64_t>(dtype), 2, sequences});
    }
  }
}

BENCHMARK(BM_Compress)->Apply(Shapes);
BENCHMARK(BM_Pack)->Apply(Shapes);
BENCHMARK(BM_ScoreAndSelect)->Apply(Shapes);
BENCHMARK(BM_PlanFetch)->Apply(Shapes);
BENCHMARK(BM_AttendSelected)->Apply(Shapes);
BENCHMARK(BM_AttendWindow)->Apply(Shapes);
BENCHMARK(BM_WindowBackward)->Apply(Shapes);
BENCHMARK(BM_SelectedBackward)->Apply(Shapes);
BENCHMARK(BM_SummariesBackward)->Apply(Shapes);
BENCHMARK(BM_CompressBackward)->Apply(Shapes);
BENCHMARK(BM_AppendTokens)->Apply(DecodeShapes);
BENCHMARK(BM_DecodeSelect)->Apply(DecodeShapes);
BENCHMARK(BM_DecodeAttend)->Apply(DecodeShapes);

}  // namespace
}  // namespace nsa::kernels

BENCHMARK_MAIN();
