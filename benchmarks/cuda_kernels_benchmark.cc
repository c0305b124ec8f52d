// Each stage of the CUDA kernels on one document, without ranks:
//
//   bazel run -c opt //benchmarks:cuda_kernels_benchmark -- [Dk Dv [tokens...]]
//
// bf16, Hq 64, Hkv 4, l 32, d 16, l' 64, n 16, w 512, mean compression. A time is the median of 10
// runs between CUDA events, after 3 others, with the L2 flushed before each. The floor is the
// larger of the stage's arithmetic at 600 TFLOP/s and its bytes, each once, at 4.3 TB/s.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "kernels/cuda/cuda_kernels.h"
#include "kernels/kernels.h"

namespace nsa::kernels {
namespace {

constexpr double kFlopsPerSecond = 600e12;
constexpr double kBytesPerSecond = 4.3e12;
constexpr int kWarmUps = 3, kRuns = 10;
constexpr int64_t kFlushBytes = 256 << 20;

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

template <class T>
T Value(absl::StatusOr<T> result) {
  Check(result.status());
  return *std::move(result);
}

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

AttentionDims Dims(int32_t dk, int32_t dv) {
  AttentionDims dims{};
  dims.dtype = DType::kBF16;
  dims.num_q_heads = 64;
  dims.num_kv_heads = 4;
  dims.head_dim_qk = dk;
  dims.head_dim_v = dv;
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

// Blocks of every query and kv head: the first one, the last two, and others drawn at random. With
// `pool_blocks`, 32 neighbouring queries draw theirs from a common pool of that many.
std::vector<int32_t> DrawBlocks(const AttentionDims& dims, int64_t num_tokens,
                                int64_t pool_blocks) {
  const int32_t n = dims.num_selected_blocks;
  constexpr int64_t kNeighbours = 32;
  std::mt19937_64 random(7);
  std::vector<int32_t> indices(num_tokens * dims.num_kv_heads * n, -1);
  std::vector<int32_t> pool, picks;
  // `count` distinct blocks of [1, end)
  const auto draw = [&](int64_t count, int64_t end, std::vector<int32_t>& to) {
    to.clear();
    while (static_cast<int64_t>(to.size()) < count) {
      const int32_t block = 1 + static_cast<int32_t>(random() % (end - 1));
      if (std::find(to.begin(), to.end(), block) == to.end()) to.push_back(block);
    }
  };
  for (int32_t head = 0; head < dims.num_kv_heads; ++head) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      const int64_t own = t / dims.select_block_tokens;
      int32_t* const row = &indices[(t * dims.num_kv_heads + head) * n];
      if (own < n) {
        for (int64_t b = 0; b <= own; ++b) row[b] = static_cast<int32_t>(b);
        continue;
      }
      if (pool_blocks > 0) {
        const int64_t first_own = t / kNeighbours * kNeighbours / dims.select_block_tokens;
        const int64_t size = std::min(pool_blocks, first_own - 2);
        if (t % kNeighbours == 0 || pool.empty()) draw(size, first_own - 1, pool);
        std::shuffle(pool.begin(), pool.end(), random);
        picks.assign(pool.begin(), pool.begin() + std::min<int64_t>(n - 3, pool.size()));
      } else {
        draw(n - 3, own - 1, picks);
      }
      picks.push_back(0);
      picks.push_back(static_cast<int32_t>(own - 1));
      picks.push_back(static_cast<int32_t>(own));
      std::sort(picks.begin(), picks.end());
      std::copy(picks.begin(), picks.end(), row);
    }
  }
  return indices;
}

class Benchmark {
 public:
  Benchmark(int32_t dk, int32_t dv, int64_t num_tokens)
      : dims_(Dims(dk, dv)),
        num_tokens_(num_tokens),
        kernels_(Value(CudaKernels::Create())),
        flush_(Value(kernels_->Allocate(kFlushBytes))) {
    Check(cudaEventCreate(&begin_));
    Check(cudaEventCreate(&end_));
  }
  ~Benchmark() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }

