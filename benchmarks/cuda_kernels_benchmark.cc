// Each stage of the CUDA kernels on one document, without ranks:
//
//   bazel run -c opt //benchmarks:cuda_kernels_benchmark -- --benchmark_filter=tokens:65536
//
// bf16, Hq 64, Hkv 4, l 32, d 16, l' 64, n 16, w 512, mean compression. A time is that between CUDA
// events around one run, with the L2 flushed before it; of 10 after 3 that are not timed. Google
// Benchmark's own column is their mean, the rates and of_floor are of the median. The floor is the
// larger of the stage's arithmetic at 600 TFLOP/s and its bytes, each once, at 4.3 TB/s. The
// selected branch on random lists cannot reach it: there the L2's rate is the limit.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "benchmark/benchmark.h"
#include "benchmarks/device_values.h"
#include "benchmarks/drawn_blocks.h"
#include "benchmarks/gpu_timer.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/kernels.h"

namespace nsa::benchmarks {
namespace {

using kernels::AttentionDims;
using kernels::BlockOwners;
using kernels::BlockRun;
using kernels::ConstTensor3;
using kernels::Document;
using kernels::Segment;
using kernels::Tensor3;
using kernels::TokenRows;

constexpr double kFlopsPerSecond = 600e12;
constexpr double kBytesPerSecond = 4.3e12;
constexpr int kWarmUps = 3, kRuns = 10;

AttentionDims Dims(int64_t dk, int64_t dv) {
  AttentionDims dims{};
  dims.dtype = DType::kBF16;
  dims.num_q_heads = 64;
  dims.num_kv_heads = 4;
  dims.head_dim_qk = static_cast<int32_t>(dk);
  dims.head_dim_v = static_cast<int32_t>(dv);
  dims.compress_block_tokens = 32;
  dims.compress_stride_tokens = 16;
  dims.select_block_tokens = 64;
  dims.num_selected_blocks = 16;
  dims.num_initial_blocks = 1;
  dims.num_local_blocks = 2;
  dims.window_tokens = 512;
  dims.softmax_scale = 0.088f;
  return dims;
}

// What a stage has to do at least.
struct Work {
  double flops;
  double bytes;
};

// The blocks of a document, dealt to ranks, and what PlanFetch writes about them for rank 0.
struct Fetch {
  BlockOwners owners;
  int64_t capacity = 0;
  int32_t* locations = nullptr;
  int32_t* peers = nullptr;
  int64_t* offsets = nullptr;
};

// A document of which each stage has run once, on the results of those before.
class Stages {
 public:
  Stages(int64_t num_tokens, int64_t dk, int64_t dv, cudaStream_t stream)
      : num_tokens_(num_tokens),
        dims_(Dims(dk, dv)),
        num_slc_(num_tokens / dims_.select_block_tokens),
        num_cmp_(num_tokens / dims_.compress_stride_tokens - 1),
        stream_(stream) {}

  // With `pool_blocks`, neighbouring queries draw their selected blocks from a pool of that many.
  absl::Status Prepare(int64_t pool_blocks) {
    auto made = kernels::CudaKernels::Create();
    if (!made.ok()) return made.status();
    kernels_ = *std::move(made);
    const int64_t hq = dims_.num_q_heads, hkv = dims_.num_kv_heads;
    const int64_t dk = dims_.head_dim_qk, dv = dims_.head_dim_v;
    documents_ = Upload<Document>({{0, num_tokens_, 0, num_cmp_, 0, num_slc_}});
    segments_ = Upload<Segment>({{0, num_tokens_, 0, 0, 0}});
    cmp_runs_ = Upload<BlockRun>({{0, 0, num_cmp_}});
    slc_runs_ = Upload<BlockRun>({{0, 0, num_slc_}});
    q_ = Normal(num_tokens_, hq, dk);
    k_ = {Normal(num_tokens_, hkv, dk), {}, segments_, 1};
    v_ = {Normal(num_tokens_, hkv, dv), {}, segments_, 1};
    gate_ = Normal(num_tokens_, hq, 3);
    kc_ = Empty(num_cmp_, hkv, dk);
    vc_ = Empty(num_cmp_, hkv, dv);
    o_cmp_ = Empty(num_tokens_, hq, dv);
    o_win_ = Empty(num_tokens_, hq, dv);
    o_ = Empty(num_tokens_, hq, dv);
    records_ = Memory(num_slc_ * hkv * kernels_->RecordBytes(dims_));
    selected_ = static_cast<int32_t*>(Memory(num_tokens_ * hkv * dims_.num_selected_blocks * 4));
    const std::vector<int32_t> drawn = DrawBlocks(dims_, num_tokens_, pool_blocks);
    drawn_ = Upload(drawn);
    selected_pairs_ = CountSelectedPairs(dims_, drawn);
    scratch_ = Memory(kernels_->ScoreScratchBytes(dims_, {num_tokens_, 1, num_cmp_, 1}));
    counters_ = static_cast<int64_t*>(Memory(3 * sizeof(int64_t)));
    alone_ = Deal(1);
    of_four_ = Deal(4);
    NSA_BENCHMARK_OK(status_);
    PrepareBackward();
    NSA_BENCHMARK_OK(status_);
    for (auto stage :
         {&Stages::Compress, &Stages::Pack, &Stages::AttendWindow, &Stages::ScoreAndSelect,
          &Stages::PlanFetch, &Stages::AttendSelected, &Stages::GateBackward}) {
      NSA_BENCHMARK_OK((this->*stage)());
    }
    return absl::OkStatus();
  }

  absl::Status Compress() {
    kernels::CompressParams params = {.dims = dims_,
                                      .head_dim = dims_.head_dim_qk,
                                      .compressor = Compressor::kMean,
                                      .weights = {},
                                      .tokens = k_,
                                      .documents = documents_,
                                      .runs = cmp_runs_,
                                      .num_runs = 1,
                                      .summaries = kc_};
    NSA_BENCHMARK_OK(kernels_->Compress(params, stream_));
    params.head_dim = dims_.head_dim_v;
    params.tokens = v_;
    params.summaries = vc_;
    return kernels_->Compress(params, stream_);
  }
  Work CompressWork() const { return {0, KvBytes() * (1 + 1.0 / dims_.compress_stride_tokens)}; }

  absl::Status Pack() {
    return kernels_->PackBlocks({.dims = dims_,
                                 .k = k_,
                                 .v = v_,
                                 .documents = documents_,
                                 .runs = slc_runs_,
                                 .num_runs = 1,
                                 .num_blocks = num_slc_,
                                 .records = records_},
                                stream_);
  }
  Work PackWork() const { return {0, 2 * KvBytes()}; }

  absl::Status AttendWindow() {
    return kernels_->AttendWindow({.dims = dims_,
                                   .queries = Queries(),
                                   .k = k_,
                                   .v = v_,
                                   .o_win = o_win_,
                                   .lse_win = nullptr},
                                  stream_);
  }
  Work AttendWindowWork() const {
    const double w = dims_.window_tokens;
    const double pairs = num_tokens_ * w - w * (w - 1) / 2;
    return {PairFlops() * pairs, QBytes() + KvBytes() + OBytes()};
  }

  absl::Status ScoreAndSelect() {
    return kernels_->ScoreAndSelect({.dims = dims_,
                                     .queries = Queries(),
                                     .kc = ReadOnly(kc_),
                                     .vc = ReadOnly(vc_),
                                     .num_cmp_blocks = num_cmp_,
                                     .num_documents = 1,
                                     .o_cmp = o_cmp_,
                                     .lse_cmp = nullptr,
                                     .block_indices = selected_,
                                     .scratch = scratch_},
                                    stream_);
  }
  // Scores take q.kc once more.
  Work ScoreAndSelectWork() const {
    const double pairs = double(num_tokens_) * num_tokens_ / 2 / dims_.compress_stride_tokens;
    const double score_flops = 2.0 * dims_.num_q_heads * dims_.head_dim_qk;
    return {(PairFlops() + score_flops) * pairs, QBytes() + OBytes() + ListBytes()};
  }