  void Run() {
    const int64_t hq = dims_.num_q_heads, hkv = dims_.num_kv_heads;
    const int64_t dk = dims_.head_dim_qk, dv = dims_.head_dim_v, n = dims_.num_selected_blocks;
    const int64_t num_slc = num_tokens_ / dims_.select_block_tokens;
    const int64_t num_cmp = num_tokens_ / dims_.compress_stride_tokens - 1;
    const Document document{0, num_tokens_, 0, num_cmp, 0, num_slc};
    const Segment segment{0, num_tokens_, 0, 0, 0};
    const BlockRun cmp_run{0, 0, num_cmp}, slc_run{0, 0, num_slc};
    const auto* documents = Upload(&document, 1);
    const auto* segments = Upload(&segment, 1);
    const ConstTensor3 q = RandomTensor(num_tokens_, hq, dk);
    const ConstTensor3 k = RandomTensor(num_tokens_, hkv, dk);
    const ConstTensor3 v = RandomTensor(num_tokens_, hkv, dv);
    const Tensor3 kc = Tensor(num_cmp, hkv, dk), vc = Tensor(num_cmp, hkv, dv);
    const Tensor3 o_cmp = Tensor(num_tokens_, hq, dv), o_win = Tensor(num_tokens_, hq, dv);
    const ConstTensor3 gate = RandomTensor(num_tokens_, hq, 3);
    const TokenRows k_rows{k, {}, segments, 1}, v_rows{v, {}, segments, 1};
    const Queries queries{q, segments, 1, documents, num_tokens_, dims_.all_kv_heads()};
    const double key_bytes = num_tokens_ * hkv * dk * 2.0, value_bytes = key_bytes * dv / dk;
    const double q_bytes = num_tokens_ * hq * dk * 2.0, o_bytes = q_bytes * dv / dk;
    const double pair_flops = 2.0 * hq * (dk + dv);  // of a query and a key
    std::printf("%lld tokens, Dk %lld, Dv %lld\n", static_cast<long long>(num_tokens_),
                static_cast<long long>(dk), static_cast<long long>(dv));

    const auto* cmp_runs = Upload(&cmp_run, 1);
    const auto* slc_runs = Upload(&slc_run, 1);
    const auto compress = [&](int64_t dim, const TokenRows& rows, const Tensor3& summaries) {
      return kernels_->Compress({.dims = dims_,
                                 .head_dim = static_cast<int32_t>(dim),
                                 .compressor = Compressor::kMean,
                                 .weights = {},
                                 .tokens = rows,
                                 .documents = documents,
                                 .runs = cmp_runs,
                                 .num_runs = 1,
                                 .summaries = summaries},
                                nullptr);
    };
    Time("compress (k and v, mean)", 0, (key_bytes + value_bytes) * (1 + 1.0 / 16), [&] {
      const absl::Status status = compress(dk, k_rows, kc);
      return status.ok() ? compress(dv, v_rows, vc) : status;
    });

    const int64_t num_records = num_slc * hkv;
    void* const records = Memory(num_records * kernels_->RecordBytes(dims_));
    Time("pack", 0, 2 * (key_bytes + value_bytes), [&] {
      return kernels_->PackBlocks({.dims = dims_,
                                   .k = k_rows,
                                   .v = v_rows,
                                   .documents = documents,
                                   .runs = slc_runs,
                                   .num_runs = 1,
                                   .num_blocks = num_slc,
                                   .records = records},
                                  nullptr);
    });

    const double window_pairs = num_tokens_ * double(dims_.window_tokens) -
                                dims_.window_tokens * (dims_.window_tokens - 1.0) / 2;
    Time("attend window", pair_flops * window_pairs, q_bytes + key_bytes + value_bytes + o_bytes,
         [&] {
           return kernels_->AttendWindow({.dims = dims_,
                                          .queries = queries,
                                          .k = k_rows,
                                          .v = v_rows,
                                          .o_win = o_win,
                                          .lse_win = nullptr},
                                         nullptr);
         });

    void* const scratch = Memory(kernels_->ScoreScratchBytes(dims_, {num_tokens_, 1, num_cmp, 1}));
    auto* const indices = static_cast<int32_t*>(Memory(num_tokens_ * hkv * n * 4));
    // Scores once more than the pairs' keys and values.
    const double cmp_pairs = double(num_tokens_) * num_tokens_ / 2 / dims_.compress_stride_tokens;
    Time("score and select", (pair_flops + 2.0 * hq * dk) * cmp_pairs,
         q_bytes + o_bytes + num_tokens_ * hkv * n * 4.0, [&] {
           return kernels_->ScoreAndSelect({.dims = dims_,
                                            .queries = queries,
                                            .kc = {kc.data, kc.row_stride, kc.head_stride},
                                            .vc = {vc.data, vc.row_stride, vc.head_stride},
                                            .num_cmp_blocks = num_cmp,
                                            .num_documents = 1,
                                            .o_cmp = o_cmp,
                                            .lse_cmp = nullptr,
                                            .block_indices = indices,
                                            .scratch = scratch},
                                           nullptr);
         });

    // Everything is own, as on one rank.
    std::vector<int32_t> rank(num_slc, 0), ordinal(num_slc);
    for (int64_t b = 0; b < num_slc; ++b) ordinal[b] = static_cast<int32_t>(b);
    const BlockOwners owners{Upload(rank.data(), num_slc),
                             Upload(ordinal.data(), num_slc),
                             Upload(&num_slc, 1),
                             num_slc,
                             1,
                             0};
    auto* const locations = static_cast<int32_t*>(Memory(num_records * 4));
    auto* const counters = static_cast<int64_t*>(Memory(3 * 8));
    const auto plan_fetch = [&] {
      return kernels_->PlanFetch({.dims = dims_,
                                  .queries = queries,
                                  .block_indices = indices,
                                  .owners = owners,
                                  .record_bytes = kernels_->RecordBytes(dims_),
                                  .query_begin = 0,
                                  .capacity = 0,
                                  .locations = locations,
                                  .peers = nullptr,
                                  .offsets = nullptr,
                                  .num_slots = reinterpret_cast<int32_t*>(counters),
                                  .query_end = counters + 1,
                                  .num_remote_picks = counters + 2,
                                  .slots_of_rank = nullptr},
                                 nullptr);
    };
    for (const auto& [name, pool_blocks] :
         {std::make_pair("random lists", 0), std::make_pair("a pool of 20 for 32 queries", 20)}) {
      const std::vector<int32_t> drawn = DrawBlocks(dims_, num_tokens_, pool_blocks);
      Check(cudaMemcpy(indices, drawn.data(), drawn.size() * 4, cudaMemcpyHostToDevice));
      Time("plan fetch", 0, drawn.size() * 4.0, plan_fetch);
      const double slc_pairs = CountPairs(drawn);
      Time(std::string("attend selected, ") + name, pair_flops * slc_pairs,
           q_bytes + key_bytes + value_bytes + 3 * o_bytes, [&] {
             return kernels_->AttendSelected(
                 {.dims = dims_,
                  .queries = queries,
                  .query_begin = 0,
                  .query_end = num_tokens_,
                  .block_indices = indices,
                  .locations = locations,
                  .num_blocks = num_slc,
                  .own_records = records,
                  .num_own_records = num_records,
                  .slots = nullptr,
                  .o_slc = {},
                  .lse_slc = nullptr,
                  .gate = {.gate = gate.data,
                           .gate_dtype = DType::kBF16,
                           .row_stride = gate.row_stride,
                           .head_stride = gate.head_stride,
                           .o_cmp = {o_cmp.data, o_cmp.row_stride, o_cmp.head_stride},
                           .o_win = {o_win.data, o_win.row_stride, o_win.head_stride},
                           .o = o_cmp}},
                 nullptr);
           });
    }
  }