  // As on one rank, where every block is own.
  absl::Status PlanFetch() { return PlanFetchOf(alone_); }
  // As on the first of four ranks with zig-zag sharding, had it all the queries.
  absl::Status PlanFetchOfFour() { return PlanFetchOf(of_four_); }
  Work PlanFetchWork() const { return {0, ListBytes()}; }

  absl::Status AttendSelected() {
    return kernels_->AttendSelected({.dims = dims_,
                                     .queries = Queries(),
                                     .query_begin = 0,
                                     .query_end = num_tokens_,
                                     .block_indices = drawn_,
                                     .locations = alone_.locations,
                                     .num_blocks = num_slc_,
                                     .own_records = records_,
                                     .num_own_records = num_slc_ * dims_.num_kv_heads,
                                     .slots = nullptr,
                                     .o_slc = o_slc_,
                                     .lse_slc = lse_slc_,
                                     .gate = {.gate = gate_.data,
                                              .gate_dtype = DType::kBF16,
                                              .row_stride = gate_.row_stride,
                                              .head_stride = gate_.head_stride,
                                              .o_cmp = ReadOnly(o_cmp_),
                                              .o_win = ReadOnly(o_win_),
                                              .o = o_}},
                                    stream_);
  }
  Work AttendSelectedWork() const {
    return {PairFlops() * selected_pairs_, QBytes() + KvBytes() + 4 * OBytes() + ListBytes()};
  }

  absl::Status GateBackward() {
    return kernels_->GateBackward({.dims = dims_,
                                   .num_tokens = num_tokens_,
                                   .gate = gate_.data,
                                   .gate_dtype = DType::kBF16,
                                   .row_stride = gate_.row_stride,
                                   .head_stride = gate_.head_stride,
                                   .d_o = d_o_,
                                   .o_cmp = ReadOnly(o_cmp_),
                                   .o_slc = ReadOnly(o_slc_),
                                   .o_win = ReadOnly(o_win_),
                                   .d_gate = d_gate_,
                                   .gates = gates_,
                                   .deltas = deltas_},
                                  stream_);
  }
  Work GateBackwardWork() const {
    return {0, 4 * OBytes() + (2.0 + 3 * 4) * 3 * num_tokens_ * dims_.num_q_heads};
  }

  absl::Status AttendSelectedBackward() {
    const int64_t num_rows = num_tokens_ * dims_.num_q_heads;
    return kernels_->AttendSelectedBackward({.dims = dims_,
                                             .queries = Queries(),
                                             .query_begin = 0,
                                             .query_end = num_tokens_,
                                             .block_indices = drawn_,
                                             .locations = alone_.locations,
                                             .num_blocks = num_slc_,
                                             .num_documents = 1,
                                             .own_records = records_,
                                             .num_own_records = num_slc_ * dims_.num_kv_heads,
                                             .slots = nullptr,
                                             .outputs = {.d_o = d_o_,
                                                         .lse = lse_slc_,
                                                         .gate = gates_ + num_rows,
                                                         .delta = deltas_ + num_rows},
                                             .queries_gradients = {.dq = dq_, .adds = false},
                                             .own_gradients = record_gradients_,
                                             .adds_to_own = false,
                                             .slot_gradients = nullptr,
                                             .scratch = backward_scratch_},
                                            stream_);
  }
  // Five products where the forward has two.
  Work AttendSelectedBackwardWork() const {
    const double flops = 2.0 * dims_.num_q_heads * (3 * dims_.head_dim_qk + 2 * dims_.head_dim_v);
    return {flops * selected_pairs_, 3 * QBytes() + OBytes() + 3 * KvBytes() + ListBytes()};
  }

  absl::Status CompressBackward() {
    NSA_BENCHMARK_OK(CompressBackwardOf(dims_.head_dim_qk, k_, dk_, d_summaries_));
    return CompressBackwardOf(dims_.head_dim_v, v_, dv_,
                              d_summaries_ + dims_.num_kv_heads * dims_.head_dim_qk);
  }
  Work CompressBackwardWork() const {
    return {0, 2 * KvBytes() * (1 + 1.0 / dims_.compress_stride_tokens)};
  }