 private:
  void* Memory(int64_t num_bytes) {
    memory_.push_back(Value(kernels_->Allocate(num_bytes)));
    return memory_.back()->data();
  }

  template <class T>
  const T* Upload(const T* values, int64_t count) {
    void* const data = Memory(count * sizeof(T));
    Check(cudaMemcpy(data, values, count * sizeof(T), cudaMemcpyHostToDevice));
    return static_cast<const T*>(data);
  }

  Tensor3 Tensor(int64_t rows, int64_t heads, int64_t dim) {
    return {Memory(rows * heads * dim * 2), heads * dim, dim};
  }

  // Normal values, the same ones again after a length that no row divides.
  ConstTensor3 RandomTensor(int64_t rows, int64_t heads, int64_t dim) {
    static constexpr int64_t kPeriod = 1999993;
    const int64_t count = rows * heads * dim;
    std::vector<uint16_t> values(std::min(count, kPeriod));
    std::mt19937 random(static_cast<uint32_t>(memory_.size()));
    std::normal_distribution<float> normal;
    for (uint16_t& value : values) {
      const float x = normal(random);
      uint32_t bits;
      static_assert(sizeof(bits) == sizeof(x));
      std::memcpy(&bits, &x, sizeof(bits));
      value = static_cast<uint16_t>(bits >> 16);
    }
    auto* const data = static_cast<uint16_t*>(Memory(count * 2));
    for (int64_t i = 0; i < count; i += kPeriod) {
      Check(cudaMemcpy(data + i, values.data(), std::min(kPeriod, count - i) * 2,
                       cudaMemcpyHostToDevice));
    }
    return {data, heads * dim, dim};
  }