  absl::Status UnpackGradients() {
    return kernels_->UnpackGradients({.dims = dims_,
                                      .record_gradients = record_gradients_,
                                      .segments = segments_,
                                      .num_segments = 1,
                                      .documents = documents_,
                                      .runs = slc_runs_,
                                      .num_runs = 1,
                                      .num_blocks = num_slc_,
                                      .dk = {dk_, nullptr, true},
                                      .dv = {dv_, nullptr, true}},
                                     stream_);
  }
  Work UnpackGradientsWork() const { return {0, 6 * KvBytes()}; }

 private:
  void PrepareBackward() {
    const int64_t hq = dims_.num_q_heads, hkv = dims_.num_kv_heads;
    const int64_t dk = dims_.head_dim_qk, dv = dims_.head_dim_v;
    const auto floats = [&](int64_t count) { return static_cast<float*>(Memory(count * 4)); };
    d_o_ = Normal(num_tokens_, hq, dv);
    o_slc_ = Empty(num_tokens_, hq, dv);
    lse_slc_ = floats(num_tokens_ * hq);
    d_gate_ = floats(num_tokens_ * hq * 3);
    gates_ = floats(num_tokens_ * hq * 3);
    deltas_ = floats(num_tokens_ * hq * 3);
    dq_ = floats(num_tokens_ * hq * dk);
    dk_ = floats(num_tokens_ * hkv * dk);
    dv_ = floats(num_tokens_ * hkv * dv);
    record_gradients_ = floats(num_tokens_ * hkv * (dk + dv));
    d_summaries_ = floats(num_cmp_ * hkv * (dk + dv));
    backward_scratch_ = Memory(kernels_->SelectedBackwardScratchBytes(
        dims_, {num_tokens_, 1, dims_.num_kv_heads, num_cmp_, num_slc_, num_slc_ * hkv, 1}));
  }

  absl::Status CompressBackwardOf(int32_t head_dim, const TokenRows& tokens, float* d_tokens,
                                  const float* d_summaries) {
    return kernels_->CompressBackward(
        {.dims = dims_,
         .head_dim = head_dim,
         .compressor = Compressor::kMean,
         .weights = {},
         .tokens = tokens,
         .documents = documents_,
         .runs = cmp_runs_,
         .num_runs = 1,
         .num_blocks = num_cmp_,
         .d_summaries = d_summaries,
         .d_summaries_stride = dims_.num_kv_heads * (dims_.head_dim_qk + dims_.head_dim_v),
         .d_tokens = {d_tokens, nullptr, false},
         .d_weights = {},
         .scratch = nullptr},
        stream_);
  }

  // The first error is kept, and nothing enqueued after it.
  void* Memory(int64_t num_bytes) {
    auto memory = kernels_->Allocate(num_bytes);
    if (!memory.ok()) {
      status_.Update(memory.status());
      return nullptr;
    }
    memory_.push_back(*std::move(memory));
    return memory_.back()->data();
  }

  template <typename T>
  T* Upload(const std::vector<T>& values) {
    const int64_t num_bytes = static_cast<int64_t>(values.size() * sizeof(T));
    void* const data = Memory(num_bytes);
    if (data != nullptr) {
      status_.Update(kernels_->CopyFromHost(data, values.data(), num_bytes, stream_));
      status_.Update(kernels_->Synchronize(stream_));
    }
    return static_cast<T*>(data);
  }

  Tensor3 Empty(int64_t rows, int64_t heads, int64_t dim) {
    return {Memory(rows * heads * dim * 2), heads * dim, dim};
  }

  ConstTensor3 Normal(int64_t rows, int64_t heads, int64_t dim) {
    const Tensor3 tensor = Empty(rows, heads, dim);
    if (tensor.data != nullptr) {
      status_.Update(CudaStatus(
          FillNormal(memory_.size(), 0, rows * heads * dim, tensor.data, stream_), "FillNormal"));
    }
    return ReadOnly(tensor);
  }

  static ConstTensor3 ReadOnly(const Tensor3& tensor) {
    return {tensor.data, tensor.row_stride, tensor.head_stride};
  }