  double CountPairs(const std::vector<int32_t>& indices) const {
    const int64_t n = dims_.num_selected_blocks, hkv = dims_.num_kv_heads;
    double pairs = 0;
    for (size_t i = 0; i < indices.size(); ++i) {
      if (indices[i] < 0) continue;
      const int64_t position = static_cast<int64_t>(i) / (n * hkv);
      const int64_t first = int64_t{indices[i]} * dims_.select_block_tokens;
      pairs += std::min<int64_t>(position + 1 - first, dims_.select_block_tokens);
    }
    return pairs / static_cast<double>(hkv);
  }

  void Time(const std::string& name, double flops, double bytes,
            const std::function<absl::Status()>& run) {
    std::vector<float> times;
    for (int i = 0; i < kWarmUps + kRuns; ++i) {
      Check(cudaMemsetAsync(flush_->data(), i, kFlushBytes, nullptr));
      Check(cudaEventRecord(begin_));
      Check(run());
      Check(cudaEventRecord(end_));
      Check(cudaEventSynchronize(end_));
      float milliseconds = 0;
      Check(cudaEventElapsedTime(&milliseconds, begin_, end_));
      if (i >= kWarmUps) times.push_back(milliseconds);
    }
    std::sort(times.begin(), times.end());
    const double ms = times[times.size() / 2];
    const double floor = 1e3 * std::max(flops / kFlopsPerSecond, bytes / kBytesPerSecond);
    std::printf("  %-46s %8.3f ms (%.3f to %.3f) %7.1f TFLOP/s %7.1f GB/s  floor %7.3f ms, %.2f\n",
                name.c_str(), ms, times.front(), times.back(), flops / ms * 1e-9, bytes / ms * 1e-6,
                floor, floor / ms);
    std::fflush(stdout);
  }

  const AttentionDims dims_;
  const int64_t num_tokens_;
  const std::unique_ptr<Kernels> kernels_;
  const std::unique_ptr<kernels::Memory> flush_;
  std::vector<std::unique_ptr<kernels::Memory>> memory_;
  cudaEvent_t begin_, end_;
};

}  // namespace
}  // namespace nsa::kernels

int main(int argc, char** argv) {
  const int dk = argc > 1 ? std::atoi(argv[1]) : 128, dv = argc > 2 ? std::atoi(argv[2]) : dk;
  std::vector<int64_t> lengths;
  for (int i = 3; i < argc; ++i) lengths.push_back(std::atoll(argv[i]));
  if (lengths.empty()) lengths = {8192, 65536};
  for (int64_t num_tokens : lengths) nsa::kernels::Benchmark(dk, dv, num_tokens).Run();
  return 0;
}