  // Blocks in zig-zag over `num_ranks`, seen from rank 0.
  Fetch Deal(int num_ranks) {
    std::vector<int32_t> rank(num_slc_), ordinal(num_slc_);
    std::vector<int64_t> blocks_of_rank(num_ranks);
    for (int64_t b = 0; b < num_slc_; ++b) {
      const int64_t chunk = b * 2 * num_ranks / num_slc_;
      rank[b] = static_cast<int32_t>(std::min(chunk, 2 * num_ranks - 1 - chunk));
      ordinal[b] = static_cast<int32_t>(blocks_of_rank[rank[b]]++);
    }
    const int64_t hkv = dims_.num_kv_heads;
    Fetch fetch;
    fetch.owners = {Upload(rank), Upload(ordinal), Upload(blocks_of_rank), num_slc_, num_ranks, 0};
    fetch.capacity = (num_slc_ - blocks_of_rank[0]) * hkv;
    fetch.locations = static_cast<int32_t*>(Memory(num_slc_ * hkv * 4));
    fetch.peers = static_cast<int32_t*>(Memory(std::max<int64_t>(1, fetch.capacity) * 4));
    fetch.offsets = static_cast<int64_t*>(Memory(std::max<int64_t>(1, fetch.capacity) * 8));
    return fetch;
  }

  absl::Status PlanFetchOf(const Fetch& fetch) {
    return kernels_->PlanFetch({.dims = dims_,
                                .queries = Queries(),
                                .block_indices = drawn_,
                                .owners = fetch.owners,
                                .record_bytes = kernels_->RecordBytes(dims_),
                                .query_begin = 0,
                                .capacity = fetch.capacity,
                                .locations = fetch.locations,
                                .peers = fetch.peers,
                                .offsets = fetch.offsets,
                                .num_slots = reinterpret_cast<int32_t*>(counters_),
                                .query_end = counters_ + 1,
                                .num_remote_picks = counters_ + 2,
                                .slots_of_rank = nullptr},
                               stream_);
  }

  kernels::Queries Queries() const {
    return {q_, segments_, 1, documents_, num_tokens_, dims_.all_kv_heads()};
  }

  double QBytes() const { return 2.0 * num_tokens_ * dims_.num_q_heads * dims_.head_dim_qk; }
  double OBytes() const { return 2.0 * num_tokens_ * dims_.num_q_heads * dims_.head_dim_v; }
  double KvBytes() const {
    return 2.0 * num_tokens_ * dims_.num_kv_heads * (dims_.head_dim_qk + dims_.head_dim_v);
  }
  double ListBytes() const {
    return 4.0 * num_tokens_ * dims_.num_kv_heads * dims_.num_selected_blocks;
  }
  // Of a query and a key, all heads.
  double PairFlops() const {
    return 2.0 * dims_.num_q_heads * (dims_.head_dim_qk + dims_.head_dim_v);
  }

  const int64_t num_tokens_;
  const AttentionDims dims_;
  const int64_t num_slc_, num_cmp_;
  const cudaStream_t stream_;
  std::unique_ptr<kernels::Kernels> kernels_;
  std::vector<std::unique_ptr<kernels::Memory>> memory_;
  absl::Status status_;

  const Document* documents_ = nullptr;
  const Segment* segments_ = nullptr;
  const BlockRun *cmp_runs_ = nullptr, *slc_runs_ = nullptr;
  ConstTensor3 q_, gate_;
  TokenRows k_, v_;
  Tensor3 kc_, vc_, o_cmp_, o_win_, o_;
  void* records_ = nullptr;
  void* scratch_ = nullptr;  // of scoring
  int32_t *selected_ = nullptr, *drawn_ = nullptr;
  double selected_pairs_ = 0;
  int64_t* counters_ = nullptr;
  Fetch alone_, of_four_;

  ConstTensor3 d_o_;
  Tensor3 o_slc_;
  float *lse_slc_ = nullptr, *d_gate_ = nullptr, *gates_ = nullptr, *deltas_ = nullptr;
  float *dq_ = nullptr, *dk_ = nullptr, *dv_ = nullptr;
  float *record_gradients_ = nullptr, *d_summaries_ = nullptr;
  void* backward_scratch_ = nullptr;
};

struct Row {
  const char* name;
  absl::Status (Stages::*run)();
  Work (Stages::*work)() const;
  int64_t pool_blocks = 0;
};
constexpr Row kRows[] = {
    {"compress_k_and_v", &Stages::Compress, &Stages::CompressWork},
    {"pack", &Stages::Pack, &Stages::PackWork},
    {"attend_window", &Stages::AttendWindow, &Stages::AttendWindowWork},
    {"score_and_select", &Stages::ScoreAndSelect, &Stages::ScoreAndSelectWork},
    {"plan_fetch/one_rank", &Stages::PlanFetch, &Stages::PlanFetchWork},
    {"plan_fetch/first_of_four", &Stages::PlanFetchOfFour, &Stages::PlanFetchWork},
    {"attend_selected/random_lists", &Stages::AttendSelected, &Stages::AttendSelectedWork},
    {"attend_selected/pool_of_20_for_32_queries", &Stages::AttendSelected,
     &Stages::AttendSelectedWork, 20},
    {"gate_backward", &Stages::GateBackward, &Stages::GateBackwardWork},
    {"attend_selected_backward/random_lists", &Stages::AttendSelectedBackward,
     &Stages::AttendSelectedBackwardWork},
    {"attend_selected_backward/pool_of_20_for_32_queries", &Stages::AttendSelectedBackward,
     &Stages::AttendSelectedBackwardWork, 20},
    {"compress_backward_k_and_v", &Stages::CompressBackward, &Stages::CompressBackwardWork},
    {"unpack_gradients", &Stages::UnpackGradients, &Stages::UnpackGradientsWork},
};

absl::Status Measure(benchmark::State& state, const Row& row) {
  auto timer = GpuTimer::Create();
  if (!timer.ok()) return timer.status();
  Stages stages(state.range(0), state.range(1), state.range(2), (*timer)->stream());
  NSA_BENCHMARK_OK(stages.Prepare(row.pool_blocks));
  // Nothing is waited for after the flush, so that launching is hidden under it.
  const auto run = [&] {
    return (*timer)->Time([] { return absl::OkStatus(); }, [&] { return (stages.*row.run)(); });
  };
  for (int i = 0; i < kWarmUps; ++i) NSA_BENCHMARK_OK(run().status());
  std::vector<double> times;
  for (auto _ : state) {
    auto ms = run();
    if (!ms.ok()) return ms.status();
    state.SetIterationTime(*ms * 1e-3);
    times.push_back(*ms);
  }
  const Spread spread = SpreadOf(times);
  const auto [flops, bytes] = (stages.*row.work)();
  const double seconds = spread.median * 1e-3;
  state.counters["median_us"] = spread.median * 1e3;
  state.counters["min_us"] = spread.min * 1e3;
  state.counters["max_us"] = spread.max * 1e3;
  state.counters["TFLOP/s"] = flops / seconds * 1e-12;
  state.counters["GB/s"] = bytes / seconds * 1e-9;
  state.counters["of_floor"] = std::max(flops / kFlopsPerSecond, bytes / kBytesPerSecond) / seconds;
  return absl::OkStatus();
}

}  // namespace
}  // namespace nsa::benchmarks

int main(int argc, char** argv) {
  using nsa::benchmarks::kRows;
  for (const nsa::benchmarks::Row& row : kRows) {
    benchmark::RegisterBenchmark(row.name,
                                 [&row](benchmark::State& state) {
                                   const absl::Status status = nsa::benchmarks::Measure(state, row);
                                   if (!status.ok()) {
                                     state.SkipWithError(status.ToString().c_str());
                                   }
                                 })
        ->ArgNames({"tokens", "dk", "dv"})
        ->Args({8 << 10, 128, 128})
        ->Args({16 << 10, 128, 128})
        ->Args({64 << 10, 128, 128})
        ->Args({128 << 10, 128, 128})
        ->Args({64 << 10, 192, 128})
        ->Iterations(nsa::benchmarks::kRuns)
        ->UseManualTime()
        ->Unit(benchmark::kMicrosecond);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
